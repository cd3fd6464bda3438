"""The ranks of one library, seen from the driver: processes that stand still until their turn comes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Self

from rank import Settings

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
LOADING = 600.0  # seconds that ranks have to load and to connect
ANSWERING = 3600.0  # seconds of one turn


class LostError(Exception):
    """The ranks of a library have ended; says what they last wrote."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


class Ranks:
    """``world`` ranks of ``library`` under the interpreter ``python``; on links of ``slow_link``, such as ``200mbit``.

    Raises:
        LostError: they did not come.
    """

    def __init__(self, library: str, python: str, settings: Settings, world: int, slow_link: str | None) -> None:
        self.library = library
        self._folder = tempfile.TemporaryDirectory(prefix="peers-")
        self._log = Path(self._folder.name) / "log"
        address = str(Path(self._folder.name) / "line")  # a file: namespaces of a slow link share those
        self._lines: dict[int, tuple[socket.socket, Any]] = {}
        command = [python, str(HERE / "rank.py"), library, address, json.dumps(asdict(settings))]
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(address)
            door.listen(world)
            door.settimeout(1.0)
            with self._log.open("wb") as log:
                self._processes = [
                    subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                    for words, environment in _commands(command, world, slow_link)
                ]
            try:
                self._meet(door, world)
            except BaseException:
                self.close(0)
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(30 if error[0] is None else 0)

    def turn(self, do: str, ranks: Sequence[int] | None = None, **order: Any) -> list[Any]:
        """What ``ranks`` (None: all) answer to an order, by rank. The others stand still.

        Raises:
            LostError: a rank has ended.
        """
        lines = [self._lines[rank] for rank in (sorted(self._lines) if ranks is None else ranks)]
        try:
            for _, words in lines:
                words.write(json.dumps({"do": do, **order}) + "\n")
                words.flush()
            answers = [self._answer(words) for _, words in lines]
        except OSError as failure:
            raise self._lost() from failure
        return answers

    def close(self, patience: float) -> None:
        """Hang up, upon which the ranks end; those that do not within ``patience`` seconds are ended."""
        for line, words in self._lines.values():
            words.close()
            line.close()
        self._lines.clear()
        for process in self._processes:
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                process.terminate()  # slow-link ends its ranks
                process.wait()
        self._folder.cleanup()

    def _meet(self, door: socket.socket, world: int) -> None:
        deadline = monotonic() + LOADING
        while len(self._lines) < world:
            try:
                line, _ = door.accept()
            except TimeoutError:
                if any(process.poll() is not None for process in self._processes) or monotonic() > deadline:
                    raise self._lost() from None
                continue
            line.settimeout(ANSWERING)
            words = line.makefile("rw")
            self._lines[json.loads(words.readline())["rank"]] = line, words
        for _, words in self._lines.values():
            self._answer(words)  # it has loaded

    def _answer(self, words: Any) -> Any:
        line = words.readline()
        if not line:
            raise self._lost()
        answer = json.loads(line)
        if "failure" in answer:
            raise LostError(f"a rank of {self.library} failed:\n{answer['failure']}")
        return answer["result"]

    def _lost(self) -> LostError:
        sleep(1.0)  # who has hung up ends in a moment
        codes = [code for process in self._processes if (code := process.poll())]
        code = codes[0] if codes else 1
        tail = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()][-30:]
        return LostError("\n".join([f"the ranks of {self.library} ended with exit code {code}:", *tail]), code)


def _commands(command: list[str], world: int, slow_link: str | None) -> Iterator[tuple[list[str], dict[str, str]]]:
    """What is to be started, and in which environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "src")}
    if slow_link is not None:
        slow = [sys.executable, str(REPOSITORY / "scripts" / "slow-link"), "--rate", slow_link, "--nproc", str(world)]
        yield [*slow, "--", *command], environment
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for rank in range(world):
        yield command, {**environment, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
