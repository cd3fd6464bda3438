"""torch.compile under every strategy: a block is one graph, with an operator at each seam, and one graph for all steps.

Ranks are processes: torch compiles in one thread at a time. The backend makes of a captured graph what every compiler
gets, without mutation, and runs that operation by operation; one test takes torch's own compiler.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

import distrifusion as df
from distrifusion.layers import compiled as operators
from distrifusion.products import SWITCH
from models import build as build_unet
from models import conditioning, distance, latents
from pipelines import SYNC, controlnet, picture, sample, sd
from process_pool import ProcessPool
from transformers_cross import CROSS
from transformers_joint import JOINT
from transformers_tiny import build

# The same kernels on the same values, but the activation before a convolution makes no room for its halo.
EXACT = 1e-5


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    """With more patience than the session's: a rank that has compiled its graph waits for one that has not.

    Matrix products are asked for, so that a hook which a compiler cannot follow would show on every machine.
    """
    with mock.patch.dict(os.environ, {SWITCH: "1"}):
        processes = ProcessPool(max_world=3, timeout=200.0, patience=400.0)
        yield processes
        processes.stop()


UNET = "class-labels"  # two levels, and one of everything in each


class Counting:
    """A backend that runs what compilers get, and knows how many seams were in each graph."""

    def __init__(self) -> None:
        self.seams: list[int] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.seams.append(sum("distrifusion.ask" in str(node.target) for node in graph.graph.nodes))
        return lookup_backend("aot_eager")(graph, inputs)


def overwritten(answers: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """An operator's work where the compiler puts other things in place of the arguments as soon as it is done."""

    def call(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
        lent = [tensor.clone() for tensor in tensors]
        results = answers(lent, *rest)
        for tensor in lent:
            tensor.fill_(torch.nan)
        return results

    return call


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
    plain = steps(df.parallelize(model, config, comm), arguments, num=4)
    if before:
        df.restore(model)
    for block in blocks:
        block.compile(backend=counting, fullgraph=True)  # a break would be an error
    if before:
        df.parallelize(model, config, comm)
    with mock.patch.object(operators, "_answers", overwritten(operators._answers)):
        compiled = steps(model, arguments, num=4)
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


def compiled_on_ranks(comm: Any, settings: dict[str, Any]) -> list[float]:
    model, arguments, blocks = small_unet()
    torch._dynamo.reset()
    plain = steps(df.parallelize(model, df.ParallelConfig(**settings), comm), arguments, num=4)
    for part in (blocks[0].resnets[0], blocks[0].attentions[0]):
        part.compile(fullgraph=True, options={"compile_threads": 1})
    return [distance(a, b) for a, b in zip(steps(model, arguments, num=4), plain, strict=True)]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs g++ here")
@pytest.mark.parametrize("settings", [{"warmup_steps": 0}, {"strategy": "shifted", "warmup_steps": 1}])
def test_torchs_own_compiler(pool: ProcessPool, settings: dict[str, Any]) -> None:
    """Every kind of seam of a U-Net, and steps that start from what the steps before have left."""
    for distances in pool.run(compiled_on_ranks, 2, settings):
        assert max(distances) <= EXACT


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
        wrapper = torch.compile(model, backend=counting, fullgraph=True)
        target = df.parallelize(wrapper, df.ParallelConfig(warmup_steps=0), comm)
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


def with_controlnets_on_ranks(comm: Any) -> dict[str, Any]:
    counting = Counting()
    torch._dynamo.reset()
    nets = MultiControlNetModel([controlnet(seed=3), controlnet(seed=4)])
    pipe = sd(StableDiffusionControlNetPipeline, controlnet=nets)

    def paint() -> Tensor:
        return sample(pipe, image=[picture(1), picture(2)], height=..., width=...)

    truth = paint()
    pipe.unet = torch.compile(pipe.unet, backend=counting, fullgraph=True)
    nets.nets[1] = torch.compile(nets.nets[1], backend=counting, fullgraph=True)
    df.parallelize(pipe, SYNC, comm)
    found = {"distance": distance(paint(), truth), "seams": counting.seams.copy(), "notes": df.report(pipe).notes}
    df.restore(pipe)
    return {**found, "alone": distance(paint(), truth)}


def test_a_controlnet_is_compiled_beside_its_unet(pool: ProcessPool) -> None:
    for found in pool.run(with_controlnets_on_ranks, 2):
        assert max(found["distance"], found["alone"]) <= EXACT
        assert len([number for number in found["seams"] if number]) == 2  # a graph each
        assert found["notes"] == []


@pytest.mark.parametrize("how", ["in place", "before"])
def test_a_whole_model_that_is_compiled(pool: ProcessPool, how: str) -> None:
    """What runs inside of our forward is captured with every seam, and what is around it is not in its way."""
    num_seams = len([name for name, _ in build(CROSS["pixart"]).named_modules() if name.endswith("attn1")])
    for found in pool.run(whole_on_ranks, 2, how):
        assert max(found["distances"]) <= EXACT
        assert sum(found["seams"]) == num_seams
        assert found["notes"] == []
        assert found["alone"] <= EXACT
