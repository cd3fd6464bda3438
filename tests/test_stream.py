"""Patches that stream through the stages of a transformer: what each step gives, what it sends, and what waits."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import distrifusion as df
from distrifusion.comm import Comm
from distrifusion.metrics import Report
from distrifusion.painter import Painter, Request, Setup
from distrifusion.strategies.streaming import Streaming
from distrifusion.stream import Back, Links, Pass
from models import build as build_unet
from models import distance
from pipelines import NUMPY_WARNINGS, check
from stream_jobs import paints
from stream_reference import StreamReference
from test_pipelined_transformers import calls, whole
from test_pipelines_cross import PIPELINES
from test_pipelines_joint import CASES
from test_transformers import COLS, EXACT, MODELS, ROWS, first
from tiny_folders import save
from transformers_tiny import build

pytestmark = [
    pytest.mark.usefixtures("unread_memory_is_nan"),
    *NUMPY_WARNINGS,
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]


def streamed(**settings: Any) -> df.ParallelConfig:
    return df.ParallelConfig(**{"strategy": "pipelined", "patches": 3, "warmup_steps": 0, **settings})


def on_ranks(
    name: str, world: int, config: df.ParallelConfig, given: list[dict[str, Any]]
) -> list[tuple[list[Tensor], Report]]:
    def rank(comm: Comm) -> tuple[list[Tensor], Report]:
        model = df.parallelize(build(MODELS[name]), config, comm)
        return [first(model(**each)) for each in given], df.report(model)

    return df.run_ranks(world, rank)


def num_blocks(name: str) -> int:
    """Blocks over image tokens."""
    model = build(MODELS[name])
    kinds = ("blocks", "layers", "noise_refiner")
    return sum(len(each) for part, each in model.named_children() if part.endswith(kinds) and "context" not in part)


# --- what each step gives ---


@pytest.mark.parametrize("name", MODELS)
def test_a_held_input_is_exact_in_the_end(name: str) -> None:
    """Keys of block n stem from the step before through n blocks at most."""
    num_held = num_blocks(name) + 1
    world = min(num_held - 1, 3)
    one, other = calls(name, 2)
    before, after = whole(name, one), whole(name, other)
    ran = on_ranks(name, world, streamed(), [one, one, *[other] * num_held])
    for results, report in ran:
        assert report.kinds == ["sync"] + ["pipelined"] * (num_held + 1)
        assert len(report.stages) == world
        assert all(report.stages)
        assert sum(report.patches) > 0
        assert all(distance(result, before) <= EXACT for result in results[:2])
        assert distance(results[2], after) > 10 * EXACT
        assert distance(results[-1], after) <= EXACT
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results, ran[0][0], strict=True))


@pytest.mark.parametrize(
    ("name", "split", "patches"), [("flux", "cols", 5), ("wan", "frames", 2), ("hunyuan", "rows", 7)]
)
def test_every_number_of_patches_and_every_split(name: str, split: Any, patches: int) -> None:
    one, other = calls(name, 2)
    after = whole(name, other)
    ran = on_ranks(name, 2, streamed(split=split, patches=patches), [one, *[other] * (num_blocks(name) + 1)])
    for results, report in ran:
        assert len(report.patches) == patches
        assert distance(results[-1], after) <= EXACT


@pytest.mark.parametrize(("name", "world"), [("pixart", 2), ("flux", 3)])
def test_patches_see_those_before_fresh_and_those_after_one_step_old(name: str, world: int) -> None:
    given = calls(name, 5)
    is_map = name == "pixart"
    bounds = [0, 3, 5, 7]  # rows of tokens
    size, dim = (2, 2) if is_map else (COLS, 1)
    rows = [slice(size * start, size * stop) for start, stop in pairwise(bounds)]
    attentions = [n for n, _ in build(MODELS[name]).named_modules() if n.endswith((".attn", ".attn1"))]
    reference = StreamReference(build(MODELS[name]), attentions, [COLS * bound for bound in bounds], 2)
    wanted = [reference.step(rows, dim, **each) for each in given]
    fresh = [whole(name, each) for each in given]
    for results, report in on_ranks(name, world, streamed(warmup_steps=1), given):
        assert report.patches == tuple((2 if is_map else 1) * (b - a) for a, b in pairwise(bounds))
        for i, result in enumerate(results):
            assert distance(result, wanted[i]) <= EXACT, i
            assert (distance(result, fresh[i]) > 10 * EXACT) == (i > 1), i


@pytest.mark.parametrize("name", ["sd3", "sana"])
def test_one_patch_is_exact_in_every_step(name: str) -> None:
    given = calls(name, 3)
    for results, report in on_ranks(name, 3, streamed(patches=1), given):
        assert report.kinds == ["sync", "pipelined", "pipelined"]
        assert all(distance(result, whole(name, each)) <= EXACT for result, each in zip(results, given, strict=True))


def test_a_warm_up_as_long_as_the_run_is_exact() -> None:
    given = calls("hunyuan", 3)
    for world in (2, 3):
        for results, report in on_ranks("hunyuan", world, streamed(warmup_steps=2), given):
            assert report.kinds == ["sync"] * 3
            assert all(
                distance(mine, whole("hunyuan", each)) <= EXACT for mine, each in zip(results, given, strict=True)
            )


def test_branches_of_guidance_on_ranks_of_their_own() -> None:
    given = calls("pixart", 4)
    alone = on_ranks("pixart", 2, streamed(), given)[0][0]
    for results, report in on_ranks("pixart", 4, streamed(cfg=2), given):
        assert report.mesh == "cfg 2 x pipe 2 x patch 1"
        assert all(distance(mine, theirs) <= EXACT for mine, theirs in zip(results, alone, strict=True))


# --- what is sent ---


def test_a_step_sends_each_patch_once_over_each_link() -> None:
    """HunyuanDiT's skips go along with the patch: outputs of the first stage that the last one reads."""
    for name, num_tensors in (("pixart", 1), ("hunyuan", 3)):
        given = calls(name, 4)
        (_, report), (_, last) = on_ranks(name, 2, streamed(), given)
        width = build(MODELS[name]).inner_dim
        boundary = num_tensors * 4 * 2 * ROWS * COLS * width
        prediction = last.bytes[-1]
        assert report.messages[2:] == [3 + 1] * 2
        assert report.bytes[2:] == [boundary + prediction] * 2
        assert last.messages[2:] == [1] * 2


# --- no step waits for the one before ---


@pytest.mark.usefixtures("all_at_once")
def test_the_first_stage_is_in_the_next_step_while_the_last_one_is_in_this_one() -> None:
    """The last stage does not finish its last patch before the first stage has begun the next step."""
    case, num_patches, late = CASES["FLUX"], 3, {}
    has_begun = threading.Event()

    def rank(comm: Comm) -> Tensor:
        pipe = df.parallelize(case.make(), streamed(), comm)
        counts = [0, 0]

        def enter(module: Any, *_: Any) -> None:
            counts[0] += 1
            if comm.rank == 0 and counts[0] == 1 + 2 * num_patches + 1:  # of step 3, after a whole and two streamed
                has_begun.set()

        def leave(module: Any, *_: Any) -> None:
            counts[1] += 1
            if comm.rank == 1 and counts[1] == 1 + 2 * num_patches:  # the last patch of step 2
                late[0] = not has_begun.wait(20)

        pipe.transformer.transformer_blocks[0].register_forward_pre_hook(enter)
        pipe.transformer.single_transformer_blocks[-1].register_forward_pre_hook(leave)
        return case.call(pipe, num_inference_steps=5)

    results = df.run_ranks(2, rank)
    assert late == {0: False}
    assert torch.equal(*results)


@pytest.mark.parametrize(("world", "num_patches"), [(2, 3), (3, 3), (3, 5)])
def test_stages_stand_still_once_per_picture(world: int, num_patches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a pass takes one unit of time on each rank and a message none: M S + N - 1 units, and not M + N - 1 a step.

    The time is reckoned along the messages: a rank goes on when what it waits for was sent.
    """
    case, num_steps = CASES["FLUX"], 4  # whose passes go over the links
    now, begun = dict.fromkeys(range(world), 0), dict.fromkeys(range(world), 0)
    sent: dict[int, list[int]] = {rank: [] for rank in range(world)}  # at what times, over the link to the next rank
    heard, launched = dict.fromkeys(range(world), 0), dict.fromkeys(range(world), 0)
    back: list[int] = []  # at what times patches were done

    def me() -> int:
        return int(threading.current_thread().name.removeprefix("rank-"))

    send, launch, arrive, step = Links.send, Back.launch, Pass._arrive, Streaming.step
    numbers: dict[int, int] = {}

    def sends(self: Links, words: Tensor) -> None:
        now[me()] += 1
        sent[me()].append(now[me()])
        send(self, words)

    def launches(self: Back, *args: Any) -> Back.Coming:
        rank = me()
        if rank == world - 1:
            now[rank] += begun[rank] > 2
            back.append(now[rank])
        coming = launch(self, *args)
        numbers[id(coming.pending)], launched[rank] = launched[rank], launched[rank] + 1
        return coming

    def arrives(self: Pass) -> None:
        is_awaited = self._arriving is not None
        arrive(self)
        if is_awaited:
            rank = me()
            now[rank] = max(now[rank], sent[rank - 1][heard[rank]])
            heard[rank] += 1

    def waits(self: Back.Coming) -> Tensor:
        self.pending.wait()
        now[me()] = max(now[me()], back[numbers[id(self.pending)]])
        return self.parts[0]

    def steps(self: Streaming, *args: Any, **kwargs: Any) -> Any:
        begun[me()] += 1
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Links, "send", sends)
    monkeypatch.setattr(Back, "launch", launches)
    monkeypatch.setattr(Pass, "_arrive", arrives)
    monkeypatch.setattr(Back.Coming, "wait", waits)
    monkeypatch.setattr(Streaming, "step", steps)

    def rank(comm: Comm) -> None:
        pipe = df.parallelize(case.make(), streamed(patches=num_patches), comm)
        case.call(pipe, num_inference_steps=2 + num_steps + 1)  # whole, taught shapes; the last one is gathered

    df.run_ranks(world, rank)
    assert back[-1] == num_patches * num_steps + world - 1


@pytest.mark.parametrize("name", ["FLUX", "SD3", "Qwen-Image", "Z-Image", "HunyuanDiT", "PixArtSigma", "Sana"])
@pytest.mark.parametrize("cfg", [1, 2])
def test_latents_under_way_are_what_whole_ones_would_be(name: str, cfg: int) -> None:
    make, call = (CASES[name].make, CASES[name].call) if name in CASES else PIPELINES[name]

    def rank(comm: Comm, is_whole: bool) -> tuple[Tensor, Report]:
        pipe = df.parallelize(make(), streamed(cfg=cfg), comm)
        if is_whole:
            forward = pipe.transformer.forward

            def and_wait(*args: Any, **kwargs: Any) -> Any:
                result = forward(*args, **kwargs)
                values = result[0] if isinstance(result[0], list) else [result[0]]
                values = [value.whole() if hasattr(value, "whole") else value for value in values]
                return (values if isinstance(result[0], list) else values[0],)

            pipe.transformer.forward = and_wait
        result = call(pipe)
        return result, df.report(pipe)

    coming = df.run_ranks(2 * cfg, lambda comm: rank(comm, False))
    there = df.run_ranks(2 * cfg, lambda comm: rank(comm, True))
    is_paired = cfg == 2 and name in ("FLUX", "Qwen-Image")  # one picture for each half of the ranks
    for (result, report), (wanted, other) in zip(coming, there, strict=True):
        assert type(result) is Tensor
        assert torch.equal(result, wanted)
        assert any("wait for each other" in note for note in report.notes) == is_paired
        assert any("wait for each other" in note for note in other.notes)


@pytest.mark.parametrize("name", ["FLUX", "Z-Image"])
def test_a_pipeline_is_exact_while_it_warms_up(name: str) -> None:
    check(CASES[name].make, CASES[name].call, config=streamed(warmup_steps=1000))


def test_two_pictures_in_a_row_are_each_that_of_a_fresh_start() -> None:
    case = CASES["SD3"]

    def rank(comm: Comm) -> list[Tensor]:
        pipe = df.parallelize(case.make(), streamed(), comm)
        return [case.call(pipe), case.call(pipe, height=80), case.call(pipe)]

    results = df.run_ranks(2, rank)[0]
    alone = df.run_ranks(2, lambda comm: case.call(df.parallelize(case.make(), streamed(), comm)))[0]
    assert torch.equal(results[0], alone)
    assert torch.equal(results[2], alone)
    assert results[1].shape != alone.shape


def test_processes_give_what_threads_give(pool: Any) -> None:
    wanted = df.run_ranks(3, paints)[0]
    assert all(torch.equal(mine, wanted) for mine in pool.run(paints, 3))


# --- weights ---


@pytest.mark.parametrize(("name", "world"), [("hunyuan", 3), ("pixart", 2)])
def test_a_rank_holds_the_weights_of_its_stage_only(name: str, world: int) -> None:
    given = calls(name, 3)
    wanted = on_ranks(name, world, streamed(), given)[0][0]

    def rank(comm: Comm) -> tuple[int, int, list[Tensor], bool]:
        model = build(MODELS[name])
        before = {key: weight.clone() for key, weight in model.named_parameters()}
        df.parallelize(model, streamed(blocks="freed"), comm)
        in_blocks = [key for key in before if "blocks." in key]
        held = sum(weight.nbytes for key, weight in model.named_parameters() if key in in_blocks)
        assert all(w.numel() for key, w in model.named_parameters() if key not in in_blocks)
        results = [first(model(**each)) for each in given]
        df.restore(model)
        is_back = all(torch.equal(weight, before[key]) for key, weight in model.named_parameters())
        return held, sum(before[key].nbytes for key in in_blocks), results, is_back

    for held, in_all, results, is_back in df.run_ranks(world, rank):
        assert held <= 1.15 / world * in_all
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results, wanted, strict=True))
        assert is_back


def test_a_folder_is_painted_by_ranks_that_hold_their_stage(tmp_path: Path) -> None:
    path = str(save("flux", tmp_path / "flux"))
    words = {"prompt": "a hill", "height": 80, "width": 48, "num_inference_steps": 2, "output_type": "np"}
    request = Request(3, words)
    truth = torch.from_numpy(np.asarray(Painter(Setup(path, df.ParallelConfig())).paint(request).images))
    painters = [Painter(Setup(path, streamed(warmup_steps=8)), place, 2) for place in range(2)]

    def rank(comm: Comm) -> tuple[Tensor, list[bool]]:
        painter = painters[comm.rank]
        painter.join(comm)
        transformer = painter.pipeline.transformer
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        held = [any(weight.numel() for weight in block.parameters()) for block in blocks]
        return torch.from_numpy(np.asarray(painter.paint(request).images)), held

    ran = df.run_ranks(2, rank)
    assert all(distance(result, truth) <= EXACT for result, _ in ran)
    assert all(one != other for one, other in zip(ran[0][1], ran[1][1], strict=True))


# --- in place, and errors ---


def test_restore_leaves_no_trace() -> None:
    (given,) = calls("hunyuan-video", 1)
    truth = whole("hunyuan-video", given)

    def rank(comm: Comm) -> tuple[Tensor, bool]:
        model = df.parallelize(build(MODELS["hunyuan-video"]), streamed(), comm)
        for _ in range(3):
            model(**given)
        df.restore(model)
        return first(model(**given)), not any("forward" in module.__dict__ for module in model.modules())

    for result, is_clean in df.run_ranks(2, rank):
        assert torch.equal(result, truth)
        assert is_clean


def test_an_error_inside_a_step_leaves_the_model_usable() -> None:
    one, other = calls("pixart", 2)
    truth = whole("pixart", other)

    def rank(comm: Comm) -> list[Tensor]:
        model = df.parallelize(build(MODELS["pixart"]), streamed(), comm)
        for num_calls in (0, 1, 2):
            for _ in range(num_calls):
                model(**one)

            def fail(*_: Any) -> None:
                raise ArithmeticError("in the middle of a step")

            handle = model.transformer_blocks[1].register_forward_pre_hook(fail)
            with pytest.raises(ArithmeticError, match="in the middle of a step"):
                model(**one)
            handle.remove()
        return [first(model(**other)) for _ in range(3)]

    for results in df.run_ranks(2, rank):
        assert all(distance(result, truth) <= EXACT for result in results)


@pytest.mark.parametrize("lost", [0, 2])
def test_a_lost_stage_is_lost_to_all(lost: int) -> None:
    (given,) = calls("flux", 1)
    heard: dict[int, str] = {}

    def rank(comm: Comm) -> None:
        model = df.parallelize(build(MODELS["flux"]), streamed(), comm)
        for _ in range(3):
            model(**given)
        if comm.rank == lost:
            raise ArithmeticError("only here")
        try:
            model(**given)
        except df.PeerLost as loss:
            heard[comm.rank] = str(loss)

    with pytest.raises(ArithmeticError, match="only here"):
        df.run_ranks(3, rank, timeout=20)
    assert sorted(heard) == [rank for rank in range(3) if rank != lost]
    assert all(f"rank {lost} failed: ArithmeticError: only here" in message for message in heard.values())


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    (given,) = calls("pixart", 1)

    def rank(comm: Comm) -> None:
        message = "PixArtTransformer2DModel of 2 blocks cannot be cut into 3 stages: pipe=2 is the most"
        with pytest.raises(df.ConfigError, match=message):
            df.parallelize(build(MODELS["pixart"]), streamed(), comm)
        with pytest.raises(df.UnsupportedModel, match="are for transformers, not for UNet2DConditionModel"):
            df.parallelize(build_unet("sd15"), streamed(), comm)

    df.run_ranks(3, rank)

    def other(comm: Comm) -> None:
        model = df.parallelize(build(MODELS["pixart"]), streamed(patches=8), comm)
        message = "patches=8 are more than the 7 rows of tokens of this picture: patches=7 is the most"
        with pytest.raises(df.ConfigError, match=message):
            model(**given)

    df.run_ranks(2, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patches": 0}, "patches=0 must be a whole number of at least 1"),
        ({"strategy": "sync"}, "patches=3 goes with strategy='pipelined' only, not with 'sync'"),
        ({"balance": "measured", "warmup_steps": 1}, "balance='measured' does not go with patches=3"),
        ({"patches": None, "blocks": "freed"}, "blocks='freed' goes with strategy='pipelined' and patches only"),
        ({"codec": "int8"}, "codec='int8' does nothing under strategy='pipelined'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(df.ConfigError, match=message):
        streamed(**settings)
