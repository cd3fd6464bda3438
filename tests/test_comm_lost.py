"""Ranks that die, leave or fall silent end in PeerLost on every rank; a bad start ends in a line that says why."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distrifusion.comm import Comm, run_ranks, torch_dist
from distrifusion.comm.environment import pick_device, read_environment
from distrifusion.comm.torch_dist import TorchComm
from distrifusion.errors import ConfigError, PeerLost
from process_pool import ProcessPool

pytestmark = pytest.mark.usefixtures("all_at_once")

FAST = 8.0  # seconds; far below the timeout of 25 that a rank would sit out if the loss did not spread

KEPT: list[PeerLost] = []  # as a program may keep them: the frames of a traceback must not hold sockets open


def lost(call: Callable[[], Any]) -> tuple[float, str]:
    """Seconds until ``call`` raised PeerLost, and what it said."""
    start = time.perf_counter()
    with pytest.raises(PeerLost) as caught:
        call()
    KEPT.append(caught.value)
    return time.perf_counter() - start, str(caught.value)


def receive(comm: Comm, peer: int) -> Callable[[], None]:
    return comm.swap({}, {peer: torch.zeros(4)}, kind="halo").wait


def assert_closed(comm: Comm) -> None:
    """Everything on a broken communicator raises at once."""
    for call in (
        comm.barrier,
        lambda: receive(comm, (comm.rank + 1) % comm.world),
        lambda: comm.all_gather(torch.zeros(1), [1] * comm.world, kind="context"),
        lambda: comm.broadcast(torch.zeros(1)),
        lambda: comm.all_gather_object(1),
    ):
        seconds, said = lost(call)
        assert seconds < 0.5
        assert "closed" in said
    comm.abort()
    comm.close()


@pytest.fixture
def fragile() -> Iterator[Callable[[float], ProcessPool]]:
    """Processes of this test's own, which it may kill."""
    pools: list[ProcessPool] = []

    def make(timeout: float) -> ProcessPool:
        pools.append(ProcessPool(3, timeout))
        return pools[-1]

    yield make
    for pool in pools:
        pool.stop()


# --- processes


def killed(comm: Comm, what: str) -> Any:
    part = comm.split([[0, 1, 2]])
    comm.barrier()
    if comm.rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    later = part.all_gather(torch.zeros(3), [3] * 3, kind="context")  # under way on a communicator that was split off
    call = {
        "swap": lambda: receive(comm, 1 if comm.rank == 0 else 0)(),  # rank 2 waits for rank 0 only
        "gather": lambda: comm.all_gather(torch.zeros(3), [3] * 3, kind="context").wait(),
        "broadcast": lambda: comm.broadcast(torch.zeros(3), 1),
        "launch": lambda: (
            comm.swap({1: torch.zeros(4)}, {2: torch.zeros(4)}, kind="halo").wait()
            if comm.rank == 0
            else receive(comm, 0)()
        ),
    }[what]
    if what == "launch" and comm.rank == 0:
        time.sleep(1.0)  # rank 1 is dead by now: the send fails at once, after the receive is under way
    result = lost(call)
    lost(later.wait)
    assert_closed(comm)
    assert_closed(part)
    return result  # the process stays: it is not its end that the peers notice


@pytest.mark.parametrize("what", ["swap", "gather", "broadcast", "launch"])
def test_a_killed_process_is_noticed_by_all(fragile, what):
    first, dead, last = fragile(25.0).outcomes(killed, 3, what)
    assert dead is None
    for seconds, said in (first, last):
        assert seconds < FAST
        assert "lost rank" in said
    if what == "swap":
        assert "rank 0 lost rank 1 " in first[1]
        assert "rank 2 lost rank 0 " in last[1]


def silent(comm: Comm, what: str) -> Any:
    comm.barrier()
    if comm.rank == 1:
        return None  # the process stays: alive, connected, and without an answer
    if what == "swap":
        return lost(receive(comm, 1 if comm.rank == 0 else 0))
    if what == "split":
        return lost(lambda: comm.split([[0, 1, 2]]))
    return lost(comm.all_gather(torch.zeros(3), [3] * 3, kind="context").wait)


@pytest.mark.parametrize("what", ["swap", "gather", "split"])
def test_a_silent_process_is_lost_after_the_timeout(fragile, what):
    first, _, last = fragile(1.5).outcomes(silent, 3, what)
    assert 1.0 < first[0] < 5.0
    assert 0.5 < last[0] < 5.0
    assert "1.5 s" in first[1]


def aborts(comm: Comm) -> Any:
    comm.barrier()
    if comm.rank == 0:
        comm.abort()
        assert_closed(comm)
        return None
    return lost(receive(comm, comm.rank - 1))  # 2 waits for 1, which waits for 0


def test_abort_releases_who_waits(fragile):
    _, middle, last = fragile(25.0).outcomes(aborts, 3)
    assert middle[0] < FAST
    assert last[0] < FAST


def raises_on_one(comm: Comm) -> None:
    if comm.rank == 2:
        raise KeyError("the cause")
    comm.barrier()


def test_a_pool_reports_the_cause_and_starts_anew(fragile):
    pool = fragile(25.0)
    with pytest.raises(KeyError, match="the cause"):
        pool.run(raises_on_one, 3)
    assert pool.run(rank_of, 3) == [0, 1, 2]


def rank_of(comm: Comm) -> int:
    return comm.all_gather_object(comm.rank)[comm.rank]


# --- threads


def thread_ends(end: str) -> tuple[float, dict[int, str], BaseException | None]:
    """Rank 0 waits for 1, rank 2 for 0; rank 1 ends. What the others saw, and what run_ranks raised."""
    seen: dict[int, str] = {}

    def fn(comm: Comm) -> None:
        if comm.rank == 1:
            time.sleep(0.05)
            if end == "raises":
                raise KeyError("the cause")
            if end == "aborts":
                comm.abort()
                assert_closed(comm)
                time.sleep(0.2)
            return
        try:
            receive(comm, 1 if comm.rank == 0 else 0)()
        except PeerLost as loss:
            seen[comm.rank] = str(loss)
            assert_closed(comm)
            raise

    start = time.perf_counter()
    raised: BaseException | None = None
    try:
        run_ranks(3, fn, timeout=25.0)
    except Exception as failure:
        raised = failure
    return time.perf_counter() - start, seen, raised


@pytest.mark.parametrize(
    ("end", "kind", "said"),
    [("raises", KeyError, "rank 1 failed: KeyError"), ("returns", PeerLost, "finished"), ("aborts", PeerLost, "left")],
)
def test_a_thread_that_ends_is_noticed_by_all(end, kind, said):
    before = threading.active_count()
    seconds, seen, raised = thread_ends(end)
    assert seconds < FAST
    assert type(raised) is kind
    assert said in seen[0]
    assert "rank 0" in seen[2]
    assert threading.active_count() == before


def test_a_silent_thread_is_lost_after_the_timeout():
    over = threading.Event()

    def fn(comm: Comm) -> Any:
        if comm.rank == 1:
            return over.wait(30.0)
        try:
            return lost(receive(comm, 1))
        finally:
            over.set()

    (seconds, said), ended = run_ranks(2, fn, timeout=0.3)
    assert ended
    assert 0.25 < seconds < 5.0
    assert said == "rank 0 heard nothing from rank 1 for 0.3 s"


def test_what_was_sent_before_the_end_arrives():
    def fn(comm: Comm) -> float:
        got = torch.zeros(1)
        if comm.rank == 0:
            comm.swap({1: torch.ones(1)}, {}, kind="halo").wait()
        else:
            time.sleep(0.05)
            comm.swap({}, {0: got}, kind="halo").wait()
        return got.item()

    assert run_ranks(2, fn) == [0.0, 1.0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_threads_start_in_the_callers_mode(mode):
    with mode():
        here = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert run_ranks(2, lambda comm: (torch.is_grad_enabled(), torch.is_inference_mode_enabled())) == [here, here]


@pytest.mark.parametrize("num_ranks", [0, -1, 1.5, True, "2"])
def test_run_ranks_refuses_a_world_without_ranks(num_ranks):
    with pytest.raises(ConfigError, match=f"num_ranks={num_ranks!r} must be"):
        run_ranks(num_ranks, rank_of)


# --- starting


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets torchrun's variables to good values but for those given; None unsets."""

    def use(**changed: str | None) -> None:
        good = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
        for name, value in {**good, **changed}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    monkeypatch.delenv("DISTRIFUSION_TIMEOUT", raising=False)
    return use


def test_outside_torchrun_there_is_no_communicator(environment):
    environment(**dict.fromkeys(TORCHRUN))
    assert TorchComm.from_environment() is None
    with pytest.raises(ConfigError, match="no process group yet"):
        TorchComm()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR must be set"),
        ({"WORLD_SIZE": None, "MASTER_PORT": ""}, "WORLD_SIZE and MASTER_PORT must be set"),
        ({"RANK": "one"}, "RANK='one' must be a whole number"),
        ({"RANK": "-1"}, "RANK='-1' must be a whole number"),
        ({"RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x' must be a whole number"),
        ({"DISTRIFUSION_TIMEOUT": "soon"}, "DISTRIFUSION_TIMEOUT='soon' must be a positive number"),
        ({"DISTRIFUSION_TIMEOUT": "0"}, "DISTRIFUSION_TIMEOUT='0' must be a positive number"),
        ({"DISTRIFUSION_SHARED_MEMORY": "no"}, "DISTRIFUSION_SHARED_MEMORY='no' must be 0 (all goes over Gloo) or 1"),
    ],
)
def test_bad_variables_are_named(environment, changed, said):
    environment(**changed)
    with pytest.raises(ConfigError) as caught:
        TorchComm.from_environment("cpu")
    assert said in str(caught.value)
    assert not dist.is_initialized()


def test_unknown_and_missing_devices_are_refused(environment):
    environment()
    with pytest.raises(ConfigError, match="device='abacus' is not on this machine"):
        TorchComm.from_environment("abacus")


def test_local_rank_picks_the_device(environment, monkeypatch):
    chosen: list[int] = []
    two = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2, set_device=chosen.append)
    monkeypatch.setattr(torch, "get_device_module", lambda device_type: two)
    environment()
    launched = read_environment()
    assert pick_device("cuda", launched) == torch.device("cuda", 1)
    assert chosen == [1]
    environment(LOCAL_RANK="2", RANK="4", WORLD_SIZE="8")
    with pytest.raises(ConfigError, match="LOCAL_RANK=2 needs 3 cuda devices on this machine, which has 2"):
        TorchComm.from_environment("cuda")
    environment(LOCAL_RANK=None)
    with pytest.raises(ConfigError, match="LOCAL_RANK must be set"):
        TorchComm.from_environment("cuda")
    assert chosen == [1]


def test_a_start_without_the_others_raises(environment, monkeypatch):
    monkeypatch.setattr(torch_dist, "RENDEZVOUS_SECONDS", 1.0)
    environment(MASTER_PORT=str(free_port()))
    seconds, said = lost(lambda: TorchComm.from_environment("cpu", timeout=1.0))
    assert seconds < 20.0
    assert "the 2 ranks did not come together at 127.0.0.1:" in said
    assert not dist.is_initialized()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun_rank(rank: int, port: int, answers: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), DISTRIFUSION_TIMEOUT="7")
    comm = TorchComm.from_environment("cpu")
    assert comm is not None
    gathered = comm.all_gather_object(("rank", rank))
    comm.close()
    comm.close()
    answers.put((rank, gathered, comm.timeout, dist.is_initialized()))


def test_torchruns_variables_make_a_group_that_close_takes_back():
    context = multiprocessing.get_context("forkserver")
    answers, port = context.Queue(), free_port()
    processes = [context.Process(target=torchrun_rank, args=(rank, port, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    got = sorted(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    wanted = [("rank", 0), ("rank", 1)]
    assert got == [(0, wanted, 7.0, False), (1, wanted, 7.0, False)]
    assert [process.exitcode for process in processes] == [0, 0]


def existing_groups(comm: Comm) -> Any:
    """The default group, and one of ranks 1 and 3, brought by the user: used, and left as they were."""
    whole = TorchComm.from_environment("cpu", timeout=9.0)
    assert whole is not None
    assert (whole.rank, whole.world, whole.timeout) == (comm.rank, comm.world, 9.0)
    assert whole.all_gather_object(comm.rank) == list(range(comm.world))
    whole.close()
    group = dist.new_group([1, 3])
    said: Any = None
    if comm.rank in (1, 3):
        for _ in range(2):  # and again: a name used twice would find the addresses of the first
            pair = TorchComm(group, timeout=9.0)
            alone = pair.split([[0], [1]])
            turned = pair.split([[1, 0]])
            said = pair.all_gather_object(comm.rank), turned.all_gather_object(comm.rank), alone.all_gather_object(9)
            pair.close()
        total = torch.ones(1)
        dist.all_reduce(total, group=group)
        assert total.item() == 2
    else:
        with pytest.raises(ConfigError, match=f"rank {comm.rank} of the default group is not in the given one"):
            TorchComm(group)
    with pytest.raises(ConfigError, match="does not carry 'cuda' tensors"):
        TorchComm(device_type="cuda")
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == comm.world
    if comm.rank in (1, 3):
        dist.destroy_process_group(group)
    return said


def test_existing_groups_are_used_and_left_open(pool):
    said = pool.run(existing_groups, pool.max_world)
    assert said == [None, ([1, 3], [3, 1], [9]), None, ([1, 3], [3, 1], [9]), None, None]
