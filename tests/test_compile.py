"""torch.compile under every strategy: a block is one graph, with an operator at each seam, and one graph for all steps.

Ranks are processes: torch compiles in one thread at a time. The backend is the plainest, which runs the graph that was
captured, since what is asked here is what is in the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distrifusion as df
from models import build as build_unet
from models import conditioning, distance, latents
from process_pool import ProcessPool
from transformers_cross import CROSS
from transformers_joint import JOINT
from transformers_tiny import build

# The same kernels on the same values, but the activation before a convolution makes no room for its halo.
EXACT = 1e-5


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    """With more patience than the session's: a rank that has compiled its graph waits for one that has not."""
    processes = ProcessPool(max_world=3, timeout=200.0, patience=400.0)
    yield processes
    processes.stop()


UNET = "class-labels"  # two levels, and one of everything in each


class Counting:
    """A backend that runs what was captured, and knows how many seams were in each graph."""

    def __init__(self) -> None:
        self.seams: list[int] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.seams.append(sum("distrifusion.ask" in str(node.target) for node in graph.graph.nodes))
        return graph.forward


def steps(model: Any, arguments: dict[str, Any], num: int = 3) -> list[Tensor]:
    df.reset(model)
    with torch.no_grad():
        return [model(**arguments)[0] for _ in range(num)]


def small_unet() -> tuple[Any, dict[str, Any], list[nn.Module]]:
    """A U-Net, the arguments of a call, and blocks that hold every kind of seam."""
    model = build_unet(UNET)
    arguments = {"sample": latents(UNET, 2, 19, 13), "timestep": 500, **conditioning(UNET, 2)}
    return model, arguments, [model.down_blocks[0], model.up_blocks[0]]


def transformer(name: str) -> tuple[Any, dict[str, Any], list[nn.Module]]:
    tiny = {**CROSS, **JOINT}[name]
    model = build(tiny)
    return (
        model,
        tiny.arguments(2, 7, 5),
        [module for module in model.modules() if type(module).__name__ == BLOCK[name]],
    )


BLOCK = {"pixart": "BasicTransformerBlock", "flux": "FluxTransformerBlock", "sana": "SanaTransformerBlock"}


def blocks_on_ranks(comm: Any, name: str, settings: dict[str, Any], before: bool) -> dict[str, Any]:
    model, arguments, blocks = small_unet() if name == "unet" else transformer(name)
    config, counting = df.ParallelConfig(**settings), Counting()
    torch._dynamo.reset()
    plain = steps(df.parallelize(model, config, comm), arguments)
    if before:
        df.restore(model)
    for block in blocks:
        block.compile(backend=counting, fullgraph=True)  # a break would be an error
    if before:
        df.parallelize(model, config, comm)
    compiled = steps(model, arguments)
    report = df.report(model)
    df.restore(model)
    return {
        "distances": [distance(a, b) for a, b in zip(compiled, plain, strict=True)],
        "seams": counting.seams,
        "num_blocks": len(blocks),
        "kinds": report.kinds,
        "notes": report.notes,
    }


@pytest.mark.parametrize(
    ("world", "name", "settings", "before"),
    [
        (2, "unet", {"strategy": "displaced", "warmup_steps": 0}, False),
        (3, "pixart", {"strategy": "displaced", "warmup_steps": 1}, True),
        (2, "pixart", {"strategy": "naive", "split": "cols"}, False),
        (2, "unet", {"strategy": "shifted", "warmup_steps": 1}, False),
        (2, "flux", {"strategy": "sync"}, False),
        (2, "sana", {"strategy": "sync"}, False),
        (2, "unet", {"strategy": "tensor"}, False),
        (2, "flux", {"strategy": "tensor"}, True),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_block_is_one_graph_for_all_steps(
    pool: ProcessPool, world: int, name: str, settings: dict[str, Any], before: bool
) -> None:
    for found in pool.run(blocks_on_ranks, world, name, settings, before):
        assert max(found["distances"]) <= EXACT
        # Synchronous and displaced steps share a graph; blocks of the same shape may too. Patches that stand alone see
        # other rows, and at first none but their own.
        num_graphs = 3 if settings["strategy"] == "shifted" else 1
        assert 1 <= len(found["seams"]) <= num_graphs * found["num_blocks"]
        assert all(found["seams"])
        assert len(set(found["kinds"])) == (2 if settings["strategy"] in ("displaced", "shifted") else 1)


def whole_on_ranks(comm: Any, how: str) -> dict[str, Any]:
    tiny, counting = CROSS["pixart"], Counting()
    arguments = tiny.arguments(2, 7, 5)
    torch._dynamo.reset()
    model = build(tiny)
    plain = steps(df.parallelize(model, df.ParallelConfig(warmup_steps=0), comm), arguments)
    target: Any = model
    if how == "in place":
        model.compile(backend=counting)
    else:
        df.restore(model)
        target = df.parallelize(torch.compile(model, backend=counting), df.ParallelConfig(warmup_steps=0), comm)
    compiled = [target(**arguments)[0] for _ in range(3)]
    num_graphs = len(counting.seams)
    notes = df.report(target).notes
    df.restore(target)
    return {
        "distances": [distance(a, b) for a, b in zip(compiled, plain, strict=True)],
        "seams": counting.seams[:num_graphs],
        "notes": notes,
        "alone": distance(target(**arguments)[0], build(tiny)(**arguments)[0]),
    }


@pytest.mark.parametrize("how", ["in place", "before"])
def test_a_whole_model_that_is_compiled(pool: ProcessPool, how: str) -> None:
    """The graph breaks before our forward, and what runs inside of it is captured with every seam."""
    num_seams = len([name for name, _ in build(CROSS["pixart"]).named_modules() if name.endswith("attn1")])
    for found in pool.run(whole_on_ranks, 2, how):
        assert max(found["distances"]) <= EXACT
        assert sum(found["seams"]) == num_seams
        assert found["notes"] == []
        assert found["alone"] <= EXACT
