"""A VAE that is parallel: what it leaves alone, what it counts, and how it fails."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

import distrifusion as df
from distrifusion.comm import Comm
from distrifusion.models.vaes import PLANS
from models import distance
from vaes import VAES, build_vae, decoded, encoded, latents_of, pixels_of

EXACT = 1e-5  # see test_vae_exact.py
SYNC = df.ParallelConfig(strategy="sync")
NAMES = ["kl", "flux2", "tiny", "qwen", "wan-2.2"]


def traces(vae: Any) -> list[str]:
    """What of ours is on the modules."""
    names = ("forward", "__deepcopy__", "_distrifusion")
    return [f"{key}.{name}" for key, module in vae.named_modules() for name in names if name in vars(module)]


@pytest.mark.parametrize("name", NAMES)
def test_restore_leaves_no_trace_and_every_bit(name: str) -> None:
    latents, pixels = latents_of(name, 2), pixels_of(name, 2, 32, 32)
    plain = build_vae(name)
    keys, truths = list(plain.state_dict()), (decoded(plain, latents), encoded(plain, pixels))

    def rank(comm: Comm) -> None:
        vae = build_vae(name)
        assert df.parallelize(vae, SYNC, comm) is vae
        assert list(vae.state_dict()) == keys
        decoded(vae, latents), encoded(vae, pixels)
        assert traces(vae)
        assert df.restore(vae) is vae
        assert traces(vae) == []
        assert torch.equal(decoded(vae, latents), truths[0])
        assert torch.equal(encoded(vae, pixels), truths[1])
        assert df.report(vae).strategy == "none"

    df.run_ranks(3, rank)


def test_a_world_of_one_changes_nothing() -> None:
    vae = build_vae("kl")
    assert df.parallelize(vae, SYNC, None) is vae
    assert traces(vae) == []
    df.run_ranks(1, lambda comm: df.parallelize(vae, SYNC, comm))
    assert traces(vae) == []
    with pytest.raises(df.ConfigError, match="a world of 1 does not fit cfg=2"):
        df.parallelize(vae, df.ParallelConfig(cfg=2), None)


@pytest.mark.parametrize("strategy", ["sync", "displaced", "naive"])
def test_it_is_exact_under_every_strategy_and_over_the_ranks_of_both_branches(strategy: Any) -> None:
    latents = latents_of("kl")
    truth = decoded(build_vae("kl"), latents)

    def rank(comm: Comm) -> tuple[list[Tensor], Any]:
        vae = df.parallelize(build_vae("kl"), df.ParallelConfig(strategy=strategy, cfg=2), comm)
        return [decoded(vae, latents), decoded(vae, latents)], df.report(vae)

    for results, report in df.run_ranks(4, rank):
        assert all(distance(result, truth) <= EXACT for result in results)
        assert (report.strategy, report.mesh) == (strategy, "cfg 2 x patch 2")
        assert report.vae["decode"].calls == 2


def test_messages_and_bytes_are_the_seams_and_the_picture() -> None:
    """Two ranks of a decode: a halo at each 3 x 3 convolution that does not read the latents, moments at each norm."""
    name, (height, width) = "kl", (6, 5)
    latents = latents_of(name, 1, height, width)
    decoder = build_vae(name).decoder
    wide = [m for m in decoder.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    norms = [m for m in decoder.modules() if isinstance(m, nn.GroupNorm)]
    expected = {"halo": len(wide) - 1, "moments": len(norms), "context": 1, "output": 1}

    def rank(comm: Comm) -> Any:
        vae = df.parallelize(build_vae(name), SYNC, comm)
        before = Counter(comm.meter.messages), Counter(comm.meter.bytes)
        decoded(vae, latents)
        messages, num_bytes = (Counter(now) for now in (comm.meter.messages, comm.meter.bytes))
        messages.subtract(before[0])
        num_bytes.subtract(before[1])
        return dict(messages), dict(num_bytes), df.report(vae).vae["decode"]

    for messages, num_bytes, tally in df.run_ranks(2, rank):
        assert {kind: count for kind, count in messages.items() if kind != "control"} == expected
        assert num_bytes["output"] == 3 * (4 * height // 2) * (4 * width) * 4  # own rows, float32
        assert num_bytes["context"] == 2 * 8 * (height // 2) * width * 4  # K and V of own tokens, 8 channels
        assert tally.calls == 1
        assert tally.messages == sum(expected.values())
        assert tally.bytes == sum(count for kind, count in num_bytes.items() if kind != "control")


@pytest.mark.parametrize("name", NAMES)
def test_what_a_rank_computes_and_holds_falls_with_the_world(name: str) -> None:
    """The elements that come out of the decoder's modules on one of four ranks, but for the gathered picture."""
    latents = latents_of(name, 1, 8, 6)

    def elements(vae: Any) -> int:
        counts: list[int] = []
        inner = [module for module in vae.decoder.modules() if module is not vae.decoder]
        hooks = [module.register_forward_hook(lambda m, x, out: counts.append(out.numel())) for module in inner]
        decoded(vae, latents)
        for hook in hooks:
            hook.remove()
        return sum(counts)

    whole = elements(build_vae(name))
    shares = df.run_ranks(4, lambda comm: elements(df.parallelize(build_vae(name), SYNC, comm)) / whole)
    # Patches are a quarter each; to_k and to_v are asked within the attention, where they make own rows only.
    assert shares == pytest.approx([0.25] * 4, rel=0.01)


@pytest.mark.parametrize("name", ["kl", "tiny", "wan"])
def test_slices_go_one_picture_at_a_time(name: str) -> None:
    latents, pixels = latents_of(name, 3), pixels_of(name, 3, 32, 32)
    truths = decoded(build_vae(name), latents), encoded(build_vae(name), pixels)

    def rank(comm: Comm) -> Any:
        vae = df.parallelize(build_vae(name), SYNC, comm)
        vae.enable_slicing()
        results = encoded(vae, pixels), decoded(vae, latents)
        return results, {kind: tally.calls for kind, tally in df.report(vae).vae.items()}

    for (latent, picture), calls in df.run_ranks(2, rank):
        assert distance(picture, truths[0]) <= EXACT
        assert distance(latent, truths[1]) <= EXACT
        assert calls == {"encode": 3, "decode": 3}


TILES = {"kl": 8, "tiny": 16}  # AutoencoderTiny divides by zero where the overlap, an eighth, is one row of latent


def tiled(name: str) -> Any:
    vae = build_vae(name)
    if VAES[name].is_video:
        vae.enable_tiling(32, 32, 24, 24)
    else:
        size = TILES[name]
        vae.tile_sample_min_size, vae.tile_latent_min_size = size * VAES[name].scale, size
        vae.enable_tiling()
    return vae


@pytest.mark.parametrize("name", ["kl", "tiny", "qwen", "wan"])
def test_with_tiles_every_rank_does_what_the_user_asked_for(name: str) -> None:
    scale = VAES[name].scale
    rows, cols = (14, 16) if name != "tiny" else (20, 18)
    latents, pixels = latents_of(name, 1, rows, cols), pixels_of(name, 1, rows * scale, cols * scale)
    truths = decoded(tiled(name), latents), encoded(tiled(name), pixels)
    assert distance(decoded(build_vae(name), latents), truths[0]) > 1000 * EXACT  # or there were no tiles

    def rank(comm: Comm) -> Any:
        vae = df.parallelize(tiled(name), SYNC, comm)
        results = decoded(vae, latents), encoded(vae, pixels)
        messages, _ = comm.meter.totals()
        vae.disable_tiling()
        return results, messages, decoded(vae, latents)

    whole = decoded(build_vae(name), latents)
    for (picture, latent), messages, after in df.run_ranks(2, rank):
        assert distance(picture, truths[0]) <= EXACT
        assert distance(latent, truths[1]) <= EXACT
        assert messages == 0
        assert distance(after, whole) <= EXACT


def test_results_keep_their_class_and_the_whole_model_runs() -> None:
    latents, pixels = latents_of("kl"), pixels_of("kl")
    plain = build_vae("kl")
    truth = plain(pixels, sample_posterior=True, generator=torch.Generator().manual_seed(3)).sample

    def rank(comm: Comm) -> None:
        vae = df.parallelize(build_vae("kl"), SYNC, comm)
        assert type(vae.decode(latents)) is type(plain.decode(latents))
        (picture,) = vae.decode(latents, return_dict=False)
        assert torch.equal(picture, vae.decode(latents).sample)
        assert type(vae.encode(pixels, return_dict=False)[0]) is type(plain.encode(pixels).latent_dist)
        again = vae(pixels, sample_posterior=True, generator=torch.Generator().manual_seed(3)).sample
        assert distance(again, truth) <= EXACT
        assert vae.config.latent_channels == 4

    df.run_ranks(2, rank)


def test_a_copy_is_a_plain_vae_for_one_rank_alone() -> None:
    latents = latents_of("kl")
    truth = decoded(build_vae("kl"), latents)

    def rank(comm: Comm) -> None:
        vae = df.parallelize(build_vae("kl"), SYNC, comm)
        if comm.rank == 1:
            twin = copy.deepcopy(vae)
            assert traces(twin) == []
            assert torch.equal(decoded(twin, latents), truth)
        assert distance(decoded(vae, latents), truth) <= EXACT  # the original still waits for its peers
        assert df.report(vae).vae["decode"].messages > 0
        df.restore(vae)
        assert traces(vae) == []

    df.run_ranks(2, rank)


@torch.no_grad()
def test_processors_and_adapters_that_come_later_are_followed() -> None:
    from peft import LoraConfig

    latents = latents_of("kl")

    def changed(vae: Any) -> Any:
        vae.set_attn_processor(AttnProcessor())
        vae.add_adapter(LoraConfig(r=2, target_modules=["conv1", "conv_out", "to_k"]))
        for name, weight in vae.named_parameters():
            if "lora" in name:
                weight.copy_(0.1 * torch.arange(weight.numel()).sin().view(weight.shape))
        return vae

    truth = decoded(changed(build_vae("kl")), latents)
    assert distance(decoded(build_vae("kl"), latents), truth) > 1000 * EXACT

    def rank(comm: Comm) -> Tensor:
        vae = df.parallelize(build_vae("kl"), SYNC, comm)
        decoded(vae, latents)
        return decoded(changed(vae), latents)

    for result in df.run_ranks(3, rank):
        assert distance(result, truth) <= EXACT


def test_a_vae_without_its_encoder_decodes() -> None:
    latents = latents_of("kl")
    truth = decoded(build_vae("kl"), latents)

    def rank(comm: Comm) -> Tensor:
        vae = build_vae("kl")
        vae.encoder = None
        return decoded(df.parallelize(vae, SYNC, comm), latents)

    for result in df.run_ranks(2, rank):
        assert distance(result, truth) <= EXACT


def test_a_gradient_through_it_is_refused_and_not_lost() -> None:
    def rank(comm: Comm) -> None:
        vae = df.parallelize(build_vae("kl").requires_grad_(True), SYNC, comm)
        picture = decoded(vae, latents_of("kl"))  # who forgets no_grad gets a picture
        assert picture.requires_grad
        with pytest.raises(df.UnsupportedModel, match="gives no gradients while it is parallel"):
            picture.sum().backward()
        with torch.no_grad():
            assert not decoded(vae, latents_of("kl")).requires_grad

    df.run_ranks(2, rank)


def sized(vae: Any, rank: int) -> None:
    decoded(vae, latents_of("kl", 1, 6 + rank, 5))


def typed(vae: Any, rank: int) -> None:
    decoded(vae.to((torch.float32, torch.float64)[rank]), latents_of("kl").to((torch.float32, torch.float64)[rank]))


def other(vae: Any, rank: int) -> None:
    decoded(vae, latents_of("kl") * (1 - 2 * rank))


def asked(vae: Any, rank: int) -> None:
    vae.use_tiling = bool(rank)
    decoded(vae, latents_of("kl"))


def twofold(vae: Any, rank: int) -> None:
    if rank:
        decoded(vae, latents_of("kl"))
    else:
        encoded(vae, pixels_of("kl"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (sized, "input to decode differs: rank 0 has 1 x 4 x 6 x 5 float32, rank 1 has 1 x 4 x 7 x 5 float32"),
        (typed, "rank 1 has 1 x 4 x 6 x 5 float64"),
        (other, r"values to decode differ: rank 0 starts with \[.*\], rank 1 with \[.*; give every rank the same"),
        (asked, "tiling differs: rank 0 has False, rank 1 has True"),
        (twofold, "input to encode differs: rank 0 has .*, rank 1 has None"),
    ],
    ids=["size", "dtype", "values", "tiling", "kind"],
)
def test_ranks_with_different_work_are_told_so(call: Any, message: str) -> None:
    def rank(comm: Comm) -> None:
        vae = df.parallelize(build_vae("kl"), SYNC, comm)
        with pytest.raises(df.RanksDisagree, match=message):
            call(vae, comm.rank)

    df.run_ranks(2, rank)


def test_a_lost_rank_ends_the_decode_of_the_others() -> None:
    heard: dict[int, str] = {}

    def rank(comm: Comm) -> None:
        vae = df.parallelize(build_vae("kl"), SYNC, comm)
        decoded(vae, latents_of("kl"))
        if comm.rank == 1:
            raise ArithmeticError("only here")
        try:
            decoded(vae, latents_of("kl"))
        except df.PeerLost as loss:
            heard[comm.rank] = str(loss)

    with pytest.raises(ArithmeticError, match="only here"):
        df.run_ranks(3, rank, timeout=20)
    assert sorted(heard) == [0, 2]


def test_a_picture_smaller_than_the_world_is_refused() -> None:
    def rank(comm: Comm) -> None:
        vae = df.parallelize(build_vae("kl"), SYNC, comm)
        with pytest.raises(df.ConfigError, match=r"4 rows of pixels cannot be split over 5 ranks"):
            decoded(vae, latents_of("kl", 1, 1, 3))
        assert decoded(vae, latents_of("kl", 1, 2, 3)).shape[2] == 8

    df.run_ranks(5, rank)


class Another(diffusers.AutoencoderKL):
    pass


def foreign() -> Any:
    vae = build_vae("kl")
    vae.decoder.mid_block.resnets[0].forward = lambda *args: args[0]
    return vae


def replaced() -> Any:
    vae = build_vae("kl")
    vae.decoder.forward = vae.decoder.forward
    return vae


def training() -> Any:
    vae = build_vae("wan").train()
    vae.decoder.mid_block.resnets[0].dropout.p = 0.5
    return vae


def thirds() -> Any:
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        upsampling_scaling_factor=3,
    )


def bilinear() -> Any:
    vae = build_vae("tiny")
    next(module for module in vae.decoder.layers if isinstance(module, nn.Upsample)).mode = "bilinear"
    return vae


class Odd(AttnProcessor2_0):
    pass


def odd() -> Any:
    vae = build_vae("kl")
    vae.set_attn_processor(Odd())
    return vae


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Another(), r"Another has no table; known are: .*AutoencoderKL, AutoencoderKLFlux2"),
        (lambda: diffusers.AutoencoderDC.__new__(diffusers.AutoencoderDC), "AutoencoderDC has no table; known are:"),
        (foreign, r"mid_block.resnets.0 \(ResnetBlock2D\) has a forward that another library"),
        (replaced, r"decoder \(Decoder\): another library has replaced its forward"),
        (training, "dropout drops at random"),
        (thirds, r"layers.3 \(Upsample\) with mode='nearest' scale_factor=3"),
        (bilinear, r"\(Upsample\) with mode='bilinear' scale_factor=2"),
        (odd, "has the processor Odd, which is not known"),
    ],
    ids=["subclass", "class", "module", "half", "dropout", "factor", "mode", "processor"],
)
def test_what_cannot_be_right_is_refused_by_name(make: Any, message: str) -> None:
    def rank(comm: Comm) -> None:
        vae = make()
        before = traces(vae) if vae.__dict__ else None
        with pytest.raises(df.UnsupportedModel, match=message):
            df.parallelize(vae, SYNC, comm)
        assert before is None or traces(vae) == before

    df.run_ranks(2, rank)


def test_a_processor_that_comes_later_and_is_not_known_is_refused_at_the_next_call() -> None:
    def rank(comm: Comm) -> None:
        vae = df.parallelize(build_vae("kl"), SYNC, comm)
        vae.fuse_qkv_projections()
        with pytest.raises(df.UnsupportedModel, match="FusedAttnProcessor2_0, which is not known; call unfuse"):
            decoded(vae, latents_of("kl"))
        vae.unfuse_qkv_projections()
        decoded(vae, latents_of("kl"))

    df.run_ranks(2, rank)


def test_what_another_library_wrapped_since_is_not_torn_off() -> None:
    def rank(comm: Comm) -> None:
        vae = df.parallelize(build_vae("kl"), SYNC, comm)
        ours = vae.decoder.forward
        vae.decoder.forward = lambda *args, **kwargs: ours(*args, **kwargs)
        with pytest.raises(df.ConfigError, match=r"Decoder was wrapped by another library"):
            df.restore(vae)
        vae.decoder.forward = ours
        df.restore(vae)
        assert traces(vae) == []

    df.run_ranks(2, rank)


def test_twice_is_refused() -> None:
    def rank(comm: Comm) -> None:
        vae = df.parallelize(build_vae("kl"), SYNC, comm)
        with pytest.raises(df.ConfigError, match=r"this AutoencoderKL is parallel already; call df.restore first"):
            df.parallelize(vae, SYNC, comm)

    df.run_ranks(2, rank)


def test_the_count_begins_anew_when_told_so() -> None:
    def rank(comm: Comm) -> list[dict[str, int]]:
        vae, counts = df.parallelize(build_vae("tiny"), SYNC, comm), []

        def count() -> None:
            counts.append({kind: tally.calls for kind, tally in df.report(vae).vae.items()})

        encoded(vae, pixels_of("tiny", 1, 32, 32))
        decoded(vae, latents_of("tiny"))
        count()
        encoded(vae, pixels_of("tiny", 1, 32, 32))  # after a decode: of another picture
        count()
        df.reset(vae)
        count()
        return counts

    assert df.run_ranks(2, rank)[0] == [{"encode": 1, "decode": 1}, {"encode": 1}, {}]


def test_every_known_class_has_a_small_one() -> None:
    assert {type(build_vae(name)) for name in NAMES} == set(PLANS)
