"""Diffusion transformers in patches: exact in sync, exact where the input is held, and each class of the plans."""

from __future__ import annotations

import fnmatch
import inspect
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

import distrifusion as df
from distrifusion.models.plan import Plan
from distrifusion.models.plans import PLANS
from models import distance
from transformers_cross import CROSS
from transformers_joint import JOINT
from transformers_tiny import build
from transformers_video import VIDEO

MODELS = {**CROSS, **JOINT, **VIDEO}

# Of diffusers, by its own Chroma.
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")

# Float32 sums in another order: attention over keys in the same order rounds alike, columns put them in another.
EXACT = 1e-5
ROWS, COLS = 7, 5  # tokens: no multiple of any world


def first(result: Any) -> Tensor:
    sample: Any = result[0]
    return torch.stack(list(sample)) if isinstance(sample, list) else sample


def one_device(name: str, arguments: dict[str, Any]) -> Tensor:
    """Without what is predicted for further pictures, which no pipeline reads."""
    whole = first(build(MODELS[name])(**arguments))
    return whole.narrow(1, 0, whole.shape[1] - MODELS[name].guests(ROWS, COLS))


def on_ranks(
    name: str, world: int, config: df.ParallelConfig, arguments: dict[str, Any], steps: int = 1
) -> list[list[Tensor]]:
    """Every rank's results of some calls with the same arguments."""

    def rank(comm: Any) -> list[Tensor]:
        model = df.parallelize(build(MODELS[name]), config, comm)
        return [first(model(**arguments)) for _ in range(steps)]

    return df.run_ranks(world, rank)


def test_every_plan_is_tested() -> None:
    assert {type(build(tiny)) for tiny in MODELS.values()} == {plan.model for plan in PLANS}


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.model.__name__)
def test_a_plan_names_what_its_class_has(plan: Plan) -> None:
    """A renamed argument would be taken for one that is not given: never cut, never refused, never told apart."""
    arguments = inspect.signature(plan.model.forward).parameters
    for name in (plan.sample, *plan.lists, *plan.several, *plan.shared, *plan.cuts, *plan.conditions, *plan.unknown):
        assert name in arguments
    for name in plan.methods:
        assert callable(getattr(plan.model, name))
    models = [model for model in map(build, MODELS.values()) if type(model) is plan.model]
    modules = [name for model in models for name, _ in model.named_modules()]
    # Not `texts`: some belong to adapters, and an attention that no pattern names is refused.
    patterns = [*plan.entries, *plan.seams, *plan.sums, *plan.inputs, *plan.convs, *plan.sides, plan.exit]
    # Not those of `prompts` for pictures beside the text, or made by fusing projections.
    patterns += [name for name in plan.prompts if name.endswith((".to_k", ".to_v", "_projection", "text_embedder"))]
    assert [pattern for pattern in patterns if not fnmatch.filter(modules, pattern)] == []


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("world", "split", "batch"), [(2, "rows", 1), (3, "cols", 2), (5, "rows", 2)])
def test_sync_equals_one_device(name: str, world: int, split: Any, batch: int) -> None:
    arguments = MODELS[name].arguments(batch, ROWS, COLS)
    truth = one_device(name, arguments)
    assert truth.isfinite().all()
    for (result,) in on_ranks(name, world, df.ParallelConfig(strategy="sync", split=split), arguments):
        assert result.shape == truth.shape
        assert distance(result, truth) <= EXACT


@pytest.mark.parametrize("name", MODELS)
def test_without_exchange_the_result_is_another(name: str) -> None:
    """What the other tests find equal depends on what the ranks say to each other."""
    arguments = MODELS[name].arguments(1, ROWS, COLS)
    (result,) = on_ranks(name, 2, df.ParallelConfig(strategy="naive"), arguments)[0]
    assert distance(result, one_device(name, arguments)) > 1000 * EXACT


@pytest.mark.parametrize(("name", "world"), list(zip(MODELS, cycle((2, 3)), strict=False)))
def test_displaced_with_a_held_input_equals_sync_in_few_messages(name: str, world: int) -> None:
    arguments = MODELS[name].arguments(2, ROWS, COLS)
    truth = one_device(name, arguments)

    def rank(comm: Any) -> Any:
        model = df.parallelize(build(MODELS[name]), df.ParallelConfig(strategy="displaced", warmup_steps=0), comm)
        return [first(model(**arguments)) for _ in range(3)], df.report(model)

    for results, report in df.run_ranks(world, rank):
        assert report.kinds == ["sync", "displaced", "displaced"]
        assert all(distance(result, truth) <= EXACT for result in results)
        assert max(report.messages[1:]) <= 8


@pytest.mark.parametrize(
    ("name", "world", "split"),
    [*((name, 2, "rows") for name in MODELS), ("pixart", 3, "cols"), ("lumina2", 5, "rows"), ("wan", 3, "cols")],
)
def test_patches_that_move_and_remember_come_to_equal_one_device(name: str, world: int, split: Any) -> None:
    """With a held input, without a message: each round over the picture makes one more block exact."""
    arguments = MODELS[name].arguments(2, ROWS, COLS)
    truth = one_device(name, arguments)
    config = df.ParallelConfig(strategy="shifted", warmup_steps=0, split=split)
    for results in on_ranks(name, world, config, arguments, 6 * world):
        assert distance(results[0], truth) > 1000 * EXACT  # nothing is known yet
        # Of sums over tokens, visits that overlap can only be taken in proportion: here no patches are equal.
        bound = 0.5 * distance(results[0], truth) if name == "sana" else EXACT
        assert min(distance(result, truth) for result in results[-world:]) <= bound


@pytest.mark.parametrize(("name", "world"), list(zip(MODELS, cycle((2, 3, 5)), strict=False)))
def test_patches_that_move_know_what_a_synchronous_step_has_told_them(name: str, world: int) -> None:
    """Of the picture all there is, and of the text, which each of them computes, nothing twice."""
    arguments = MODELS[name].arguments(2, ROWS, COLS)
    truth = one_device(name, arguments)
    config = df.ParallelConfig(strategy="shifted", warmup_steps=1, shift=2)
    # Of sums over tokens, what is remembered is taken in proportion once patches have moved: 0.05 off; 0.2 without.
    moved = 0.1 if name == "sana" else EXACT
    for results in on_ranks(name, world, config, arguments, 4):
        for result, bound in zip(results, (EXACT, EXACT, moved, moved), strict=True):
            assert distance(result, truth) <= bound


@pytest.mark.parametrize("name", ["flux", "qwen", "qwen-layers", "z-image"])
def test_a_step_that_was_planned_leaves_nothing_behind(name: str) -> None:
    """Tables of positions that a model makes when they are first asked for, and keeps."""
    arguments = MODELS[name].arguments(2, ROWS, COLS)
    truth = one_device(name, arguments)
    config = df.ParallelConfig(strategy="sync", max_memory="4GiB")
    for (result,) in on_ranks(name, 2, config, arguments):
        assert distance(result, truth) <= EXACT


def test_a_model_that_looks_at_values_is_not_planned() -> None:
    said = r"Lumina2Transformer2DModel looks at values while it runs \(.*\), so that max_memory cannot be planned"
    with pytest.raises(df.UnsupportedModel, match=said):
        on_ranks("lumina2", 2, df.ParallelConfig(max_memory="4GiB"), MODELS["lumina2"].arguments(1, ROWS, COLS))


@pytest.mark.parametrize("name", MODELS)
def test_displaced_reads_the_peers_one_step_late(name: str) -> None:
    """With another input in the second step, the result is another than sync's, and than that of no exchange."""
    one = MODELS[name].arguments(1, ROWS, COLS)
    latents = MODELS[name].latents
    other = {**one, latents: _changed(one[latents])}
    config = df.ParallelConfig(strategy="displaced", warmup_steps=0)

    def rank(comm: Any) -> Any:
        model = df.parallelize(build(MODELS[name]), config, comm)
        model(**one)
        late = first(model(**other))
        df.reset(model)
        return late, first(model(**other))

    late, fresh = df.run_ranks(2, rank)[0]
    naive = on_ranks(name, 2, df.ParallelConfig(strategy="naive"), other)[0][0]
    assert distance(fresh, one_device(name, other)) <= EXACT
    assert 10 * EXACT < distance(late, fresh) < distance(naive, fresh)


def _changed(latents: Any) -> Any:
    if isinstance(latents, list):
        return [_changed(each) for each in latents]
    return latents + 0.05 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", MODELS)
def test_cfg_halves_the_batch_and_restore_leaves_no_trace(name: str) -> None:
    arguments = MODELS[name].arguments(2, ROWS, COLS)
    truth = one_device(name, arguments)

    def rank(comm: Any) -> tuple[Tensor, Tensor, bool]:
        model = build(MODELS[name])
        before = {key: value.clone() for key, value in model.state_dict().items()}
        split = first(df.parallelize(model, df.ParallelConfig(strategy="sync", cfg=2), comm)(**arguments))
        df.restore(model)
        after = model.state_dict()
        same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        clean = not any("forward" in module.__dict__ for module in model.modules())
        return split, first(model(**arguments)).narrow(1, 0, split.shape[1]), same and clean

    for world in (2, 4):
        for split, restored, is_clean in df.run_ranks(world, rank):
            assert distance(split, truth) <= EXACT
            assert torch.equal(restored, truth)
            assert is_clean


@pytest.mark.parametrize("name", MODELS)
def test_more_ranks_than_rows_are_refused(name: str) -> None:
    with pytest.raises(
        df.ConfigError, match=r"3 rows of tokens cannot be split over 4 ranks: the largest world .* is 3"
    ):
        on_ranks(name, 4, df.ParallelConfig(strategy="sync"), MODELS[name].arguments(1, 3, 8))


def test_a_window_is_refused() -> None:
    def rank(comm: Any) -> None:
        config = df.ParallelConfig(context_window=0.5)
        with pytest.raises(df.UnsupportedModel, match=r"context_window=0\.5 is known for U-Nets only, not for SD3T"):
            df.parallelize(build(MODELS["sd3"]), config, comm)

    df.run_ranks(2, rank)


@pytest.mark.parametrize("strategy", ["sync", "displaced"])
@pytest.mark.parametrize("name", ["sd3", "flux", "pixart"])
def test_a_codec_sends_fewer_bytes_and_stays_near(name: str, strategy: Any) -> None:
    arguments = MODELS[name].arguments(2, ROWS, COLS)
    truth = one_device(name, arguments)

    def rank(comm: Any, codec: str | None) -> tuple[Tensor, int]:
        config = df.ParallelConfig(strategy=strategy, warmup_steps=0, codec=codec)
        model = df.parallelize(build(MODELS[name]), config, comm)
        results = [first(model(**arguments)) for _ in range(4)]
        return results[-1], df.report(model).bytes[-1]

    plain = df.run_ranks(3, lambda comm: rank(comm, None))
    coded = df.run_ranks(3, lambda comm: rank(comm, "int8"))
    for (_, num_bytes), (result, fewer) in zip(plain, coded, strict=True):
        assert fewer < 0.75 * num_bytes  # the prediction itself travels uncoded, and rows are narrow here
        assert distance(result, truth) < 1e-3
