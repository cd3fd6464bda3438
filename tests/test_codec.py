"""Codecs: known sizes and errors, error feedback that converges, and frames that are refused if they do not fit."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

import distrifusion as df
from distrifusion.comm import Comm
from distrifusion.comm.codec import codecs_for, pack, unpack
from distrifusion.comm.residual import HEADER, Receiver, Sender, Wire, frame_bytes
from distrifusion.comm.slots import Slots
from distrifusion.forms import CODECS, CODED_SEAMS

BITS = {"fp16": 16, "bf16": 16, "int8": 8, "int4": 4, "int2": 2, "1bit": 1}
SHAPES = [(2, 33, 20), (2, 7, 1, 13), (3, 5, 9, 1), (1, 1, 64), (1,), (7,), (2, 64, 256), (2, 0, 20), (0,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def codec_of(name: str) -> Any:
    return codecs_for({"context": name})["context"]


def noise(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values whose columns differ in magnitude, as channels of keys do."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return (values * (2 * torch.rand(shape[-1], generator=generator)).exp()).to(dtype)


def pair(name: str, first: Tensor) -> tuple[Sender, Receiver]:
    return Sender(codec_of(name), "context", first), Receiver(codec_of(name), "context", first, peer=1)


def send(sender: Sender, receiver: Receiver, value: Tensor) -> Tensor:
    frame = torch.full((sender.num_bytes,), 85, dtype=torch.uint8)
    sender.write(value, frame)
    return receiver.read(frame)


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def test_every_name_of_the_configuration_has_a_codec() -> None:
    assert list(BITS) == list(CODECS)
    for name in CODECS:
        codecs = codecs_for(df.ParallelConfig(codec=name).codecs)
        assert list(codecs) == list(CODED_SEAMS)
        assert {codecs[kind].name for kind in ("context", "halo")} == {name}
        assert BITS[codecs["output"].name] == max(BITS[name], 8)


# --- sizes ---


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_are_known_before_the_values(name: str, shape: tuple[int, ...]) -> None:
    codec = codec_of(name)
    for seed in range(2):
        payload = codec.encode(noise(shape, seed))
        assert payload.dtype == torch.uint8
        assert payload.shape == (codec.num_bytes(shape),)
        assert codec.decode(payload, shape).shape == shape
    if not prod(shape):
        assert codec.num_bytes(shape) == frame_bytes(codec, shape) == 0
    else:
        assert frame_bytes(codec, shape) % 16 == 0
        assert HEADER <= frame_bytes(codec, shape) - codec.num_bytes(shape) < HEADER + 16


@pytest.mark.parametrize("name", CODECS)
def test_the_layout_in_memory_does_not_matter(name: str) -> None:
    """Halos of channels-last activations come in theirs."""
    codec, last = codec_of(name), noise((1, 3, 8, 6)).permute(0, 3, 1, 2)  # [1, 6, 3, 8]
    for part in (last, last[:, :, :1]):  # the latter is a matrix as it lies, its columns side by side
        assert torch.equal(codec.encode(part), codec.encode(part.contiguous()))


@pytest.mark.parametrize("name", CODECS)
def test_bytes_by_hand(name: str) -> None:
    """500 tokens x 41 channels; a factor for each token and each channel where bits are fewer than 16."""
    factors = 2 * 250 + 41
    scales = {16: 0, 8: 2 * factors, 4: 2 * factors, 2: 2 + factors, 1: 2 + factors}[BITS[name]]
    assert codec_of(name).num_bytes((2, 250, 41)) == scales + -(-2 * 250 * 41 * BITS[name] // 8)


def test_scales_are_cut_where_they_are_fewest() -> None:
    """A column of a picture has width 1: one scale per element would be no saving."""
    codec = codec_of("1bit")
    assert codec.num_bytes((2, 64, 32, 1)) == 2 + (2 * 64 + 32) + 2 * 64 * 32 // 8
    assert codec.num_bytes((2, 64, 1, 32)) == codec.num_bytes((2, 64, 32, 1))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("num", [1, 3, 8, 9, 1000, 1023])
def test_packing_is_undone_by_unpacking(bits: int, num: int) -> None:
    codes = torch.randint(0, 1 << bits, (num,), generator=torch.Generator().manual_seed(num)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.numel() == -(-num * bits // 8)
    assert torch.equal(unpack(packed, bits, num), codes)


# --- errors of one round trip ---


@pytest.mark.parametrize(("name", "top"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("shape", SHAPES[:7])
def test_uniform_codecs_are_off_by_half_a_level_at_most(name: str, top: int, shape: tuple[int, ...]) -> None:
    codec, values = codec_of(name), noise(shape)
    decoded = codec.decode(codec.encode(values), shape)
    rows, cols = min(((prod(shape[:i]), prod(shape[i:])) for i in range(len(shape) + 1)), key=sum)
    # The scale of row and column is at most the column's largest value, rounded up twice by less than 2 %.
    bound = 0.5 / top * 1.04 * values.view(rows, cols).abs().amax(0)
    assert ((decoded - values).view(rows, cols).abs() <= bound).all()


@pytest.mark.parametrize(("name", "most"), [("fp16", 3e-4), ("bf16", 3e-3), ("int2", 0.37), ("1bit", 0.62)])
def test_error_of_normal_values(name: str, most: float) -> None:
    """1 bit: sqrt(1 - 2/pi) = 0.603; 2 bits: sqrt(0.1175) = 0.343 for the best levels (Max 1960)."""
    codec, values = codec_of(name), noise((2, 64, 256))
    found = error(codec.decode(codec.encode(values), values.shape), values)
    assert 0.4 * most < found <= most


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("scale", [0.0, 1e-34, 1e-20, 1e-3, 1e4, 1e20])
def test_any_magnitude_stays_finite_and_no_larger(name: str, scale: float) -> None:
    codec, values = codec_of(name), noise((4, 8, 6)) * scale
    values[1] = 0
    values[:, :, 2] *= 1e-12
    decoded = codec.decode(codec.encode(values), values.shape).float()
    assert torch.isfinite(decoded).all()
    assert (decoded - values).norm() <= values.norm()  # so repeated residuals never grow
    if not scale:
        assert not decoded.any()


# --- error feedback ---


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", [(2, 33, 20), (2, 7, 1, 13), (3, 5, 9, 1)])
def test_a_held_value_arrives_in_the_end(name: str, shape: tuple[int, ...]) -> None:
    value = noise(shape, 1)
    sender, receiver = pair(name, noise(shape))
    errors = []
    for _ in range(50):
        received = send(sender, receiver, value)
        assert torch.equal(received, sender.base)  # both sides know the same
        errors.append(error(received, value))
    assert all(later <= earlier for earlier, later in pairwise(errors) if earlier > 1e-6)
    assert errors[-1] <= (1e-3 if name == "1bit" else 1e-5)


@pytest.mark.parametrize("name", CODECS)
def test_without_feedback_the_error_would_stay(name: str) -> None:
    """That the sender remembers what the receiver has is what the test above is about."""
    codec, value = codec_of(name), noise((2, 33, 20), 1)
    once = error(codec.decode(codec.encode(value), value.shape), value)
    sender, receiver = pair(name, torch.zeros_like(value))
    for _ in range(5):
        received = send(sender, receiver, value)
    assert error(received, value) < once / 5


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_base_has_the_dtype_of_the_values(name: str, dtype: torch.dtype) -> None:
    first, value = noise((2, 9, 12), 0, dtype), noise((2, 9, 12), 1, dtype)
    sender, receiver = pair(name, first)
    assert sender.num_bytes == frame_bytes(codec_of(name), value.shape)
    for _ in range(60):
        received = send(sender, receiver, value)
        assert received.dtype == dtype
        assert torch.equal(received, sender.base)
    # To about a unit in the last place of the dtype; what travels is float32 at best.
    assert error(received, value) <= max(2 * torch.finfo(dtype).eps, 1e-3 if name == "1bit" else 1e-6)


@pytest.mark.parametrize(
    ("name", "most"), [("fp16", 0.001), ("bf16", 0.005), ("int8", 0.01), ("int4", 0.15), ("int2", 1.5), ("1bit", 5)]
)
def test_values_that_drift_are_followed(name: str, most: float) -> None:
    """The lag in steps of the drift: sent whole, a value would be 0 steps behind; without feedback it falls behind."""
    first, drift = noise((2, 64, 32)), 0.02 * noise((2, 64, 32), 1)
    sender, receiver = pair(name, first)
    for step in range(1, 40):
        received = send(sender, receiver, first + step * drift)
    assert float((received - first - step * drift).norm() / drift.norm()) < most


def test_an_empty_value_says_nothing() -> None:
    sender, receiver = pair("int8", torch.zeros(2, 0, 5))
    assert sender.num_bytes == 0
    assert send(sender, receiver, torch.zeros(2, 0, 5)).shape == (2, 0, 5)


def test_bases_made_in_inference_mode_serve_outside_of_it() -> None:
    with torch.inference_mode():
        value = noise((2, 9, 12))
        sender, receiver = pair("int4", value)
        send(sender, receiver, value + 1)
    send(sender, receiver, noise((2, 9, 12), 2))
    with torch.inference_mode():
        assert torch.equal(send(sender, receiver, value), sender.base)


# --- frames that do not fit ---


def frames(name: str, num: int) -> tuple[list[Tensor], Receiver]:
    sender, receiver = pair(name, noise((2, 9, 12)))
    found = []
    for step in range(num):
        found.append(torch.empty(sender.num_bytes, dtype=torch.uint8))
        sender.write(noise((2, 9, 12), step + 1), found[-1])
    return found, receiver


@pytest.mark.parametrize("name", CODECS)
def test_a_frame_of_another_turn_is_refused(name: str) -> None:
    (first, second, third), receiver = frames(name, 3)
    receiver.read(first)
    before = receiver.base.clone()
    message = rf"context: the {name} frame of rank 1 has turn 3, and turn 2 is due"
    with pytest.raises(df.RanksDisagree, match=message):
        receiver.read(third)
    assert torch.equal(receiver.base, before)  # it did not become part of the picture
    del second


def test_a_frame_that_comes_twice_is_refused() -> None:
    (first, _), receiver = frames("int8", 2)
    receiver.read(first)
    with pytest.raises(df.RanksDisagree, match="has turn 1, and turn 2 is due"):
        receiver.read(first)


@pytest.mark.parametrize("name", CODECS)
def test_a_frame_of_the_wrong_size_is_refused(name: str) -> None:
    (frame,), receiver = frames(name, 1)
    before = receiver.base.clone()
    size = frame.numel()
    for wrong in (frame[:-16], torch.cat([frame, frame[:16]])):
        with pytest.raises(df.RanksDisagree, match=rf"has {wrong.numel()} bytes, and {size} is due"):
            receiver.read(wrong)
    frame[4:8].view(torch.int32).add_(32)
    with pytest.raises(df.RanksDisagree, match=rf"has bytes {size + 32}, and bytes {size} is due"):
        receiver.read(frame)
    assert torch.equal(receiver.base, before)


@pytest.mark.parametrize("name", CODECS)
def test_any_flipped_bit_is_noticed(name: str) -> None:
    (frame,), _ = frames(name, 1)
    for position in range(0, frame.numel(), 7):
        broken = frame.clone()
        broken[position] ^= 16
        _, receiver = frames(name, 0)
        before = receiver.base.clone()
        with pytest.raises(df.RanksDisagree, match="is due"):
            receiver.read(broken)
        assert torch.equal(receiver.base, before)


def test_a_frame_of_another_name_shape_dtype_or_codec_is_refused() -> None:
    base = noise((2, 9, 12))
    others = [
        Sender(codec_of("int8"), "other", base),
        Sender(codec_of("int8"), "context", base.view(2, 12, 9)),
        Sender(codec_of("int8"), "context", base.half()),
    ]
    for sender in others:
        receiver = Receiver(codec_of("int8"), "context", base, 1)
        frame = torch.empty(sender.num_bytes, dtype=torch.uint8)
        sender.write(sender.base + 1, frame)
        with pytest.raises(df.RanksDisagree, match="name, shape and codec"):
            receiver.read(frame)


class Corrupting:
    """A network that changes one byte of every large message after the first ``num`` ones."""

    def __init__(self, comm: Comm, num: int) -> None:
        self._comm, self._num = comm, num

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def swap(self, sends: Any, recvs: Any, *, kind: str) -> Any:
        self._num -= 1
        if self._num < 0:
            sends = {peer: words.clone() for peer, words in sends.items()}
            for words in sends.values():
                words.view(torch.uint8).view(-1)[-40] ^= 1
        return self._comm.swap(sends, recvs, kind=kind)


def test_a_corrupted_message_ends_in_an_error_under_both_policies() -> None:
    value = noise((2, 64, 8))

    def wired(comm: Comm) -> None:
        wire = Wire(Corrupting(comm, 2), codecs_for({"halo": "int8"}))  # type: ignore[arg-type]
        peer = 1 - comm.rank
        for _ in range(2):
            wire.swap("conv", {peer: value}, {peer: torch.empty_like(value)}, kind="halo").wait()
        with pytest.raises(df.RanksDisagree, match=rf"conv: the int8 frame of rank {peer} has checksum"):
            wire.swap("conv", {peer: value}, {peer: torch.empty_like(value)}, kind="halo").wait()

    def slotted(comm: Comm) -> None:
        from distrifusion.comm.route import PlainRoute

        network: Any = Corrupting(comm, 1)
        network.route = lambda layout, kind: PlainRoute(network, layout, kind)
        slots = Slots(network, codecs_for({"halo": "int8"}))
        links = frozenset({(0, 1), (1, 0)})
        peer = 1 - comm.rank
        slots.keep("conv", {peer: value}, {peer: value}, links=links, weight=1, kind="halo")
        for step in range(2):
            slots.read("conv")
            slots.post("conv", {peer: value + step})
            slots.finish()
        with pytest.raises(df.RanksDisagree, match=rf"conv: the int8 frame of rank {peer} has checksum"):
            slots.read("conv")

    df.run_ranks(2, wired, timeout=20)
    df.run_ranks(2, slotted, timeout=20)


# --- the wire ---


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", CODECS)
def test_the_wire_sends_values_once_and_then_frames(world: int, name: str) -> None:
    """Uneven parts, one of them empty; another shape under the name starts anew."""

    def rank(comm: Comm) -> None:
        wire = Wire(comm, codecs_for({"context": name}))
        for batch in (2, 1):
            shapes = [(batch, 5 * peer, 6) for peer in range(comm.world)]
            parts = [noise(shape, 10 + peer) for peer, shape in enumerate(shapes)]
            for turn in range(30):
                comm.meter.clear()
                moved = [part + turn / (turn + 1) for part in parts]
                found = wire.all_gather("attn", moved[comm.rank], shapes, kind="context").wait()
                most = shapes[-1]  # to which a gather of uneven parts pads them
                size = prod(most) * 4 if turn == 0 else frame_bytes(codec_of(name), most)
                assert comm.meter.bytes["context"] == size * (comm.world - 1)
                assert torch.equal(found[comm.rank], moved[comm.rank])
                for part, wanted in zip(found, moved, strict=True):
                    assert part.shape == wanted.shape
                    if turn == 0:
                        assert torch.equal(part, wanted)
            for part, wanted in zip(found, moved, strict=True):
                assert not wanted.numel() or error(part, wanted) < 0.05

    df.run_ranks(world, rank, timeout=20)


def test_waiting_twice_reads_a_frame_once() -> None:
    def rank(comm: Comm) -> None:
        wire, value = Wire(comm, codecs_for({"context": "int8"})), noise((1, 4, 6))
        for turn in range(3):
            pending = wire.all_gather("attn", value + turn, [(1, 4, 6)] * 2, kind="context")
            once = [part.clone() for part in pending.wait()]
            assert all(torch.equal(a, b) for a, b in zip(once, pending.wait(), strict=True))

    df.run_ranks(2, rank, timeout=20)


def test_without_a_codec_the_wire_keeps_nothing() -> None:
    def rank(comm: Comm) -> None:
        wire, value = Wire(comm), noise((1, 4, 6))
        for _ in range(2):
            wire.all_gather("attn", value, [(1, 4, 6)] * 2, kind="context").wait()
        assert not wire._senders
        assert not wire._receivers
        assert comm.meter.bytes["context"] == 2 * value.numel() * 4

    df.run_ranks(2, rank, timeout=20)
