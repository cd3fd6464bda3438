"""Workers start with torchrun's variables, end together, and leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distrifusion.launch import Exit, Group

HERE = str(Path(__file__).parent)


@contextmanager
def group_of(num_ranks: int, function: str) -> Iterator[Group]:
    path = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])
    group = Group(num_ranks, "launch_jobs", function, {"PYTHONPATH": path, "JOB_WORD": "word"})
    try:
        yield group
    finally:
        group.release()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]  # ended, and nobody has asked how
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_workers_have_torchruns_variables_and_their_own_session_and_log() -> None:
    with group_of(2, "speak") as group:
        assert group.wait(30)
        assert group.error is None
        assert group.exits == {}
        assert sorted(group.pids) == [0, 1]
        for rank in (0, 1):
            assert group.log_tail(rank).splitlines() == [f"{rank} {rank} 2 127.0.0.1 word", "own session True"]
        assert group.log_tail(1, 1) == "own session True"
        logs = group._folder
        assert logs.exists()
    assert not logs.exists()


def test_one_failure_ends_all_and_is_told_from_its_consequences() -> None:
    with group_of(3, "fail") as group:
        assert group.wait(30)
        first = group.first_exit()
        assert first is not None
        assert (first.rank, first.code, str(first)) == (1, 7, "exited with code 7")
        assert group.first_exit(seen=2) == first  # rank 2 was ended by the agent
        assert group.log_tail(1) == "before the end"
        assert not any(map(is_running, group.pids.values()))


def test_a_killed_worker_is_named_with_its_signal() -> None:
    with group_of(2, "die") as group:
        assert group.wait(30)
        first = group.first_exit()
        assert first is not None
        assert (first.rank, first.pid) == (1, group.pids[1])
        assert str(first) == "killed by signal 9 (SIGKILL)"


def test_kill_ends_stopped_workers_at_once() -> None:
    with group_of(2, "stop") as group:
        deadline = time.monotonic() + 30
        while not (group.log_tail(0) and group.log_tail(1)):
            assert time.monotonic() < deadline, "the workers did not start"
            time.sleep(0.05)
        start = time.monotonic()
        group.kill()
        assert group.ended.is_set()
        assert time.monotonic() - start < 5
        assert not any(map(is_running, group.pids.values()))


def test_release_ends_what_still_runs() -> None:
    with group_of(1, "fail") as group:  # rank 0 sleeps
        pass
    assert group.ended.is_set()
    assert not any(map(is_running, group.pids.values()))


def test_an_unknown_signal_is_a_number() -> None:
    assert str(Exit(rank=0, pid=1, code=-250)) == "killed by signal 250"


def test_a_worker_ends_with_a_parent_that_was_killed() -> None:
    path = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", "import launch_jobs; launch_jobs.leave_behind()"]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    deadline = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(pid)
