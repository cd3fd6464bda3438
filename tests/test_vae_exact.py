"""Encoding and decoding by rows equals one device, for every class: the ground on which everything else stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import distrifusion as df
from distrifusion.models.vaes import PLANS
from models import distance
from vaes import VAES, build_vae, decoded, encoded, latents_of, pixels_of

# As for the U-Nets (test_unet_exact.py): float32 sums in another order, some 1e-6 at the end of a VAE. A halo or a
# moment left out shows at 1e-2.
EXACT = 1e-5

Call = Callable[[Any, Tensor], Tensor]

# (name, world, split, batch, height, width, frames): latents; sides that do not divide, and, with five ranks on two
# or three rows, ranks without any.
CASES = [
    ("kl", 2, "rows", 2, 6, 5, 1),
    ("kl", 3, "cols", 2, 5, 7, 1),
    ("kl", 5, "rows", 1, 7, 4, 1),
    ("kl", 5, "rows", 2, 2, 3, 1),
    ("kl-attention", 3, "rows", 2, 7, 5, 1),
    ("kl-attention", 5, "cols", 1, 4, 6, 1),
    ("flux2", 2, "cols", 1, 4, 5, 1),
    ("flux2", 3, "rows", 2, 7, 4, 1),
    ("flux2", 5, "rows", 1, 3, 4, 1),
    ("tiny", 2, "rows", 2, 3, 4, 1),
    ("tiny", 3, "cols", 1, 4, 5, 1),
    ("tiny", 5, "rows", 2, 7, 2, 1),
    ("tiny-swish", 5, "rows", 1, 3, 4, 1),
    ("qwen", 2, "rows", 2, 3, 4, 1),
    ("qwen", 3, "cols", 1, 3, 4, 2),
    ("qwen", 5, "rows", 1, 3, 2, 1),
    ("wan", 2, "rows", 2, 3, 2, 3),
    ("wan", 3, "cols", 1, 2, 4, 2),
    ("wan", 5, "rows", 1, 3, 2, 2),
    ("wan-2.2", 2, "rows", 1, 3, 2, 3),
    ("wan-2.2", 3, "cols", 2, 2, 4, 1),
    ("wan-2.2", 5, "rows", 1, 3, 2, 2),
]


def on_ranks(name: str, world: int, split: Any, call: Call, x: Tensor) -> list[Tensor]:
    config = df.ParallelConfig(split=split)
    return df.run_ranks(world, lambda comm: call(df.parallelize(build_vae(name, x.dtype), config, comm), x))


def test_the_cases_cover_what_is_promised() -> None:
    assert {case[0] for case in CASES} == set(VAES)
    assert {type(build_vae(name)) for name in VAES} == set(PLANS)
    for name in VAES:
        if name not in ("kl-attention", "tiny-swish"):
            assert {case[1] for case in CASES if case[0] == name} == {2, 3, 5}
            assert {case[2] for case in CASES if case[0] == name} == {"rows", "cols"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_decode_equals_one_device_on_every_rank(case: Any) -> None:
    name, world, split, batch, height, width, frames = case
    latents = latents_of(name, batch, height, width, frames)
    truth = decoded(build_vae(name), latents)
    assert (truth.abs() < 1).double().mean() > 0.5 or not VAES[name].is_video  # those clamp what they make
    for result in on_ranks(name, world, split, decoded, latents):
        assert distance(result, truth) <= EXACT


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_encode_equals_one_device_on_every_rank(case: Any) -> None:
    name, world, split, batch, height, width, frames = case
    scale = VAES[name].scale
    # Encoders that are U-Nets take any size; the others' shortcuts and patches need whole multiples.
    odd = 1 if not VAES[name].is_video else 0
    pixels = pixels_of(name, batch, scale * height + odd, scale * width + 2 * odd, 4 * frames - 3)
    truth = encoded(build_vae(name), pixels)
    for result in on_ranks(name, world, split, encoded, pixels):
        assert distance(result, truth) <= EXACT


@pytest.mark.parametrize("name", ["kl", "qwen"])
def test_without_its_neighbours_a_patch_is_another_picture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from distrifusion.exchange import Absent
    from distrifusion.strategies import vae

    latents = latents_of(name, 1, 6, 5)
    truth = decoded(build_vae(name), latents)
    monkeypatch.setattr(vae, "Fresh", lambda comm: Absent(comm.rank))
    for result in on_ranks(name, 2, "rows", decoded, latents):
        assert distance(result, truth) > 1000 * EXACT


@pytest.mark.parametrize("name", ["kl", "tiny", "wan"])
def test_bfloat16_adds_nothing_to_its_own_distance(name: str) -> None:
    """One device in bfloat16 is some 1e-2 from float32; `Fresh` over patches may round elsewhere, not more.

    The bound is that of test_unet_exact.py, whose docstring has its reason.
    """
    latents = latents_of(name, 2, 6, 5)
    truth, low = decoded(build_vae(name), latents), latents.to(torch.bfloat16)
    plain = decoded(build_vae(name, torch.bfloat16), low)
    for result in on_ranks(name, 3, "rows", decoded, low):
        assert result.dtype == torch.bfloat16
        assert distance(result, truth) <= 1.15 * distance(plain, truth)


def test_float16_on_three_ranks() -> None:
    """torch computes float16 in float32 inside each layer here; what is rounded between them is the same."""
    latents = latents_of("kl", 1, 6, 5)
    truth, low = decoded(build_vae("kl"), latents), latents.half()
    plain = decoded(build_vae("kl", torch.float16), low)
    for result in on_ranks("kl", 3, "rows", decoded, low):
        assert result.dtype == torch.float16
        assert distance(result, truth) <= 1.15 * distance(plain, truth)


def test_an_upcast_in_between_is_followed() -> None:
    """SDXL's pipeline runs its VAE in float32 and puts it back into float16 afterwards."""
    latents = latents_of("kl", 1, 6, 5)
    truth = decoded(build_vae("kl", torch.float16).float(), latents)

    def rank(comm: Any) -> tuple[Tensor, Tensor]:
        vae = df.parallelize(build_vae("kl", torch.float16), comm=comm)
        vae.to(torch.float32)
        high = decoded(vae, latents)
        vae.to(torch.float16)
        return high, decoded(vae, latents.half())

    for high, low in df.run_ranks(2, rank):
        assert distance(high, truth) <= EXACT
        assert low.dtype == torch.float16
