"""Pictures whose ends meet: rolling the latents rolls the picture, on one device and under every exact strategy."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import distrifusion as df
from distrifusion.comm import Comm
from models import build, conditioning, distance, latents
from pipelines import VAE_SCALE, controlnet, drawing, picture, sample, sd, sdxl
from transformers_cross import CROSS
from transformers_tiny import build as build_transformer

EXACT = 1e-5  # see test_unet_exact.py
ROLLED = 1e-4  # sums in yet another order, through the steps of a scheduler and a decoder; a seam shows at 1e-2
SEAM = 1e-2


def config(topology: Any, **settings: Any) -> df.ParallelConfig:
    return df.ParallelConfig(**{"strategy": "sync", "topology": topology, **settings})


def by_hand(model: Any, rows: bool, cols: bool) -> Any:
    """The plain model with its convolutions' padding taken from the other end before each of them runs."""

    def around(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        (x,), (high, wide) = args, module.wanted
        if cols:
            x = torch.cat([x[..., x.shape[-1] - wide :], x, x[..., :wide]], -1)
        if rows:
            x = torch.cat([x[..., x.shape[-2] - high :, :], x, x[..., :high, :]], -2)
        return (x,)

    for module in model.modules():
        if isinstance(module, nn.Conv2d) and any(module.padding):
            module.wanted = module.padding
            module.padding = (0 if rows else module.padding[0], 0 if cols else module.padding[1])
            module.register_forward_pre_hook(around)
    return model


@pytest.mark.parametrize(("topology", "rows", "cols"), [("ring-x", False, True), ("torus", True, True)])
@pytest.mark.parametrize(
    ("name", "world", "split"),
    [
        ("sd15", 1, "rows"),
        ("sd15", 3, "rows"),
        ("sd15", 4, "cols"),  # four columns each, half of one below
        ("sdxl", 2, "rows"),
        ("sdxl", 2, "cols"),
        ("sdxl", 5, "cols"),
        ("resnet-resample", 3, "cols"),
        ("ddim", 3, "rows"),
    ],
)
def test_a_call_equals_circular_padding_on_one_device(
    name: str, world: int, split: Any, topology: Any, rows: bool, cols: bool
) -> None:
    given, arguments = latents(name, 2, 24, 16), conditioning(name, 2)
    truth = by_hand(build(name), rows, cols)(given, 321, **arguments).sample
    assert distance(build(name)(given, 321, **arguments).sample, truth) > SEAM

    def rank(comm: Comm) -> Tensor:
        model = df.parallelize(build(name), config(topology, split=split), comm)
        return model(given, 321, **arguments).sample

    for result in df.run_ranks(world, rank):
        assert distance(result, truth) <= EXACT


@pytest.mark.parametrize("name", ["sd15", "ddpm", "refiner"])  # ddpm pads after its rows only: (0, 1, 0, 1)
@pytest.mark.parametrize(("world", "split"), [(1, "rows"), (2, "rows"), (3, "cols"), (5, "rows")])
def test_rolled_latents_give_a_rolled_prediction(name: str, world: int, split: Any) -> None:
    given, arguments = latents(name, 1, 24, 16), conditioning(name)

    def rank(comm: Comm) -> list[Tensor]:
        model = df.parallelize(build(name), config("torus", split=split), comm)
        rolled = given.roll((8, -8), (2, 3))
        return [model(x, 321, **arguments).sample for x in (given, rolled)]

    for plain, rolled in df.run_ranks(world, rank):
        assert distance(rolled, plain.roll((8, -8), (2, 3))) <= EXACT


def vae(kind: str) -> Any:
    if kind == "kl":
        return copy.deepcopy(sd().vae)
    with drawing(7):
        widths = {"encoder_block_out_channels": (4,) * 4, "decoder_block_out_channels": (4,) * 4}
        blocks = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}
        return diffusers.AutoencoderTiny(**widths, **blocks).requires_grad_(False)


@pytest.mark.parametrize("topology", ["ring-x", "torus"])
@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (1, {}),
        (2, {}),
        (3, {"split": "cols"}),
        (2, {"cfg": 2}),
        (4, {"cfg": 2}),
        (3, {"strategy": "displaced", "warmup_steps": 1000}),
        (3, {"strategy": "shifted", "warmup_steps": 1000}),
    ],
    ids=str,
)
def test_rolled_noise_gives_a_rolled_picture(world: int, settings: dict[str, Any], topology: Any) -> None:
    """Through all steps and the decoder; of the columns, or of both sides."""
    noise = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(5))
    by = (0, 6) if topology == "ring-x" else (-2, 6)  # multiples of the U-Net's strides

    def rank(comm: Comm) -> list[Tensor]:
        pipe = sd(vae=vae("kl"))
        df.parallelize(pipe, config(topology, **settings), comm)
        size = {"height": 16 * VAE_SCALE, "width": 24 * VAE_SCALE, "output_type": "pt"}
        return [sample(pipe, latents=x.clone(), **size) for x in (noise, noise.roll(by, (2, 3)))]

    for plain, rolled in df.run_ranks(world, rank):
        moved = tuple(VAE_SCALE * rows for rows in by)
        assert distance(rolled, plain.roll(moved, (2, 3))) <= ROLLED
        assert distance(rolled.roll(1, 3), plain.roll(moved, (2, 3))) > SEAM


@pytest.mark.parametrize("kind", ["kl", "tiny"])
@pytest.mark.parametrize("topology", ["ring-x", "torus"])
def test_a_vae_goes_around_in_both_directions(kind: str, topology: Any) -> None:
    pipe = sd(vae=vae(kind))
    scale = VAE_SCALE if kind == "kl" else 8
    image = torch.rand(1, 3, 8 * scale, 6 * scale, generator=torch.Generator().manual_seed(2)) * 2 - 1
    plain = pipe.vae.decode(latents("sd15", 1, 8, 6)).sample
    df.parallelize(pipe, config(topology))

    def encoded(x: Tensor) -> Tensor:
        found = pipe.vae.encode(x)
        return found.latent_dist.mode() if kind == "kl" else found.latents

    by = (0, 2) if topology == "ring-x" else (3, 2)
    pixels = tuple(scale * rows for rows in by)
    assert distance(encoded(image.roll(pixels, (2, 3))), encoded(image).roll(by, (2, 3))) <= EXACT
    small = latents("sd15", 1, 8, 6)
    around = pipe.vae.decode(small).sample
    assert distance(pipe.vae.decode(small.roll(by, (2, 3))).sample, around.roll(pixels, (2, 3))) <= EXACT
    assert distance(around, plain) > 1e-3
    if topology == "ring-x":  # rows have ends as ever
        assert distance(pipe.vae.decode(small.roll(3, 2)).sample, around.roll(3 * scale, 2)) > 1e-3
    df.restore(pipe)
    assert torch.equal(pipe.vae.decode(small).sample, plain)
    assert not any("forward" in module.__dict__ for module in pipe.vae.modules())


@pytest.mark.parametrize("world", [1, 3])
def test_restore_gives_the_plane_back(world: int) -> None:
    truth = sample(sd())

    def rank(comm: Comm) -> list[Tensor]:
        pipe = df.parallelize(sd(vae=vae("kl")), config("torus"), comm)
        around = sample(pipe)
        return [around, sample(df.restore(pipe))]

    for around, after in df.run_ranks(world, rank):
        assert torch.equal(after, truth)
        assert distance(around, truth) > SEAM


def test_without_a_communicator_one_device_goes_around_too() -> None:
    pipe = df.parallelize(sd(vae=vae("kl")), config("ring-x"))
    first = sample(pipe)
    assert df.report(pipe).kinds == ["sync"] * 3
    assert "topology=ring-x" in df.report(pipe).line()
    (again,) = df.run_ranks(1, lambda comm: sample(df.parallelize(sd(vae=vae("kl")), config("ring-x"), comm)))
    assert torch.equal(first, again)


@pytest.mark.parametrize(("world", "split"), [(1, "rows"), (2, "rows"), (3, "cols")])
def test_a_controlnet_goes_around_with_its_unet(world: int, split: Any) -> None:
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    control = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(6))
    by = (4, -6)

    def rank(comm: Comm) -> list[Tensor]:
        pipe = sd(diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet(), vae=vae("kl"))
        df.parallelize(pipe, config("torus", split=split), comm)
        pixels = tuple(4 * rows for rows in by)
        return [
            sample(pipe, latents=noise.clone(), image=control),
            sample(pipe, latents=noise.roll(by, (2, 3)), image=control.roll(pixels, (2, 3))),
        ]

    for plain, rolled in df.run_ranks(world, rank):
        assert distance(rolled, plain.roll(by, (2, 3))) <= ROLLED


@pytest.mark.parametrize("strategy", ["displaced", "naive", "shifted"])
def test_strategies_that_are_not_exact_go_around_too(strategy: Any) -> None:
    """Rolled by whole patches, every rank has what another one had."""
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))

    def rank(comm: Comm) -> list[Tensor]:
        settings = {"strategy": strategy, "warmup_steps": 0}
        pipe = df.parallelize(sd(vae=vae("kl")), config("torus", **settings), comm)
        return [sample(pipe, latents=x.clone()) for x in (noise, noise.roll(4, 2))]

    for plain, rolled in df.run_ranks(4, rank):
        assert distance(rolled, plain.roll(4, 2)) <= ROLLED


def test_a_window_of_context_goes_around() -> None:
    name = "sd15"
    given, arguments = latents(name, 1, 32, 16), conditioning(name)

    def rank(comm: Comm) -> list[Tensor]:
        model = df.parallelize(build(name), config("torus", context_window=0.5), comm)
        return [model(x, 321, **arguments).sample for x in (given, given.roll(8, 2))]

    for plain, rolled in df.run_ranks(4, rank):
        assert distance(rolled, plain.roll(8, 2)) <= EXACT


# --- refused ---


def test_a_model_that_knows_positions_is_refused_by_name() -> None:
    for world in (1, 2):
        with pytest.raises(df.UnsupportedModel, match=r"topology='torus': PixArtTransformer2DModel knows the position"):
            df.run_ranks(world, lambda comm: df.parallelize(build_transformer(CROSS["pixart"]), config("torus"), comm))


@pytest.mark.parametrize("world", [1, 2])
def test_a_side_that_does_not_shrink_evenly_is_refused(world: int) -> None:
    def rank(comm: Comm) -> Any:
        model = df.parallelize(build("sd15"), config("ring-x"), comm)
        model(latents("sd15", 1, 20, 16), 321, **conditioning("sd15"))  # rows have ends
        return model(latents("sd15", 1, 16, 20), 321, **conditioning("sd15"))

    with pytest.raises(df.ConfigError, match=r"latent of 20 rows or columns cannot go around: .* multiple of 8"):
        df.run_ranks(world, rank)


def test_what_sees_the_ends_is_refused_by_name() -> None:
    with drawing(3):
        adapter = diffusers.T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=4)
    pipe = sd(diffusers.StableDiffusionAdapterPipeline, adapter=adapter.eval().requires_grad_(False))
    with pytest.raises(df.UnsupportedModel, match=r"topology='torus': T2IAdapter runs whole and sees the ends"):
        df.parallelize(pipe, config("torus"))
    assert torch.equal(sample(pipe, image=picture()), sample(pipe, image=picture()))

    widths = {"down_block_out_channels": (4,), "up_block_out_channels": (4,), "norm_num_groups": 2}
    with drawing(4):
        strange = diffusers.AsymmetricAutoencoderKL(**widths)
    pipe = sd(vae=strange)
    with pytest.raises(df.UnsupportedModel, match="AsymmetricAutoencoderKL makes no picture whose ends meet"):
        df.parallelize(pipe, config("torus"))
    assert not hasattr(pipe.unet, "_distrifusion")

    pipe = df.parallelize(sd(vae=vae("kl")), config("torus"))
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size = 8
    with pytest.raises(df.UnsupportedModel, match="AutoencoderKL in tiles does not know"):
        pipe.vae.decode(latents("sd15", 1, 16, 16))


def test_pipelines_that_share_a_vae_share_its_topology() -> None:
    shared = vae("kl")
    one, two = sd(vae=shared), sdxl(vae=shared)
    df.parallelize(one, config("torus"))
    with pytest.raises(df.ConfigError, match="has topology='torus' already"):
        df.parallelize(two, config("ring-x"))
    df.parallelize(two, config("torus"))
    df.restore(two)
    df.restore(one)
    assert not any("forward" in module.__dict__ for module in shared.modules())
