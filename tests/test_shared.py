"""Lanes and routes of shared memory: a stream that wraps, flow control, a dead writer told from a slow one."""

import fcntl
import os
import platform
from pathlib import Path

import pytest
import torch

import distrifusion as df
from distrifusion.comm import shared, shared_route
from distrifusion.comm.route import Layout
from distrifusion.comm.shared import Lane, _nap, _Parcel, open_shared
from distrifusion.comm.shared_route import SharedRoute, open_shared_route

pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm on this system")

SIZE = 4096


@pytest.fixture
def lanes(tmp_path):
    writer = Lane(tmp_path / "lane", SIZE)
    reader = Lane(tmp_path / "lane", None)
    yield writer, reader
    writer.close()
    reader.close()


def numbers(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_messages_arrive_whole_and_in_order_through_a_ring_smaller_than_they_are(lanes):
    writer, reader = lanes
    said = [numbers(count, seed) for seed, count in enumerate((3, SIZE, 1, 3 * SIZE + 5, 1000, 1000))]
    heard = [torch.zeros_like(words) for words in said]
    sending, receiving = [_Parcel(words) for words in said], [_Parcel(words) for words in heard]
    for parcel in sending:
        writer.add(parcel)
    assert sending[0].is_done
    assert not sending[3].is_done  # the ring is full, and nothing was overwritten
    for parcel in receiving:
        reader.add(parcel)
    while any([writer.progress(), reader.progress()]):
        pass
    assert all(parcel.is_done for parcel in sending + receiving)
    assert all(map(torch.equal, said, heard))


def test_nothing_moves_before_it_was_written(lanes):
    writer, reader = lanes
    late = _Parcel(torch.zeros(8, dtype=torch.uint8))
    reader.add(late)
    assert not reader.progress()
    writer.add(_Parcel(numbers(4, 0)))
    assert reader.progress()
    assert (late.moved, late.is_done) == (4, False)


def test_what_is_in_the_ring_can_be_read_after_the_writer_closed(lanes):
    writer, reader = lanes
    words, heard = numbers(100, 1), torch.zeros(100, dtype=torch.uint8)
    writer.add(_Parcel(words))
    writer.close()
    assert reader.is_closed
    assert not reader.writer_died()
    reader.add(_Parcel(heard))
    assert torch.equal(words, heard)


def test_a_dead_writer_is_told_from_a_slow_one(lanes):
    writer, reader = lanes
    assert not reader.writer_died()
    fcntl.flock(writer._file, fcntl.LOCK_UN)  # what the kernel does when the process ends
    assert reader.writer_died()


def test_without_room_ranks_have_no_shared_channel_and_leave_nothing_behind(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared, "FOLDER", tmp_path)
    monkeypatch.setattr(shared.os, "posix_fallocate", full)
    assert open_shared(None, 0, 2, lambda value: [value, value]) is None
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_may_not_share_memory_makes_no_file_and_tells_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "FOLDER", tmp_path)
    said, answers = [], iter([{0: "x"}, False])

    def everyone(value):
        said.append(value)
        assert list(tmp_path.iterdir()) == []
        return [value, next(answers)]

    monkeypatch.setenv("DISTRIFUSION_SHARED_MEMORY", "0")
    assert open_shared(None, 0, 2, everyone) is None
    assert said == [None, False]


def carries(comm, where_not):
    """Which wire a communicator of our own has, and whether it and its routes carry words."""
    if comm.rank in where_not:
        os.environ["DISTRIFUSION_SHARED_MEMORY"] = "0"
    try:
        part = comm.split([list(range(comm.world - 1, -1, -1))])
    finally:
        os.environ.pop("DISTRIFUSION_SHARED_MEMORY", None)
    peers = [rank for rank in range(part.world) if rank != part.rank]
    route = part.route(Layout(dict.fromkeys(peers, 8), dict.fromkeys(peers, 8)), kind="chunk")
    for words in route.outbox.direct.values():
        words.fill_(part.rank)
    route.launch()
    heard = {peer: words.unique().tolist() for peer, words in route.wait().direct.items()}
    assert heard == {peer: [peer] for peer in peers}
    assert part.all_gather_object(part.rank) == list(range(part.world))
    wire, kind = part.wire, type(route).__name__
    assert part.is_slow == (wire == "gloo")
    part.close()
    return wire, kind


@pytest.mark.parametrize("where_not", [[0, 1, 2], [1]])
def test_one_rank_that_may_not_share_memory_keeps_all_on_gloo(pool, where_not):
    assert pool.run(carries, 3, where_not) == [("gloo", "PlainRoute")] * 3


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="shared memory is for x86")
def test_without_the_switch_ranks_share_memory(pool):
    assert pool.run(carries, 3, []) == [("shared memory", "SharedRoute")] * 3


def test_ranks_that_do_not_see_each_others_files_have_no_shared_channel(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "FOLDER", tmp_path)
    answers = iter([[{1: "x"}, {0: str(tmp_path / "elsewhere")}], [False, True]])
    assert open_shared(None, 0, 2, lambda value: next(answers)) is None
    assert list(tmp_path.iterdir()) == []


def test_without_room_ranks_have_no_shared_route_and_leave_nothing_behind(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared_route, "FOLDER", tmp_path)
    monkeypatch.setattr(shared_route.os, "posix_fallocate", full)
    layout = Layout({1: 8}, {1: 8}, [0, 0])
    assert open_shared_route(layout, 0, lambda value: [value, value], None, None) is None
    assert list(tmp_path.iterdir()) == []


def test_a_peer_at_another_turn_of_a_route_is_told():
    class Heard:
        def __init__(self, into):
            self.into = into

        def wait(self):
            self.into[1].fill_(7)

    route = SharedRoute([None, None], [None, None], [1], lambda sends, recvs: Heard(recvs), lambda: None, 0)
    route.launch()
    with pytest.raises(df.RanksDisagree, match="rank 1 of the group is at turn 7 of a route, not 1"):
        route.wait()


def test_the_longer_a_wait_the_less_often_it_looks_and_never_much_too_late() -> None:
    waited = [10.0**-exponent for exponent in range(-3, 6)][::-1]
    naps = [_nap(seconds) for seconds in waited]
    assert naps == sorted(naps)
    assert naps[0] == 1e-4
    assert naps[-1] == 0.02
    for seconds, nap in zip(waited, naps, strict=True):
        assert nap <= max(1e-4, seconds / 16)
        assert nap <= max(1e-3, seconds / 256)
