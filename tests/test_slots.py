"""Slots: words arrive one step late, unmixed, in few messages, and every rank cuts them into the same chunks."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor

import distrifusion as df
from distrifusion.comm import Comm, Pending
from distrifusion.comm.slots import MAX_CHUNKS, MAX_MESSAGES, Slots

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@dataclass(frozen=True)
class Name:
    """What is said under one name: to everyone, or to the direct neighbours."""

    key: str
    shared: bool
    size: int  # rank r says `size + r` elements where it may differ between ranks
    dtype: torch.dtype

    def words(self, rank: int, step: int, peer: int = 0) -> Tensor:
        """Another pattern for each name, rank, step and receiver."""
        size = self.size + rank if self.shared else self.size
        seed = crc32(f"{self.key} {rank} {step} {peer}".encode())
        numbers = torch.randint(0, 100, (2, size), generator=torch.Generator().manual_seed(seed))
        return (numbers % 2 == 0) if self.dtype == torch.bool else numbers.to(self.dtype)

    def num_bytes(self, rank: int) -> int:
        return self.words(rank, 0).numel() * self.dtype.itemsize


def names(num: int) -> list[Name]:
    """Halos and shared words in turn, of all dtypes, of very different weight, an empty one among them."""
    sizes = [3, 1, 40, 7, 300, 2, 11]
    found = [Name(f"layer.{i}", i % 3 != 0, sizes[i % 7] + i, DTYPES[i % len(DTYPES)]) for i in range(num)]
    return [*found, Name("empty", False, 0, torch.float32)]


def neighbours(comm: Comm) -> list[int]:
    return [peer for peer in (comm.rank - 1, comm.rank + 1) if 0 <= peer < comm.world]


def links(world: int) -> frozenset[tuple[int, int]]:
    return frozenset((a, b) for a in range(world) for b in range(world) if abs(a - b) == 1)


def learn(comm: Comm, slots: Slots, everything: list[Name]) -> None:
    """Keep the words of step 0, as a synchronous step that has heard all of its peers."""
    for name in everything:
        if name.shared:
            parts = [name.words(rank, 0) for rank in range(comm.world)]
            slots.keep_shared(name.key, parts[comm.rank], parts)
        else:
            slots.keep(
                name.key,
                {peer: name.words(comm.rank, 0, peer) for peer in neighbours(comm)},
                {peer: name.words(peer, 0, comm.rank) for peer in neighbours(comm)},
                links=links(comm.world),
                weight=name.size * 2 * name.dtype.itemsize * len(links(comm.world)),
            )


def say(comm: Comm, slots: Slots, name: Name, step: int) -> None:
    if name.shared:
        slots.post_shared(name.key, name.words(comm.rank, step))
    else:
        slots.post(name.key, {peer: name.words(comm.rank, step, peer) for peer in neighbours(comm)})


def expected(comm: Comm, name: Name, step: int) -> dict[int, Tensor]:
    if name.shared:
        return {peer: name.words(peer, step) for peer in range(comm.world) if peer != comm.rank}
    return {peer: name.words(peer, step, comm.rank) for peer in neighbours(comm)}


def assert_equal(found: dict[int, Tensor], wanted: dict[int, Tensor], what: str) -> None:
    assert found.keys() == wanted.keys(), what
    for peer, words in wanted.items():
        assert found[peer].dtype == words.dtype, what
        assert torch.equal(found[peer], words), f"{what} of rank {peer}"


class Instant:
    """A network that fills the receivers at the launch already: the earliest that real ones may, and threads do not."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def swap(self, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor], *, kind: str) -> Pending[None]:
        for tensor in recvs.values():
            tensor.fill_(255)
        pending = self._comm.swap(sends, recvs, kind=kind)
        pending.wait()
        return pending


@pytest.mark.parametrize("network", [Instant, lambda comm: comm], ids=["instant", "late"])
@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("num", [1, 2, 40])
def test_values_arrive_one_step_late_and_unmixed(world: int, num: int, network: Any) -> None:
    def rank(comm: Comm) -> list[int]:
        comm = network(comm)
        everything, slots = names(num), Slots(comm)
        learn(comm, slots, everything)
        messages = []
        for step in range(1, 5):
            comm.meter.clear()
            for name in everything:
                found = slots.read(name.key)
                assert_equal(found, expected(comm, name, step - 1), f"{name.key} in step {step}")
                say(comm, slots, name, step)
                # What is being sent does not touch what was received, also for the name that fills its chunk.
                assert_equal(found, expected(comm, name, step - 1), f"{name.key} after its post in step {step}")
            assert slots.finish()
            slots.depart()
            messages.append(sum(comm.meter.messages.values()))
            assert set(comm.meter.messages) <= {"chunk"}
        slots.drain()
        return messages

    for messages in df.run_ranks(world, rank):
        assert len(set(messages)) == 1
        assert 0 < messages[0] <= MAX_MESSAGES - 1  # and one for the output


@pytest.mark.parametrize("world", [2, 3, 4, 5, 7])
def test_every_rank_cuts_alike_into_few_chunks_of_about_equal_weight(world: int) -> None:
    def rank(comm: Comm) -> tuple[list[int], list[int]]:
        everything, slots = names(60), Slots(comm)
        learn(comm, slots, everything)
        slots.read(everything[0].key)
        cut = [slots._entries[name.key].chunk for name in everything]
        weights = [0] * len(slots._chunks)
        for name in everything:
            weights[slots._entries[name.key].chunk] += slots._entries[name.key].weight
        return cut, weights

    cuts = df.run_ranks(world, rank)
    assert all(cut == cuts[0] for cut in cuts)
    cut, weights = cuts[0]
    assert cut == sorted(cut)  # in the order in which they are written, or a chunk would leave late
    assert len(weights) == (MAX_CHUNKS if world == 2 else 2)
    assert max(weights) <= 1.5 * sum(weights) / len(weights)


def test_two_ranks_say_all_of_it_in_one_message_per_chunk() -> None:
    def rank(comm: Comm) -> None:
        everything, slots = names(40), Slots(comm)
        learn(comm, slots, everything)
        for name in everything:
            slots.read(name.key)
            say(comm, slots, name, 1)
        assert slots.finish()
        slots.depart()
        slots.drain()
        assert dict(comm.meter.messages) == {"chunk": MAX_CHUNKS}
        assert dict(comm.meter.links) == {("chunk", 1 - comm.rank): MAX_CHUNKS}  # so none was a collective

    df.run_ranks(2, rank)


@pytest.mark.parametrize("world", [2, 3])
def test_slots_hold_one_steps_bytes_and_keep_holding_them(world: int) -> None:
    def rank(comm: Comm) -> None:
        everything, slots = names(20), Slots(comm)
        learn(comm, slots, everything)
        one_step = sum(
            -(-name.num_bytes(comm.rank) // 16) * 16 * (1 if name.shared else len(neighbours(comm)))
            for name in everything
        )
        for step in range(1, 4):
            for name in everything:
                slots.read(name.key)
                say(comm, slots, name, step)
            slots.finish()
            slots.depart()
            assert slots.num_bytes == one_step
        slots.drain()

    df.run_ranks(world, rank)


def memory(comm: Comm, wire: str) -> tuple[int, int]:
    """Bytes that the slots hold on this rank, in every displaced step alike, and those that it sends in one."""
    if wire == "gloo":
        os.environ["DISTRIFUSION_SHARED_MEMORY"] = "0"
    try:
        comm = comm.split([list(range(comm.world))])
    finally:
        os.environ.pop("DISTRIFUSION_SHARED_MEMORY", None)
    assert comm.wire == wire
    slots = Slots(comm)
    everything = [Name(f"{i}", i % 2 == 0, 30_000 + 1_000 * i, torch.float32) for i in range(8)]
    learn(comm, slots, everything)
    assert slots.memory == 0
    held = set()
    for step in range(1, 4):
        comm.meter.clear()
        for name in everything:
            slots.read(name.key)
            say(comm, slots, name, step)
        slots.finish()
        slots.depart()
        held.add(slots.memory)
    slots.drain()
    comm.close()
    assert len(held) == 1
    return held.pop(), comm.meter.bytes["chunk"]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("wire", ["threads", "gloo", "shared memory"])
def test_slots_hold_no_more_than_twice_what_a_step_sends(request: Any, world: int, wire: str) -> None:
    """All that is sent and all that is received, once each. Over all ranks, since who is at the border sends less."""
    if wire == "threads":
        found = df.run_ranks(world, lambda comm: memory(comm, wire))
    elif wire == "shared memory" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("shared memory is for x86")
    else:
        found = request.getfixturevalue("pool").run(memory, world, wire)
    held, sent = map(sum, zip(*found, strict=True))
    pages = 2 * 4096 * 7 * world if wire == "shared memory" else 0
    assert sent <= held <= 2 * sent + pages


@pytest.mark.parametrize("world", [2, 3])
def test_send_and_receive_memory_are_distinct(world: int) -> None:
    def rank(comm: Comm) -> None:
        everything, slots = names(20), Slots(comm)
        learn(comm, slots, everything)
        received: set[int] = set()
        for step in range(1, 3):
            for name in everything:
                received |= {
                    words.untyped_storage().data_ptr() for words in slots.read(name.key).values() if words.numel()
                }
                say(comm, slots, name, step)
            slots.finish()
            slots.depart()
        slots.drain()
        sent = {
            buffer.untyped_storage().data_ptr()
            for chunk in slots._chunks
            for buffer in chunk._route.outbox.direct.values()
        }
        assert sent
        assert not sent & received

    df.run_ranks(world, rank)


def test_what_was_posted_may_be_overwritten_at_once() -> None:
    name = Name("halo", True, 5, torch.float32)

    def rank(comm: Comm) -> None:
        slots = Slots(comm)
        learn(comm, slots, [name])
        for step in (1, 2):
            assert_equal(slots.read("halo"), expected(comm, name, step - 1), f"step {step}")
            words = name.words(comm.rank, step)
            slots.post_shared("halo", words)
            words.zero_()
            assert slots.finish()
            slots.depart()
        slots.drain()
        assert_equal(slots.read("halo"), expected(comm, name, 2), "after draining")

    df.run_ranks(3, rank)


@pytest.mark.parametrize("world", [2, 4])
def test_a_step_that_left_out_names_says_so_and_drains(world: int) -> None:
    def rank(comm: Comm) -> None:
        everything, slots = names(30), Slots(comm)
        learn(comm, slots, everything)
        for name in everything:
            slots.read(name.key)
            say(comm, slots, name, 1)
        assert slots.finish()
        slots.depart()
        for name in everything[:-5]:  # the model skips its last layers
            slots.read(name.key)
            say(comm, slots, name, 2)
        assert not slots.finish()
        slots.drain()
        comm.barrier()  # the communicator is left in order: nothing of the slots is still expected

    df.run_ranks(world, rank, timeout=10)


def test_unknown_names_are_not_contained() -> None:
    def rank(comm: Comm) -> None:
        slots = Slots(comm)
        learn(comm, slots, names(2))
        assert "layer.0" in slots
        assert "layer.9" not in slots

    df.run_ranks(2, rank)


def test_draining_before_the_first_displaced_step_does_nothing() -> None:
    def rank(comm: Comm) -> int:
        slots = Slots(comm)
        slots.drain()
        learn(comm, slots, names(3))
        slots.drain()
        return sum(comm.meter.messages.values()) + slots.num_bytes

    assert df.run_ranks(2, rank) == [0, 0]


@pytest.mark.parametrize("world", [2, 3])
def test_the_last_chunk_stays_until_it_is_let_go(world: int) -> None:
    """What a step must wait for leaves before it. A step that lets nothing go does so at its next first read."""

    def rank(comm: Comm) -> None:
        everything, slots = names(40), Slots(comm)
        learn(comm, slots, everything)
        counts = []
        for lets_go in (True, False):
            for name in everything:
                slots.read(name.key)
                say(comm, slots, name, 1)
            assert slots.finish()
            counts.append(sum(comm.meter.messages.values()))
            if lets_go:
                slots.depart()
            else:
                slots.read(everything[0].key)
            counts.append(sum(comm.meter.messages.values()))
        before, after, before_next, after_next = counts
        last = after - before
        assert last > 0
        assert (before_next, after_next) == (2 * after - last, 2 * after)
        slots.drain()

    df.run_ranks(world, rank)
