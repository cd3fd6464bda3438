"""A budget of memory: the same picture in pieces, as many bytes as predicted, and refusals with the numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distrifusion as df
import distrifusion.strategies.vae as parallel_vae
from distrifusion.bench.memory import PeakMemory
from distrifusion.checkpoint import find
from distrifusion.comm import Comm
from distrifusion.config import ParallelConfig
from distrifusion.footprint import rehearsal
from distrifusion.forecast import forecast
from distrifusion.geometry import Chain, Nearest, Span, Window
from distrifusion.layers.chunks import convolved
from distrifusion.mesh import Mesh
from distrifusion.moments import combine
from distrifusion.pipeline import report
from distrifusion.planner.memory import LIBRARIES, Budget, Fit, fewest
from distrifusion.strategies.bands import BandedTail, Bands
from distrifusion.strategies.budget import StepTrial
from models import build, conditioning, distance, latents
from tiny_pipeline import save_tiny_pipeline
from transformers_cross import CROSS
from transformers_tiny import build as build_transformer
from vaes import build_vae, decoded, encoded, latents_of, pixels_of

# float32 sums in another order, as in test_vae_exact.py.
EXACT = 1e-5

# What is predicted are tensors. Beside them are small blocks, which the allocator keeps (some MiB), and what kernels
# pad: a tenth, which Budget adds.
TENTH, SMALL = 0.1, 6 << 20

PLENTY = "1TiB"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")


def in_bands(monkeypatch: pytest.MonkeyPatch, first: float, num: int) -> None:
    """All decodes of parallel VAEs with memory that is given are in ``num`` bands, from a share of their tail on."""

    def forced(half: Any, *_: Any) -> tuple[Bands | None, Fit]:
        tail = half.tail()
        bands = None if tail is None else Bands(int(first * (len(tail.modules) - 1)), num)
        return bands, Fit(half.kind, "as the test says", 0)

    monkeypatch.setattr(parallel_vae, "half_fit", forced)


def on_ranks(name: str, world: int, x: Tensor, call: Callable[[Any, Tensor], Tensor] = decoded, **values: Any) -> Any:
    config = ParallelConfig(**{"max_memory": PLENTY, **values})
    return df.run_ranks(world, lambda comm: call(df.parallelize(build_vae(name), config, comm), x))


# (name, world, split, batch, height, width, where bands begin as a share of the tail, bands per rank)
BANDS = [
    ("kl", 1, "rows", 2, 7, 5, 0.0, 3),
    ("kl", 2, "cols", 2, 5, 7, 0.3, 4),
    ("kl", 3, "rows", 1, 2, 3, 0.5, 2),  # ranks without a row of latent
    ("kl", 2, "rows", 1, 3, 2, 1.0, 99),  # one row of pixels each
    ("kl-attention", 3, "rows", 2, 7, 5, 0.0, 3),  # attention lies before the tail
    ("flux2", 2, "rows", 1, 5, 4, 0.4, 3),
    ("tiny", 1, "rows", 2, 5, 3, 0.0, 7),
    ("tiny", 2, "cols", 2, 4, 5, 0.0, 3),
    ("tiny", 3, "rows", 1, 4, 3, 0.6, 5),
    ("tiny-swish", 2, "rows", 1, 3, 4, 0.2, 3),
    ("qwen", 2, "rows", 2, 3, 2, 0.0, 3),
    ("wan", 3, "cols", 1, 2, 3, 0.3, 2),
    ("wan-2.2", 1, "rows", 1, 3, 2, 0.0, 4),
]


@pytest.mark.parametrize("case", BANDS, ids=str)
def test_a_decode_in_bands_equals_one_device(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name, world, split, batch, height, width, first, num = case
    x = latents_of(name, batch, height, width)
    truth = decoded(build_vae(name), x)
    in_bands(monkeypatch, first, num)
    for result in on_ranks(name, world, x, split=split):
        assert distance(result, truth) <= EXACT


def test_a_picture_alone_keeps_no_past_and_frames_one_by_one_are_refused() -> None:
    vae, x = df.parallelize(build_vae("wan"), ParallelConfig(max_memory=PLENTY)), latents_of("wan", 1, 3, 2)
    past: list[Any] = [None] * 99
    vae.decoder(x, feat_cache=past, feat_idx=[0], first_chunk=True)
    assert past == [None] * 99
    with pytest.raises(df.UnsupportedModel, match="the frames of a video as tensors of their own"):
        vae.decoder(x, feat_cache=past, feat_idx=[0])
    past, frames = [None] * 99, latents_of("wan", 1, 3, 2, frames=2)
    vae.decoder(frames[:, :, :1], feat_cache=past, feat_idx=[0], first_chunk=True)
    assert isinstance(past[0], Tensor)


def test_bands_go_around_the_ends_of_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("kl", "tiny"):
        x = latents_of(name, 2, 5, 4)
        (truth,) = on_ranks(name, 1, x, topology="torus", max_memory=None)
        assert distance(truth, decoded(build_vae(name), x)) > 1e-3
        for result in on_ranks(name, 3, x, topology="torus", max_memory=None):
            assert distance(result, truth) <= EXACT
        with monkeypatch.context() as patched:
            in_bands(patched, 0.0, 3)
            for result in on_ranks(name, 2, x, topology="torus"):
                assert distance(result, truth) <= EXACT


def test_an_encode_goes_around_the_ends_on_several_ranks() -> None:
    x = pixels_of("kl", 1, 20, 12)
    (truth,) = on_ranks("kl", 1, x, encoded, topology="torus", max_memory=None)
    for result in on_ranks("kl", 3, x, encoded, topology="torus", max_memory=None):
        assert distance(result, truth) <= EXACT


def test_bands_without_margins_or_common_moments_are_another_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the tests above would say nothing."""
    x = latents_of("kl", 1, 6, 5)
    truth = decoded(build_vae("kl"), x)
    in_bands(monkeypatch, 0.0, 3)

    def short(self: BandedTail, frame: Any) -> Chain:
        readers = [layer.reach(frame)[2] for layer in self._layers if hasattr(layer, "reach")]
        return Chain(tuple(each for each in readers if isinstance(each, Nearest)), frame.split(self._level).size)

    with monkeypatch.context() as patched:
        patched.setattr(BandedTail, "reader", short)
        assert distance(on_ranks("kl", 2, x)[0], truth) > 1000 * EXACT
    with monkeypatch.context() as patched:
        patched.setattr("distrifusion.strategies.bands._Asking.moments", lambda self, key, own: combine([own]))
        assert distance(on_ranks("kl", 2, x)[0], truth) > 1000 * EXACT


def test_a_chain_reads_what_its_layers_read_one_after_the_other() -> None:
    chain = Chain((Window(3, 1, (1, 1)), Nearest(6, 12), Window(3, 1, (1, 1))))
    assert chain.reads(Span(4, 6)) == Span(0, 5)  # 3 .. 6 of the finer rows are 1 .. 3 of the coarser ones
    assert chain.reads(Span(0, 2)) == Span(-2, 3)
    assert replace(chain, size=6).reads(Span(0, 2)) == Span(0, 3)


# The denoiser


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("split", ["rows", "cols"])
def test_a_step_in_pieces_equals_one_device(world: int, split: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, settings = latents("sdxl", 2, 9, 11), conditioning("sdxl", 2)
    truth = build("sdxl")(x, 321, **settings).sample
    fit = (700, Fit("denoiser", "in pieces of 700 bytes", 0), 0)
    monkeypatch.setattr(StepTrial, "fit", lambda *_, **__: fit)
    pieces: list[int] = []

    def counted(*args: Any) -> Tensor:
        pieces.append(args[-1])
        return convolved(*args)

    monkeypatch.setattr("distrifusion.layers.conv.convolved", counted)
    config = ParallelConfig(strategy="sync", split=split, max_memory=PLENTY)

    def rank(comm: Comm) -> Tensor:
        model = df.parallelize(build("sdxl"), config, comm)
        result: Tensor = model(x, 321, **settings).sample
        df.restore(model)
        assert not any("forward" in module.__dict__ for module in model.modules())
        return result

    for result in df.run_ranks(world, rank):
        assert distance(result, truth) <= EXACT
    assert set(pieces) == {700}


def test_a_transformers_step_in_pieces_equals_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = CROSS["pixart"]
    arguments = shape.arguments(2, 3, 5)
    truth = build_transformer(shape)(**arguments).sample
    monkeypatch.setattr(StepTrial, "fit", lambda *_, **__: (500, Fit("denoiser", "in pieces", 0), 0))
    config = ParallelConfig(strategy="sync", max_memory=PLENTY)

    def rank(comm: Comm) -> Tensor:
        made: Tensor = df.parallelize(build_transformer(shape), config, comm)(**arguments).sample
        return made

    for world in (1, 2):
        for result in df.run_ranks(world, rank):
            assert distance(result, truth) <= EXACT


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (5, 1, 1), (3, 1, 2), (1, 1, 1)])
def test_a_convolution_in_pieces(dim: int, kernel: int, stride: int, dilation: int) -> None:
    conv = nn.Conv2d(2, 3, kernel, stride, kernel // 2, dilation).requires_grad_(False)
    x = torch.randn(2, 2, 11, 13, generator=torch.Generator().manual_seed(0))

    def apply(rows: Tensor, padding: tuple[int, int]) -> Tensor:
        assert rows.shape[dim] < x.shape[dim]
        return F.conv2d(rows, conv.weight, conv.bias, conv.stride, padding, conv.dilation)

    window = Window(kernel, stride, (0, 0), dilation)
    made = convolved(apply, x, (kernel // 2, kernel // 2), window, dim, 400)
    torch.testing.assert_close(made, conv(x))


# How much


def resident() -> int:
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measured(work: Callable[[], Any]) -> int:
    """Bytes that ``work`` takes beyond rest, at most."""
    memory, rest = PeakMemory(torch.device("cpu")), resident()
    work()
    peak = memory.read()
    if peak is None:
        pytest.skip("this system does not count anew")
    return peak - rest


def wide_vae() -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(**blocks, block_out_channels=(40, 40), layers_per_block=1, norm_num_groups=8)
    return vae.eval().requires_grad_(False)


def test_a_decode_takes_what_is_predicted_and_in_bands_much_less() -> None:
    x, peaks = torch.randn(1, 4, 112, 112), list[int]()
    for limit in ("1GiB", "24MiB"):
        vae = wide_vae()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("distrifusion.pipeline.LIBRARIES", 0)
            df.parallelize(vae, ParallelConfig(max_memory=limit))
        parallel = vae._distrifusion
        decoded(vae, x)  # plans, and kernels have what they keep
        peaks.append(measured(lambda vae=vae: decoded(vae, x)))
        predicted = parallel.budget.fits["VAE's decode"].peak
        assert abs(peaks[-1] - predicted) <= TENTH * predicted + SMALL
    assert re.search(r"in \d bands of \d+ rows, 6 times over for its norms: 2\d\.\d MiB", parallel.budget.lines[-1])
    assert peaks[1] < 0.6 * peaks[0]


def test_a_step_takes_what_is_predicted() -> None:
    settings = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = diffusers.UNet2DModel(64, **settings, block_out_channels=(64, 64), layers_per_block=1, norm_num_groups=8)
    model.eval().requires_grad_(False)
    x, small = torch.randn(2, 3, 96, 96), torch.randn(2, 3, 16, 16)
    df.parallelize(model, ParallelConfig(max_memory=PLENTY))
    model(small, 10)
    df.reset(model)
    trials = []
    fit = StepTrial.fit

    def noted(self: Any, *args: Any, **more: Any) -> Any:
        trials.append(self)
        return fit(self, *args, **more)

    with pytest.MonkeyPatch.context() as patched:  # planned before it is measured, and not again while it is
        patched.setattr(StepTrial, "fit", noted)
        model(x, 10)
    for chunk in (None, 1 << 20):
        predicted, _ = trials[0].peak(chunk)
        found = (chunk, Fit("denoiser", "as the test says", predicted), 0)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(StepTrial, "fit", lambda *_, found=found, **__: found)
            df.reset(model)
            peak = measured(lambda: model(x, 10))
        assert abs(peak - predicted) <= TENTH * predicted + SMALL


class Hoarder(nn.Linear):
    """Keeps what it made: itself, in an object in a list, and in a cache of its class."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.kept: list[Any] = [SimpleNamespace(table=None, log=[])]
        self.last: Tensor | None = None

    @lru_cache  # noqa: B019
    def ones(self) -> Tensor:
        return torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.kept[0].table = super().forward(x) + self.ones()
        self.kept[0].log.append(self.last)
        self.kept.append(self.last)
        return self.last


def test_a_rehearsal_leaves_a_model_as_it_was() -> None:
    model, x = Hoarder(), torch.randn(2, 4)
    weights = dict(model.named_parameters())
    trial = rehearsal(model)
    with trial.running():
        model(trial.stand_in(x))
    assert trial.peak > 0
    assert (model.last, len(model.kept), model.kept[0].table, model.kept[0].log) == (None, 1, None, [])
    assert all(model.get_parameter(name) is weight for name, weight in weights.items())
    assert "ones" not in vars(model)
    assert type(model(x)) is type(model.ones()) is Tensor


def test_a_rehearsal_counts_tensors_while_they_live() -> None:
    model = nn.Linear(4, 4, bias=False)
    trial = rehearsal(model)
    x = trial.stand_in(torch.zeros(256, 4))
    with trial.running():
        one = model(x)  # 4 KiB
        two = one.view(-1) * 2  # 4 KiB; the view none
        del one
        three = two + 1
    assert trial.peak == 2 * 256 * 4 * 4
    assert three.shape == (1024,)


def test_a_compiled_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0]._compiled_call_impl = lambda x: x  # what compile() sets
    with pytest.raises(df.UnsupportedModel, match="Sequential is compiled, so that max_memory cannot be planned"):
        rehearsal(model)


def test_what_stays_from_step_to_step_is_counted() -> None:
    x, settings = latents("class-timestep", 1, 8, 8), conditioning("class-timestep", 1)
    config = ParallelConfig(strategy="displaced", warmup_steps=0, max_memory=PLENTY)

    def rank(comm: Comm) -> tuple[int, int]:
        model = df.parallelize(build("class-timestep"), config, comm)
        for time in (321, 300, 280):
            model(x, time, **settings)
        return model._distrifusion.budget.kept, report(model).slot_bytes

    for kept, slots in df.run_ranks(2, rank):
        assert kept == pytest.approx(slots, rel=TENTH)  # words are whole in slots, and moments are left out of kept


@pytest.mark.parametrize("limit", range(1, 40))
def test_the_fewest_pieces_that_fit(limit: int) -> None:
    asked: list[int] = []

    def peak(num: int) -> int:
        asked.append(num)
        return -(-40 // num)

    num, found = fewest(peak, limit, 12)
    counts = [2, 4, 8, 12]
    assert (num, found) == next(((n, -(-40 // n)) for n in counts if -(-40 // n) <= limit), (12, 4))
    assert len(asked) <= 3


# What is said


def test_the_plan_that_is_printed_before_is_the_one_that_runs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ParallelConfig(strategy="sync", max_memory="487MiB")
    found, size = find(tiny), (32, 40)
    monkeypatch.setenv("DISTRIFUSION_SHARED_MEMORY", "0")  # ranks are threads
    monkeypatch.setattr("distrifusion.strategies.budget.CHUNKS", (1 << 20,))
    budget = forecast(found, config, Mesh.fit(config, 2), size, dtype="float32", device="cpu")
    assert budget.libraries == LIBRARIES
    assert "libraries 480.0 MiB + weights" in budget.lines[0]

    # Loading patches torch for all threads, so none may load while another works.
    pipes = [diffusers.StableDiffusionPipeline.from_pretrained(tiny) for _ in range(2)]

    def rank(comm: Comm) -> list[str]:
        pipe = pipes[comm.rank]
        pipe.set_progress_bar_config(disable=True)
        df.parallelize(pipe, config, comm)
        noise = torch.Generator().manual_seed(0)
        pipe("x", height=64, width=80, num_inference_steps=1, output_type="pt", generator=noise)
        return df.report(pipe).notes

    for notes in df.run_ranks(2, rank):
        assert notes == budget.lines
    assert "denoiser in pieces of" in budget.lines[1]


def test_what_cannot_fit_is_refused_with_the_numbers(tiny: Path) -> None:
    found, mesh = find(tiny), Mesh.fit(ParallelConfig(), 1)
    known: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
    with pytest.raises(df.ConfigError, match=r"max_memory=400\.0 MiB does not even hold .*: libraries 480\.0"):
        forecast(found, ParallelConfig(max_memory="400MiB"), mesh, (32, 32), **known)
    with pytest.raises(df.ConfigError, match=r"=486\.0 MiB is too little for the denoiser, .* at least 5\d\d\."):
        forecast(found, ParallelConfig(max_memory="486MiB"), mesh, (128, 128), **known)
    vae = build_vae("wan")
    df.parallelize(vae, ParallelConfig(max_memory=LIBRARIES + (1 << 20)))
    with pytest.raises(df.ConfigError, match=r"too little for the VAE's decode, which needs at least 5.* \(whole\)"):
        decoded(vae, latents_of("wan", 1, 24, 24, frames=2))
    assert Budget(20, 4, 3, 2).room == int(11 / 1.1)


def test_a_budget_that_some_rank_cannot_keep_is_refused_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrifusion.strategies.budget.CHUNKS", (1 << 20,))  # one rehearsal
    x, settings = latents("sdxl", 1, 8, 8), conditioning("sdxl", 1)
    limit = LIBRARIES + sum(weight.numel() * 4 for weight in build("sdxl").parameters()) + 5_000

    def rank(comm: Comm) -> str:
        model = df.parallelize(build("sdxl"), ParallelConfig(strategy="sync", max_memory=limit), comm)
        with pytest.raises(df.ConfigError, match="too little for the denoiser") as caught:
            model(x, 321, **settings)
        return str(caught.value)

    assert len(set(df.run_ranks(2, rank))) == 1


@pytest.mark.parametrize(
    ("given", "num_bytes"),
    [(1, 1), ("4GiB", 4 << 30), ("1.5MiB", 3 << 19), ("512KiB", 1 << 19), ("2TiB", 2 << 40), ("99", 99), (None,) * 2],
)
def test_sizes(given: Any, num_bytes: int | None) -> None:
    assert ParallelConfig(max_memory=given).max_memory == num_bytes


@pytest.mark.parametrize(
    "given", [0, -1, True, 1.5, "4GB", "4 GiB", "GiB", "0GiB", "0", "-1GiB", "1e3MiB", "4gib", "4GiB ", "٤GiB", ""]
)
def test_sizes_that_are_none(given: Any) -> None:
    with pytest.raises(df.ConfigError, match=r"^max_memory=.* must be a positive number of bytes, or a size"):
        ParallelConfig(max_memory=given)


# Frames of a video


@pytest.mark.parametrize("call", [decoded, encoded])
def test_frames_of_a_video_take_what_is_predicted(call: Callable[[Any, Tensor], Tensor]) -> None:
    """What is kept of the frames before is part of it, and so are those that are made."""
    sizes = {"base_dim": 32, "z_dim": 16, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]}
    vae = diffusers.AutoencoderKLWan(**sizes).eval().requires_grad_(False)
    df.parallelize(vae, ParallelConfig(max_memory=PLENTY))
    x = torch.randn(1, 16, 3, 72, 72) if call is decoded else torch.randn(1, 3, 9, 144, 144)
    call(vae, x[:, :, :1].clone())
    (alone,) = (fit.peak for fit in vae._distrifusion.budget.fits.values())
    call(vae, x)
    peak = measured(lambda: call(vae, x))
    (predicted,) = (fit.peak for fit in vae._distrifusion.budget.fits.values())
    assert abs(peak - predicted) <= TENTH * predicted + SMALL
    assert predicted > alone


@pytest.mark.parametrize("name", ["qwen", "wan", "wan-2.2"])
@pytest.mark.parametrize(("world", "split"), [(3, "rows"), (5, "cols")])
def test_frames_of_a_video_on_uneven_ranks_equal_one_device(name: str, world: int, split: Any) -> None:
    """Each rehearses the largest patch, which has another past than its own; some have no row of latent."""
    few, more, pixels = latents_of(name, 1, 1, 2, frames=2), latents_of(name, 1, 4, 7, frames=3), (16 * 4, 16 * 7)
    for call, x in ((decoded, few), (decoded, more), (encoded, pixels_of(name, 1, *pixels, frames=9))):
        truth = call(build_vae(name), x)
        for result in on_ranks(name, world, x, call, split=split):
            assert distance(result, truth) <= EXACT
