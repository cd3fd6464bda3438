"""A stretch of work that is done again and again without asking Python: what the device did, and between it the host.

A CUDA graph holds the device's work alone, and may not end with work of another stream that it has not joined. What
ranks say to each other is therefore no part of one: where a message leaves and where one is waited for, the recording
is cut, and the host does that itself when the tape is played.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


class Segment(Protocol):
    """Work of the device between two things that the host does."""

    def begin(self) -> None:
        """What is launched from now on is recorded, and not done."""
        ...

    def end(self) -> None:
        """It ends here."""
        ...

    def play(self) -> None:
        """Do it, in the memory that was recorded."""
        ...


class Recorder(Protocol):
    """Makes the segments of one tape, or of several that are never played at the same time and share memory."""

    def recording(self) -> AbstractContextManager[None]:
        """Around the recording of a tape."""
        ...

    def segment(self) -> Segment:
        """A new one."""
        ...


class Tape:
    """Work that was done once and can be played.

    Tensors that it reads from outside must be there, at the same place, whenever it is played. Those that it makes have
    their memory to themselves only as long as they are held.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._plays: list[Callable[[], None]] = []
        self._open: Segment | None = None

    def record(self, work: Callable[[], T]) -> T:
        """Do ``work``, which gives to `host` what is not the device's, and keep how."""
        with self._recorder.recording():
            self._begin()
            try:
                result = work()
            except BaseException:
                if self._open is not None:
                    with suppress(RuntimeError):  # it may be what has failed
                        self._open.end()
                    self._open = None
                raise
            self._end()
        return result

    def host(self, action: Callable[[], None]) -> None:
        """While recording: do something of the host's, now and at this place of every playing."""
        self._end()
        action()
        self._plays.append(action)
        self._begin()

    def play(self) -> None:
        """Do the work again."""
        for play in self._plays:
            play()

    def _begin(self) -> None:
        segment = self._recorder.segment()
        segment.begin()
        self._open = segment

    def _end(self) -> None:
        segment, self._open = self._open, None
        assert segment is not None, "not recording"
        segment.end()
        segment.play()  # the host may be about to send what is in it
        self._plays.append(segment.play)


class CudaRecorder:
    """Segments that are CUDA graphs of one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # the default one cannot be recorded

    @contextmanager
    def recording(self) -> Iterator[None]:
        """See Recorder."""
        gc.collect()  # what is let go of in mid-recording must not be another graph
        before = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            yield
        before.wait_stream(self._stream)

    def segment(self) -> Segment:
        """See Recorder."""
        return _CudaSegment(self._pool)


class _CudaSegment:
    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._graph: Any = torch.cuda.CUDAGraph()

    def begin(self) -> None:
        """See Segment."""
        # Other threads, such as NCCL's watchdog, go on asking the device.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        """See Segment."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*graph is empty")  # between two things that the host does
            self._graph.capture_end()

    def play(self) -> None:
        """See Segment."""
        self._graph.replay()


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""By type of device, what can be recorded."""
