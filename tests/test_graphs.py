"""Recorded steps: played, they give what steps that run give, and say the same to the peers.

On the CPU, by an emulation of what CUDA graphs do (playing.py); at the end, the same on a GPU where there is one.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import distrifusion as df
from distrifusion.comm import Comm
from distrifusion.comm.stopwatch import HostStopwatch
from distrifusion.comm.tape import RECORDERS, CudaRecorder, Tape
from models import build, conditioning, distance, latents
from pipelines import NUMPY_WARNINGS, controlnet, picture, sample, sd, sdxl
from playing import PlayedRecorder
from test_balance import rows_by_step
from transformers_cross import CROSS
from transformers_joint import JOINT
from transformers_tiny import build as build_transformer

EXACT = 1e-6  # the same operations on the same values, in other memory, for which a kernel may sum in another order

pytestmark = NUMPY_WARNINGS
CPU = torch.device("cpu")
UNET = "class-labels"  # two levels, and one of everything in each
SEAMS = ("halo", "context", "moments", "chunk", "output")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDERS, "cpu", PlayedRecorder)


def unet_calls(num: int, batch: int = 1, size: tuple[int, int] = (11, 6), name: str = UNET) -> list[dict[str, Any]]:
    """Latents, and everything else, that change from step to step; the text is of one picture."""
    text = conditioning(name, batch)
    first, second = latents(name, batch, *size, seed=5), latents(name, batch, *size, seed=6)
    return [{"sample": first + 0.5 * i * second, "timestep": 900 - 50 * i, **text} for i in range(num)]


def predictions(make: Any, config: df.ParallelConfig, pictures: list[list[dict[str, Any]]], world: int) -> Any:
    """Of every rank: the predictions of all steps, and what was sent, by kind."""

    def rank(comm: Comm) -> tuple[list[Tensor], dict[str, tuple[int, int]]]:
        model = df.parallelize(make(), config, comm)
        found = []
        for calls in pictures:
            df.reset(model)
            with torch.no_grad():
                found += [model(**call)[0] for call in calls]
        df.reset(model)  # waits for what is under way, so that it is counted
        return found, {kind: (comm.meter.messages[kind], comm.meter.bytes[kind]) for kind in SEAMS}

    return df.run_ranks(world, rank)


def check_played(make: Any, pictures: list[list[dict[str, Any]]], world: int, **settings: Any) -> None:
    eager = predictions(make, df.ParallelConfig(**settings), pictures, world)
    played = predictions(make, df.ParallelConfig(**settings, cuda_graphs=True), pictures, world)
    for (found, sent), (wanted, sent_before) in zip(played, eager, strict=True):
        assert [distance(a, b) <= EXACT for a, b in zip(found, wanted, strict=True)] == [True] * len(wanted)
        assert sent == sent_before


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("strategy", "world", "batch", "more"),
    [
        ("sync", 3, 2, {"split": "cols"}),
        ("displaced", 2, 1, {"group_norm": "carried"}),
        ("displaced", 3, 2, {"topology": "ring-x"}),
        ("displaced", 5, 1, {"group_norm": "sync", "context_window": 0.5}),
        ("naive", 3, 1, {}),
    ],
)
def test_played_steps_of_a_unet_are_those_that_run(strategy: Any, world: int, batch: int, more: Any) -> None:
    """A picture's steps: as they are, recorded, played; and of displaced so once more. Two pictures of two sizes."""
    num = 8 if strategy == "displaced" else 4
    warmup = {"warmup_steps": 2} if strategy == "displaced" else {}
    pictures = [unet_calls(num, batch, (18, 6)), unet_calls(num, batch, (11, 8))]
    check_played(lambda: build(UNET), pictures, world, strategy=strategy, **warmup, **more)


@pytest.mark.usefixtures("on_cpu")
def test_a_played_step_asks_no_module() -> None:
    """Of eight steps two of each kind do: the first, and the one that is recorded."""
    asked: list[int] = []

    def make() -> nn.Module:
        model = build(UNET)
        model.conv_in.register_forward_pre_hook(lambda *_: asked.append(1))
        return model

    config = df.ParallelConfig(warmup_steps=3, cuda_graphs=True)
    predictions(make, config, [unet_calls(8), unet_calls(8)], 2)
    assert len(asked) == 2 * 2 * 4  # ranks, pictures


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("table", "name"), [(JOINT, "flux"), (JOINT, "sd3"), (CROSS, "pixart"), (CROSS, "sana")])
def test_played_steps_of_transformers_are_those_that_run(table: Any, name: str) -> None:
    tiny = table[name]
    given, noise = tiny.arguments(2, 5, 4), tiny.arguments(2, 5, 4)[tiny.latents].flip(-1)
    calls = [{**given, tiny.latents: given[tiny.latents] + 0.2 * i * noise} for i in range(6)]
    check_played(lambda: build_transformer(tiny), [calls], 2, strategy="displaced", warmup_steps=1)


def controlled() -> Any:
    return sd(diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet())


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("make", "world", "cfg"), [(sd, 4, 2), (sdxl, 2, 1), (controlled, 2, 1)], ids=["sd", "sdxl", "controlnet"]
)
def test_pictures_of_pipelines_are_the_same(make: Any, world: int, cfg: int) -> None:
    """Two with one pipeline: the second has another prompt, and so other text, in the same memory or not."""
    config = df.ParallelConfig(warmup_steps=1, cfg=cfg)
    is_controlled = make is controlled
    more = {"image": picture(), "control_guidance_end": 0.8, "height": ..., "width": ...} if is_controlled else {}

    def paint(config: df.ParallelConfig) -> list[list[Tensor]]:
        def rank(comm: Comm) -> list[Tensor]:
            pipe = df.parallelize(make(), config, comm)
            return [sample(pipe, prompt, num_inference_steps=7, **more) for prompt in ("a hill", "the sea")]

        return df.run_ranks(world, rank)

    for found, wanted in zip(paint(replace(config, cuda_graphs=True)), paint(config), strict=True):
        assert max(distance(one, other) for one, other in zip(found, wanted, strict=True)) <= EXACT
        assert distance(found[0], found[1]) > 1e-2


@pytest.mark.usefixtures("on_cpu")
def test_steps_recorded_in_inference_mode_are_played_outside_of_it() -> None:
    config = df.ParallelConfig(warmup_steps=3, cuda_graphs=True)
    calls = unet_calls(9)

    def rank(comm: Comm, modes: tuple[Any, ...]) -> list[Tensor]:
        model, results = df.parallelize(build(UNET), config, comm), []
        for i, call in enumerate(calls):
            with modes[i % len(modes)]():
                results.append(model(**call)[0].clone())
        return results

    modes = torch.inference_mode, torch.inference_mode, torch.no_grad
    wanted = df.run_ranks(2, lambda comm: rank(comm, (torch.no_grad,)))
    for found, truth in zip(df.run_ranks(2, lambda comm: rank(comm, modes)), wanted, strict=True):
        assert max(distance(one, other) for one, other in zip(found, truth, strict=True)) <= EXACT


@pytest.mark.usefixtures("on_cpu")
def test_rows_that_change_are_recorded_anew() -> None:
    """``balance="measured"`` moves them once; what was recorded is about others."""
    config = df.ParallelConfig(strategy="sync", balance="measured", warmup_steps=4, cuda_graphs=True)
    calls = unet_calls(9, size=(16, 8))
    plain = build(UNET)
    wanted = [plain(**call)[0] for call in calls]

    def rank(comm: Comm) -> tuple[list[Tensor], list[tuple[int, ...]]]:
        model = df.parallelize(build(UNET), config, comm)
        ticks = count(step=(1.0, 3.0)[comm.rank])  # played steps pass no hook: a rank's time goes on when it is asked
        model._distrifusion._balance.watch = HostStopwatch(lambda: next(ticks))
        return rows_by_step(model, [partial(lambda call: model(**call)[0], call) for call in calls])

    for found, rows in df.run_ranks(2, rank):
        assert rows[0] == (8, 8) != rows[-1]
        assert len(set(rows)) == 2
        assert max(distance(one, other) for one, other in zip(found, wanted, strict=True)) <= 1e-5


@pytest.mark.usefixtures("on_cpu")
def test_a_model_that_looks_at_values_is_refused_in_one_line() -> None:
    def make() -> nn.Module:
        model = build(UNET)
        model.conv_in.register_forward_hook(lambda _, __, result: result if result.sum().item() else -result)
        return model

    with pytest.raises(
        df.UnsupportedModel, match=r"^cuda_graphs=True: UNet2DConditionModel cannot be recorded \(.*\); leave it out$"
    ):
        predictions(make, df.ParallelConfig(strategy="sync", cuda_graphs=True), [unet_calls(3)], 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "shifted"}, "cuda_graphs=True is known for strategy='sync', 'displaced', 'naive'"),
        ({"strategy": "pipelined"}, "not for 'pipelined'; leave it out"),
        ({"codec": "int8"}, "cuda_graphs=True does not go with codec='int8'"),
        ({"max_memory": "4GiB"}, "cuda_graphs=True does not go with max_memory="),
        ({"cuda_graphs": "yes"}, "cuda_graphs='yes' must be True or False"),
    ],
)
def test_what_cannot_be_recorded_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(df.ConfigError) as caught:
        df.ParallelConfig(**{"cuda_graphs": True, **settings})
    assert message in str(caught.value)


def test_ranks_on_the_cpu_are_refused() -> None:
    with pytest.raises(df.ConfigError, match="needs ranks on CUDA devices, not on 'cpu'"):
        df.run_ranks(2, lambda comm: df.parallelize(build(UNET), df.ParallelConfig(cuda_graphs=True), comm))


def test_a_tape_does_what_was_recorded_in_order() -> None:
    """Values come from where they lay, the host's part is done between, and results stay in their place."""
    given, seen = torch.ones(2), []
    tape = Tape(PlayedRecorder(CPU))

    def work() -> Tensor:
        twice = given * 2
        tape.host(lambda: seen.append(twice.tolist()))
        return twice.add_(1).view(1, 2)[0] + given

    result = tape.record(work)
    assert result.tolist() == [4, 4]
    given.fill_(5)
    tape.play()
    assert (result.tolist(), seen) == ([16, 16], [[2, 2], [10, 10]])


def test_a_tape_that_fails_leaves_nothing_open() -> None:
    tape = Tape(PlayedRecorder(CPU))
    with pytest.raises(RuntimeError, match="not permitted"):
        tape.record(lambda: torch.ones(1).item())
    assert torch.ones(1).item() == 1


# --- where there is a GPU ---

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@on_cuda
def test_a_tape_of_cuda_graphs() -> None:
    """A model in two graphs with a host in between, on another input each time."""
    model = build(UNET).cuda()
    given, text = latents(UNET, 1, 16, 16).cuda(), {k: v.cuda() for k, v in conditioning(UNET, 1).items()}
    time, held = torch.tensor(500, device="cuda"), torch.zeros(4, device="cuda")
    tape = Tape(CudaRecorder(given.device))

    def work() -> Tensor:
        first = model(given, time, **text).sample
        tape.host(lambda: held.copy_(first.flatten()[:4]))
        return first + held.sum()

    with torch.no_grad():
        for _ in range(2):  # libraries warm up
            model(given, time, **text)
        result = tape.record(work)
        for step in range(3):
            given.add_(0.1 * step)
            tape.play()
            wanted = model(given, time, **text).sample
            assert distance(result.cpu(), (wanted + wanted.flatten()[:4].sum()).cpu()) <= 1e-4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA devices here")
@pytest.mark.parametrize("strategy", ["sync", "displaced"])
def test_played_steps_over_nccl(strategy: str) -> None:
    torch.multiprocessing.spawn(_nccl_rank, args=(2, "29517", strategy), nprocs=2)


def _nccl_rank(rank: int, world: int, port: str, strategy: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    calls, results = unet_calls(8), []
    for graphs in (False, True):
        config = df.ParallelConfig(strategy=strategy, warmup_steps=3, cuda_graphs=graphs)
        model = df.parallelize(build(UNET).cuda(rank), config)
        with torch.no_grad():
            moved = [{name: v.cuda(rank) if isinstance(v, Tensor) else v for name, v in call.items()} for call in calls]
            results.append([model(**call)[0].cpu() for call in moved])
        df.restore(model)
    assert max(distance(one, other) for one, other in zip(*results, strict=True)) <= 1e-4
