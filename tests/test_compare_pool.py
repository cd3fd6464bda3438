"""Worker processes: each makes its handle once, answers come as they get done, and a lost worker is told."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import distrifusion as df
from distrifusion.compare.pool import Pool, num_cores


def make(offset: int) -> Callable[[int], tuple[int, int]]:
    """The handle of these tests: adds, and says in which process. 13 fails, 99 takes long, 666 ends the process."""

    def handle(task: int) -> tuple[int, int]:
        if task == 13:
            raise ValueError("unlucky")
        if task == 99:
            time.sleep(600)
        if task == 666:
            os.kill(os.getpid(), signal.SIGKILL)
        return task + offset, os.getpid()

    return handle


def test_one_job_is_this_process_and_makes_its_handle_once() -> None:
    made = []

    def counted() -> Callable[[int], int]:
        made.append(1)
        return lambda task: task + 1

    with Pool(1, counted) as pool:
        assert list(pool.run([1, 2])) == [2, 3]
        assert list(pool.run([3])) == [4]
    assert made == [1]


def test_more_jobs_are_processes_that_last_for_several_runs(capfd: pytest.CaptureFixture[str]) -> None:
    with Pool(2, partial(make, 10)) as pool:
        found = [*pool.run(range(6)), *pool.run([6])]
    assert sorted(answer for answer, _ in found) == list(range(10, 17))
    processes = {process for _, process in found}
    assert os.getpid() not in processes
    assert len(processes) <= 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("task", "said"), [(13, "ValueError: unlucky"), (666, "a worker process was killed by signal 9")]
)
def test_what_goes_wrong_is_an_error_of_ours(task: int, said: str) -> None:
    with Pool(2, partial(make, 0)) as pool, pytest.raises(df.DistrifusionError, match=said):
        list(pool.run([1, 2, task, 3]))


def test_ctrl_c_ends_the_workers_without_a_word(tmp_path: Path) -> None:
    program = (
        "import multiprocessing, signal\n"
        "from functools import partial\n"
        "from test_compare_pool import make\n"
        "from distrifusion.compare.pool import Pool\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it\n"
        "    with Pool(2, partial(make, 0)) as pool:\n"
        "        for _ in pool.run([1, 99, 99]):\n"
        "            print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)\n"
    )
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, tmp_path / "program.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        for pid in workers:  # as a terminal does, but to them first: the parent would end them before they can speak
            os.kill(pid, signal.SIGINT)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        try:
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert said.count("Traceback") == 1  # this program's own
    assert said.rstrip().endswith("KeyboardInterrupt")
    deadline = time.monotonic() + 30
    while is_alive(process.pid):  # no worker is left, nor, in a moment, what tracks their semaphores
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(group: int) -> bool:
    """Whether a process group has a process."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_cores_are_those_that_may_be_used() -> None:
    assert 1 <= num_cores() <= (os.cpu_count() or 1)
