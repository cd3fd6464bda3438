"""The worker process around a `Painter`, which talks to the `workers` of the parent:

    worker -> ("hello", rank, pid)                 parent -> Setup
    worker -> ("done", None)     it has loaded     parent -> ("join", None)
    worker -> ("done", None)     it has joined     parent -> ("paint", Request on rank 0 | None)
    worker -> ("step", step, total, seconds)*  ("done", Painted on rank 0 | None)

and ("failed", Failure) in place of any "done". Idle workers wait on this channel, not in a collective, so that idle
time is not silence. When the parent is gone, so is the worker: at the end of the channel it exits, in mid-picture too.
"""

from __future__ import annotations

import builtins
import faulthandler
import os
import shutil
import signal
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from queue import SimpleQueue
from typing import Any

from . import errors
from .errors import DistrifusionError
from .painter import OnStep, Painter, Request, Setup


@dataclass
class Failure:
    """An exception on its way to the parent. ``clean``: it came before any message of the picture left the rank."""

    kind: str
    text: str
    trace: str
    clean: bool = False

    @classmethod
    def of(cls, error: BaseException, *, clean: bool = False) -> Failure:
        """The failure that ``error`` is."""
        text = error.args[0] if len(error.args) == 1 and isinstance(error.args[0], str) else str(error)
        return cls(type(error).__name__, text, "".join(traceback.format_exception(error)), clean)

    def exception(self) -> Exception:
        """The exception again, of the same class where it is ours or a builtin; its cause is the worker's traceback."""
        cls = getattr(errors, self.kind, None) or getattr(builtins, self.kind, None)
        error: Exception
        if isinstance(cls, type) and issubclass(cls, Exception) and not issubclass(cls, UnicodeError):
            error = cls(self.text)
        else:
            error = DistrifusionError(f"{self.kind}: {self.text}")
        error.__cause__ = WorkerTrace(self.trace)
        return error


class WorkerTrace(Exception):  # noqa: N818 - never raised: the cause of an exception that came from a worker
    """What the worker itself said, as the ``__cause__`` of what the parent raises."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def main() -> None:
    """The worker process. Its environment is the agent's (torchrun's names) and the channel's."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    rank = int(os.environ["RANK"])
    host, port = os.environ["DISTRIFUSION_CHANNEL"].rsplit(":", 1)
    key = bytes.fromhex(os.environ.pop("DISTRIFUSION_KEY"))
    try:
        channel = Client((host, int(port)), authkey=key)
    except OSError:  # the parent went before we came
        return
    channel.send(("hello", rank, os.getpid()))
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(channel, inbox), daemon=True).start()
    serve(rank, channel, inbox)


def serve(rank: int, channel: Connection, inbox: SimpleQueue[Any]) -> None:
    """Load, join and paint as the parent says, until it says close."""
    comm = None
    try:
        setup: Setup = inbox.get()
        painter = Painter(setup, rank, int(os.environ["WORLD_SIZE"]))
        channel.send(("done", None))
        if inbox.get()[0] == "join":
            from .comm.torch_dist import TorchComm

            comm = TorchComm.from_environment(setup.device, setup.timeout)
            painter.join(comm)
            channel.send(("done", None))
            on_step: OnStep | None = (lambda *step: channel.send(("step", *step))) if rank == 0 else None
            while (message := inbox.get())[0] == "paint":
                _paint(painter, message[1], on_step, rank, channel)
    except Exception as error:
        if comm is not None:
            comm.abort()  # who waits for this rank need not wait for the timeout
        channel.send(("failed", Failure.of(error)))
        inbox.get()  # the parent has the last word: what it hears from the others decides what it raises
    finally:
        if comm is not None:
            comm.close()


def _paint(painter: Painter, request: Request | None, on_step: OnStep | None, rank: int, channel: Connection) -> None:
    before = painter.sent()
    try:
        painted = painter.paint(request, on_step)
    except errors.PeerLost:
        raise
    except Exception as error:
        if painter.sent() != before:
            raise  # messages are under way: the ranks are no longer at the same place
        channel.send(("failed", Failure.of(error, clean=True)))
    else:
        channel.send(("done", painted if rank == 0 else None))


def _listen(channel: Connection, inbox: SimpleQueue[Any]) -> None:
    while True:
        try:
            inbox.put(channel.recv())
        except (EOFError, OSError):
            # The parent is gone, and cannot clear up. The main thread may be anywhere, in a collective too.
            shutil.rmtree(os.environ["DISTRIFUSION_LOGS"], ignore_errors=True)
            os._exit(1)
