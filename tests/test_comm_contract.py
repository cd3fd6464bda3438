"""The contract of a communicator (`distrifusion.comm.protocol`), kept by thread ranks and by Gloo processes alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distrifusion.comm import Comm, Pending
from distrifusion.comm.protocol import EVERYONE
from distrifusion.comm.route import Layout
from distrifusion.config import ParallelConfig
from distrifusion.errors import ConfigError
from distrifusion.mesh import Mesh

pytestmark = pytest.mark.usefixtures("all_at_once")

WORLDS = (1, 2, 3, 5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8)


def numbers(*words: int, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values that depend on every word, so that a mix-up of ranks, rounds or places shows."""
    seed = 0
    for word in words:
        seed = seed * 101 + word + 1
    values = torch.randint(0, 120, (size,), generator=torch.Generator().manual_seed(seed))
    return (values % 2 == 0) if dtype == torch.bool else values.to(dtype)


def line_swap(comm: Comm, round_: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[Pending[None], Any]:
    """Launch a swap with both neighbours on a line; also what arrives and what should."""
    peers = [peer for peer in (comm.rank - 1, comm.rank + 1) if 0 <= peer < comm.world]
    sends = {peer: numbers(round_, comm.rank, peer, size=size, dtype=dtype) for peer in peers}
    recvs = {peer: torch.zeros(size, dtype=dtype) for peer in peers}
    wanted = {peer: numbers(round_, peer, comm.rank, size=size, dtype=dtype) for peer in peers}
    return comm.swap(sends, recvs, kind="halo"), (recvs, wanted)


def assert_same(got: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        got, wanted = [got[key] for key in wanted], list(wanted.values())
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


# --- what it says of itself


def says_the_same_of_its_wire(comm: Comm) -> None:
    assert comm.all_gather_object((comm.wire, comm.is_slow)) == [(comm.wire, comm.is_slow)] * comm.world
    part = comm.split([[rank] for rank in range(comm.world)])
    assert not part.is_slow  # alone


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_agree_on_what_their_wire_is(ranks, world):
    ranks.run(world, says_the_same_of_its_wire)


# --- swap


def swaps_with_neighbours(comm: Comm) -> None:
    for dtype in DTYPES:
        pending, (got, wanted) = line_swap(comm, 0, 7, dtype)
        assert pending.wait() is None
        assert_same(got, wanted)


@pytest.mark.parametrize("world", WORLDS)
def test_swap_with_neighbours_in_every_dtype(ranks, world):
    ranks.run(world, swaps_with_neighbours)


def swaps_shapes(comm: Comm) -> None:
    peer = 1 - comm.rank
    got = torch.zeros(2, 3, 1, 5)
    comm.swap({peer: numbers(comm.rank, size=30).view(3, 10)}, {peer: got}, kind="halo").wait()
    assert torch.equal(got.flatten(), numbers(peer, size=30))
    # Bytes count, not dtypes: a receiver may look at them otherwise.
    raw = torch.zeros(8, dtype=torch.uint8)
    comm.swap({peer: torch.tensor([1.5, float(comm.rank)])}, {peer: raw}, kind="halo").wait()
    assert raw.view(torch.float32).tolist() == [1.5, float(peer)]
    scalar = torch.zeros(())
    comm.swap({peer: torch.tensor(3.0 + comm.rank)}, {peer: scalar}, kind="halo").wait()
    assert scalar.item() == 3.0 + peer


def test_swap_carries_bytes_of_any_shape(ranks):
    ranks.run(2, swaps_shapes)


def swaps_of_some(comm: Comm) -> tuple[int, int]:
    """Rank 0 sends to 2 and gets nothing; rank 1 has nothing to say, and rank 3 only empty tensors."""
    if comm.rank == 0:
        comm.swap({2: numbers(0, size=5)}, {}, kind="halo").wait()
    elif comm.rank == 2:
        got, empty = torch.zeros(5), torch.zeros(0)
        comm.swap({3: empty}, {0: got, 3: torch.zeros(0)}, kind="halo").wait()
        assert torch.equal(got, numbers(0, size=5))
    elif comm.rank == 3:
        comm.swap({2: torch.zeros(0)}, {2: torch.zeros(0)}, kind="halo").wait()
    # Pairs count on their own: the next swap of all is not disturbed by who was missing.
    pending, (got, wanted) = line_swap(comm, 1, 3)
    pending.wait()
    assert_same(got, wanted)
    return comm.meter.messages["halo"], comm.meter.bytes["halo"]


def test_swap_in_which_some_take_no_part(ranks):
    assert ranks.run(5, swaps_of_some) == [(2, 32), (2, 24), (2, 24), (2, 24), (1, 12)]


def sends_a_snapshot(comm: Comm) -> None:
    """After its own wait a rank may overwrite what it sent, however late the peer reads."""
    own, got = numbers(comm.rank, size=1000), torch.zeros(1000)
    pending = comm.swap({1 - comm.rank: own}, {1 - comm.rank: got}, kind="halo")
    gathered = comm.all_gather(own, [1000, 1000], kind="context")
    if comm.rank == 0:
        pending.wait()
        gathered.wait()
        own.fill_(-1)
    comm.barrier()
    pending.wait()
    assert torch.equal(got, numbers(1 - comm.rank, size=1000))
    assert_same(gathered.wait(), [numbers(0, size=1000), numbers(1, size=1000)])
    gathered.wait()[0].fill_(comm.rank)  # a result is this rank's own memory
    comm.barrier()
    assert gathered.wait()[0].unique().tolist() == [comm.rank]


def test_sent_memory_is_free_after_wait(ranks):
    ranks.run(2, sends_a_snapshot)


def moves_4_megabytes(comm: Comm) -> None:
    size = 1 << 20
    pending, (got, wanted) = line_swap(comm, 0, size)
    gathered = comm.all_gather(numbers(comm.rank, size=size), [size] * comm.world, kind="context")
    pending.wait()
    assert_same(got, wanted)
    assert_same(gathered.wait(), [numbers(rank, size=size) for rank in range(comm.world)])


def test_large_tensors(ranks):
    ranks.run(3, moves_4_megabytes)


# --- all_gather


def gathers(comm: Comm, sizes: list[int]) -> None:
    for dtype in DTYPES:
        own = numbers(comm.rank, size=sizes[comm.rank], dtype=dtype)
        result = comm.all_gather(own, sizes, kind="context").wait()
        assert_same(result, [numbers(rank, size=size, dtype=dtype) for rank, size in enumerate(sizes)])
        assert torch.equal(own, numbers(comm.rank, size=sizes[comm.rank], dtype=dtype))
        into = torch.zeros(comm.world, max(sizes), dtype=dtype)
        rows = comm.all_gather(own, sizes, kind="context", into=into).wait()
        assert_same(rows, result)
        if comm.world > 1 and any(sizes):  # else nothing travels
            assert sorted(row.data_ptr() for row in rows if row.numel()) == sorted(
                into[rank].data_ptr() for rank, size in enumerate(sizes) if size
            )


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("sizes", ["equal", "uneven", "some zero", "all zero"])
def test_all_gather_of_any_sizes(ranks, world, sizes):
    table = {
        "equal": [4] * world,
        "uneven": [3 * rank + 1 for rank in range(world)],
        "some zero": [(rank % 2) * 5 for rank in range(world)],
        "all zero": [0] * world,
    }
    ranks.run(world, gathers, table[sizes])


# --- all_reduce


def sums(comm: Comm, count: int) -> list[Any]:
    """Of every third number of a map that does not lie in memory in its order."""
    own = numbers(comm.rank, size=6 * count).view(count, 3, 2).transpose(0, 2)[:, 1] / 7
    before = own.clone()
    total = comm.all_reduce(own, kind="sum")
    wanted = sum(
        numbers(rank, size=6 * count).view(count, 3, 2).transpose(0, 2)[:, 1] / 7 for rank in range(comm.world)
    )
    assert torch.equal(own, before)
    assert total.data_ptr() != own.data_ptr()
    assert total.shape == own.shape
    assert torch.allclose(total, wanted, rtol=1e-6)
    counted = dict(comm.meter.messages), dict(comm.meter.bytes)
    many = torch.full((3,), 256.0 if comm.rank == 0 else 1.0, dtype=torch.bfloat16)  # 256 + 1 is 256 in its bits
    rounded = torch.full((3,), 255.0 + comm.world).to(torch.bfloat16)
    assert torch.equal(comm.all_reduce(many, kind="sum"), rounded)
    return [total.flatten().tolist(), counted]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("count", [1, 4, 7])
def test_all_reduce_gives_all_ranks_the_same_sum(ranks, world, count):
    ran = ranks.run(world, sums, count)
    assert all(total == ran[0][0] for total, _ in ran)
    messages, num_bytes = (sum(counts[i].get("sum", 0) for _, counts in ran) for i in (0, 1))
    if world == 2:
        assert (messages, num_bytes) == (2, 2 * 4 * 2 * count)
    elif world > 2 and 2 * count % world == 0:  # else pieces are padded
        assert (messages, num_bytes) == (world * world, 2 * (world - 1) * 4 * 2 * count)


# --- many under way


def many_in_flight(comm: Comm, order: str) -> None:
    launched: list[tuple[Pending[Any], Any]] = []
    sizes = [2 + rank for rank in range(comm.world)]
    for round_ in range(8):
        if round_ % 2:
            own = numbers(round_, comm.rank, size=sizes[comm.rank])
            wanted = [numbers(round_, rank, size=size) for rank, size in enumerate(sizes)]
            launched.append((comm.all_gather(own, sizes, kind="context"), wanted))
        else:  # of different sizes, so that a pair out of order cannot go unseen
            launched.append(line_swap(comm, round_, 10 + round_))
    indices = list(range(8))
    if order == "backwards":
        indices.reverse()
    elif order == "each its own":
        indices = torch.randperm(8, generator=torch.Generator().manual_seed(comm.rank)).tolist()
    for index in indices:
        pending, expected = launched[index]
        result = pending.wait()
        assert pending.wait() is result
        if index % 2:
            assert_same(result, expected)
        else:
            assert_same(*expected)
    assert comm.meter.waited > 0


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("order", ["in order", "backwards", "each its own"])
def test_many_in_flight_waited_in_any_order_and_twice(ranks, world, order):
    ranks.run(world, many_in_flight, order)


# --- routes


def routes(comm: Comm, shared: list[int]) -> None:
    """A turn's words are what was last written, and stay while the next turn's are written; two routes do not mix."""
    to = {peer: 1000 + 10 * comm.rank + peer for peer in range(comm.world) if peer == comm.rank + 1}  # one way
    from_ = {peer: 1000 + 10 * peer + comm.rank for peer in range(comm.world) if peer == comm.rank - 1}
    layouts = [Layout(to, from_, shared), Layout({}, {}, [3] * comm.world)]
    opened = [comm.route(layout, kind="chunk") for layout in layouts]
    comm.meter.clear()
    inboxes: list[Any] = [None] * len(layouts)
    for turn in range(5):
        for place, (layout, route) in enumerate(zip(layouts, opened, strict=True)):
            for peer, words in route.outbox.direct.items():
                words.copy_(numbers(turn, place, comm.rank, peer, size=words.numel(), dtype=torch.uint8))
            if turn:  # what came before was not touched by the writing
                check_inbox(comm, inboxes[place], layout, turn - 1, place)
            with torch.inference_mode(turn % 2 == 0):
                route.launch()
        for place, (layout, route) in enumerate(zip(layouts, opened, strict=True)):
            inboxes[place] = route.wait()
            check_inbox(comm, inboxes[place], layout, turn, place)
            assert route.wait() is not None  # waiting again changes nothing
    messages = len(to) + 1 + any(shared)
    num_bytes = sum(to.values()) + (3 + max(shared)) * (comm.world - 1)
    assert comm.meter.messages == {"chunk": 5 * messages}
    assert comm.meter.bytes == {"chunk": 5 * num_bytes}
    # What is sent and what is received, once; through shared memory what is sent, twice, in messages of whole pages.
    held, heard = sum(route.num_bytes for route in opened), sum(from_.values())
    rows = (3 + max(shared)) * (1 + comm.world)
    if type(opened[0]).__name__ == "SharedRoute":
        own = sum(to.values()) + 3 + shared[comm.rank]
        assert 2 * own <= held <= 2 * own + 2 * 4096 * (len(to) + 3)
    else:
        assert held == sum(to.values()) + heard + rows


def check_inbox(comm: Comm, box: Any, layout: Layout, turn: int, place: int) -> None:
    wanted = {
        peer: numbers(turn, place, peer, comm.rank, size=size, dtype=torch.uint8) for peer, size in layout.recvs.items()
    }
    assert_same(box.direct, wanted)
    for peer, size in enumerate(layout.shared):
        if peer != comm.rank and size:
            assert torch.equal(box.shared[peer], numbers(turn, place, peer, EVERYONE, size=size, dtype=torch.uint8))


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("own", ["nothing", "unequal"])
def test_routes_carry_the_same_messages_again_and_again(ranks, world, own):
    ranks.run(world, routes, [0] * world if own == "nothing" else [100 * rank for rank in range(world)])


# --- objects, broadcast, barrier


def objects(comm: Comm) -> None:
    value = {"rank": comm.rank, "text": "x" * 1000 * comm.rank, "none": None}
    gathered = comm.all_gather_object(value)
    assert [each["rank"] for each in gathered] == list(range(comm.world))
    assert [len(each["text"]) for each in gathered] == [1000 * rank for rank in range(comm.world)]
    root = comm.world - 1
    shared = comm.broadcast_object([comm.rank, "prompt"], root)
    assert shared == [root, "prompt"]
    shared.append(comm.rank)  # one's own copy
    comm.barrier()
    assert shared == [root, "prompt", comm.rank]
    assert comm.broadcast_object("first" if comm.rank == 0 else None) == "first"
    for dtype in DTYPES:
        tensor = numbers(comm.rank, size=6, dtype=dtype).view(2, 3)
        comm.broadcast(tensor, root)
        assert torch.equal(tensor.flatten(), numbers(root, size=6, dtype=dtype))
    comm.broadcast(torch.zeros(0), root)


@pytest.mark.parametrize("world", WORLDS)
def test_objects_and_broadcast(ranks, world):
    ranks.run(world, objects)


# --- split


def splits(comm: Comm, groups: list[list[int]]) -> None:
    own_group = next(group for group in groups if comm.rank in group)
    part = comm.split(groups)
    assert (part.rank, part.world) == (own_group.index(comm.rank), len(own_group))
    assert part.device == comm.device
    assert part.meter is comm.meter
    assert part.all_gather_object(comm.rank) == own_group
    pending, (got, wanted) = line_swap(part, own_group[0], 4)
    whole = comm.all_gather(torch.tensor([comm.rank]), [1] * comm.world, kind="control")  # does not get between
    pending.wait()
    assert_same(got, wanted)
    assert torch.cat(whole.wait()).tolist() == list(range(comm.world))
    shared = torch.tensor([comm.rank])
    part.broadcast(shared, part.world - 1)
    assert shared.item() == own_group[-1]
    part.close()
    part.close()
    assert comm.all_gather_object(comm.rank) == list(range(comm.world))


@pytest.mark.parametrize(
    "groups",
    [[[0]], [[0, 1]], [[1, 0]], [[0], [1], [2]], [[0, 2], [1]], [[4, 0, 2], [3, 1]], [[0], [1, 2, 3, 4]]],
    ids=str,
)
def test_split(ranks, groups):
    ranks.run(sum(map(len, groups)), splits, groups)


def product_mesh(comm: Comm, mesh: Mesh) -> None:
    parts = {axis: comm.split(mesh.groups(axis)) for axis in ("cfg", "patch")}
    pending = {axis: line_swap(part, index, 5) for index, (axis, part) in enumerate(parts.items())}
    for axis, part in parts.items():
        assert part.rank == mesh.coordinate(comm.rank, axis)
        assert part.all_gather_object(comm.rank) == next(g for g in mesh.groups(axis) if comm.rank in g)
    for waiting, (got, wanted) in reversed(pending.values()):
        waiting.wait()
        assert_same(got, wanted)
    again = parts["patch"].split([[rank] for rank in range(parts["patch"].world)])
    assert (again.rank, again.world, again.all_gather_object("alone")) == (0, 1, ["alone"])
    for part in parts.values():
        part.close()


@pytest.mark.parametrize("patch", [2, 3])
def test_split_into_a_product_mesh(ranks, patch):
    ranks.run(2 * patch, product_mesh, Mesh.fit(ParallelConfig(cfg=2, patch=patch), 2 * patch))


def refuses_groups(comm: Comm) -> list[str]:
    said = []
    for groups in ([[0, 1]], [[0, 1], [1, 2]], [[0], [1], [2], [3]]):
        with pytest.raises(ConfigError) as caught:
            comm.split(groups)
        said.append(str(caught.value))
    return said


def test_split_refuses_what_is_no_partition(ranks):
    for said in ranks.run(3, refuses_groups):
        assert said[0] == "groups [[0, 1]] must hold each rank of 0..2 once"


# --- the meter


def counts(comm: Comm) -> dict[str, Any]:
    pending, _ = line_swap(comm, 0, 10, torch.float16)
    pending.wait()
    comm.all_gather(torch.zeros(comm.rank + 1), [rank + 1 for rank in range(comm.world)], kind="context").wait()
    comm.all_gather(torch.zeros(0), [0] * comm.world, kind="moments").wait()
    totals = comm.meter.totals()
    comm.broadcast(torch.zeros(5), 0)
    control = comm.meter.messages["control"], comm.meter.bytes["control"]
    comm.barrier()
    assert comm.meter.totals() == totals
    meter = comm.meter
    return {
        "messages": dict(meter.messages),
        "bytes": dict(meter.bytes),
        "links": dict(meter.links),
        "control": control,
    }


def test_meter_counts_what_leaves_the_rank(ranks):
    # 20 bytes to each neighbour; 3 numbers of 4 bytes (padded) to 2 peers; 20 to 2 by the root; 8 to 2 in a barrier.
    first, middle, last = ranks.run(3, counts)
    assert first["messages"] == {"halo": 1, "context": 1, "control": 2}
    assert first["bytes"] == {"halo": 20, "context": 24, "control": 2 * 20 + 2 * 8}
    assert first["links"] == {("halo", 1): 1}
    assert first["control"] == (1, 40)
    assert middle["messages"] == {"halo": 2, "context": 1, "control": 1}
    assert middle["bytes"] == {"halo": 40, "context": 24, "control": 16}
    assert middle["links"] == {("halo", 0): 1, ("halo", 2): 1}
    assert middle["control"] == (0, 0)
    assert last["links"] == {("halo", 1): 1}


def test_meter_of_a_world_of_one_stays_empty(ranks):
    (alone,) = ranks.run(1, counts)
    assert alone == {"messages": {}, "bytes": {}, "links": {}, "control": (0, 0)}


# --- one contract


def described(comm: Comm) -> tuple[Any, ...]:
    return comm.rank, comm.world, str(comm.device), comm.timeout


def test_what_a_communicator_says_of_itself(ranks):
    assert ranks.run(3, described) == [(rank, 3, "cpu", 25.0) for rank in range(3)]
