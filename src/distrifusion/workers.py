"""The parent's side of a group of workers: a channel to each rank, and one answer or exception out of all of theirs."""

from __future__ import annotations

import os
import secrets
import socket
import time
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, wait
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from .errors import PeerLost
from .launch import Group
from .painter import OnStep, Setup
from .worker import Failure, WorkerTrace

GRACE = 5.0  # seconds the other ranks get to answer once one has failed; then the group is given up
EXIT = 8.0  # seconds the workers get to leave when told to


class Workers:
    """``num_ranks`` workers that have loaded ``setup`` and joined into one group.

    Raises:
        DistrifusionError: a worker could not start, load or join; none is left running.
    """

    def __init__(self, num_ranks: int, setup: Setup) -> None:
        self._num_ranks = num_ranks
        self._channels: dict[int, Connection] = {}
        key = secrets.token_bytes(32)
        door = _Door(key, num_ranks)
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment = {
            "DISTRIFUSION_CHANNEL": door.address,
            "DISTRIFUSION_KEY": key.hex(),
            "TRANSFORMERS_VERBOSITY": "error",
            "DIFFUSERS_VERBOSITY": "error",
            "PYTHONSAFEPATH": "1",  # a file of the user's folder must not stand in for a module, as it does under -c
        }
        if setup.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(threads // num_ranks, 1))
        self._group = Group(num_ranks, "distrifusion.worker", "main", environment)
        try:
            while len(self._channels) < num_ranks:
                guest = door.guest(timeout=0.2)
                if guest is not None:
                    self._channels[guest[0]] = guest[1]
                elif self._group.ended.is_set():
                    raise self._lost(None, "while it started")
            self._ask(dict.fromkeys(range(num_ranks), setup), "while it loaded")
            self._ask(dict.fromkeys(range(num_ranks), ("join", None)), "while the ranks joined")
        except BaseException:
            self.kill()
            raise
        finally:
            door.close()

    @property
    def pids(self) -> dict[int, int]:
        """Process of each rank."""
        return self._group.pids

    def loss(self) -> PeerLost | None:
        """Who was lost while nothing was asked of the group; None while all are well."""
        if not self._group.ended.is_set() and not wait(list(self._channels.values()), 0):
            return None
        return self._lost(None, "while idle")

    def paint(self, request: Any, on_step: OnStep | None = None) -> Any:
        """Rank 0's `Painted` for ``request``, which only rank 0 is told: the ranks have it from there.

        Raises:
            PeerLost: a rank died or fell silent; the group is of no more use.
            Exception: what the ranks raised, same class and text. ``usable`` says whether the group still is.
        """
        messages = {rank: ("paint", request if rank == 0 else None) for rank in range(self._num_ranks)}
        return self._ask(messages, "in the middle of a picture", on_step)[0]

    @property
    def usable(self) -> bool:
        """Whether the group has not been given up; `loss` says whether it is well."""
        return bool(self._channels)

    def close(self) -> None:
        """Tell the workers to leave, wait, end those that did not. May be called twice."""
        for channel in self._channels.values():
            with suppress(OSError):
                channel.send(("close", None))
        if self._channels:
            self._group.wait(EXIT)
        self.kill()

    def kill(self) -> None:
        """End the workers at once. May be called twice."""
        self._group.release()
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    def _ask(self, messages: dict[int, Any], when: str, on_step: OnStep | None = None) -> dict[int, Any]:
        """Send each rank its message and collect all answers; a failure of some is one exception, and the end."""
        answers: dict[int, Any] = {}
        failed: list[int] = []  # in order of arrival
        deadline: float | None = None
        try:
            for rank, message in messages.items():
                self._send(rank, message, when)
            while len(answers) < self._num_ranks and (deadline is None or time.monotonic() < deadline):
                for rank, (kind, *values) in self._receive(set(messages) - set(answers), when):
                    if kind == "step":
                        if on_step is not None:
                            on_step(*values)
                        continue
                    answers[rank] = values[0]
                    if kind == "failed":
                        failed.append(rank)
                        deadline = deadline or time.monotonic() + GRACE
        except BaseException:  # also Ctrl-C, and what the caller's on_step raises: the ranks are in mid-picture
            self.kill()
            raise
        if failed:
            error, survives = self._verdict(answers, failed)
            if not survives:
                self.kill()
            raise error
        return answers

    def _send(self, rank: int, message: Any, when: str) -> None:
        try:
            self._channels[rank].send(message)
            return
        except OSError:
            pass  # raised below: `from None` would overwrite the cause that _lost sets
        raise self._lost(rank, when)

    def _receive(self, ranks: set[int], when: str) -> list[tuple[int, Any]]:
        """What has arrived from ``ranks`` within 0.2 s."""
        messages = []
        ended = self._group.ended.is_set()
        ready = wait([self._channels[rank] for rank in ranks], 0.2)
        for rank in sorted(ranks):
            if self._channels[rank] not in ready:
                continue
            try:
                messages.append((rank, self._channels[rank].recv()))
                continue
            except (EOFError, OSError):
                pass  # as in _send
            raise self._lost(rank, when)
        if ended and not messages:
            raise self._lost(None, when)
        return messages

    def _verdict(self, answers: dict[int, Any], failed: list[int]) -> tuple[Exception, bool]:
        """The one exception for ranks that failed, in the order ``failed``, and whether the group survives it."""
        failures: list[Failure] = [answers[rank] for rank in failed]
        own = [failure for failure in failures if failure.kind != "PeerLost"]
        if own:
            same = len({(failure.kind, failure.text) for failure in own}) == 1
            all_clean = len(own) == self._num_ranks and all(failure.clean for failure in own)
            return own[0].exception(), same and all_clean
        silent = sorted(set(range(self._num_ranks)) - set(answers))
        if silent:
            rank = silent[0]
            text = f"rank {rank} (pid {self.pids.get(rank)}) was lost: it fell silent; {failures[0].text}"
        else:
            text = f"rank {failed[0]} lost a peer: {failures[0].text}"
        error = PeerLost(text)
        error.__cause__ = WorkerTrace(failures[0].trace)
        return error, False

    def _lost(self, rank: int | None, when: str) -> PeerLost:
        """The exception for a group that is coming to its end, seen at the channel of ``rank`` or by the agent."""
        if not self._group.wait(2.0):
            self._group.kill()
        if self._group.error is not None:
            error = PeerLost(f"the workers could not be started: {self._group.error}")
            error.__cause__ = self._group.error
            return error
        leave = self._group.first_exit(rank)
        if leave is None:
            who = f"rank {rank} (pid {self.pids.get(rank)})" if rank is not None else "the workers"
            return PeerLost(f"{who} left {when}")
        tail = self._group.log_tail(leave.rank)
        last = f": {tail.splitlines()[-1].strip()}" if tail and leave.code > 0 else ""
        error = PeerLost(f"rank {leave.rank} (pid {leave.pid}) was lost: {leave} {when}{last}")
        if tail:
            error.__cause__ = WorkerTrace(tail)
        return error


class _Door:
    """Where the workers knock: a port of the loopback that only who has the key gets through."""

    def __init__(self, key: bytes, num_ranks: int) -> None:
        self._listener = Listener(("127.0.0.1", 0), backlog=num_ranks + 1, authkey=key)
        host, port = self._listener.address
        self.address = f"{host}:{port}"
        self._host, self._port = str(host), int(port)
        self._guests: SimpleQueue[tuple[int, Connection]] = SimpleQueue()
        self._closed = False
        self._thread = Thread(target=self._welcome, daemon=True)
        self._thread.start()

    def guest(self, timeout: float) -> tuple[int, Connection] | None:
        """The next (rank, channel) that came in; None after ``timeout`` seconds without one."""
        with suppress(Empty):
            return self._guests.get(timeout=timeout)
        return None

    def close(self) -> None:
        """Let nobody in any more."""
        self._closed = True
        with suppress(OSError), socket.create_connection((self._host, self._port), timeout=1):
            pass  # accept() wakes for a caller only
        self._thread.join(2)
        self._listener.close()

    def _welcome(self) -> None:
        while not self._closed:
            with suppress(OSError, EOFError, AuthenticationError):
                channel = self._listener.accept()
                try:
                    _, rank, _ = channel.recv()
                except BaseException:
                    channel.close()
                    raise
                self._guests.put((rank, channel))
