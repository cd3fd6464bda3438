"""Random models, sizes, worlds and settings against one device: combinations that no list of cases thinks of.

``python tests/random_cases.py --seconds 300 --seed 7`` prints what is not as it should be, by the number of the case;
``--only NUMBER`` runs that one again. `test_random_cases.py` runs some of them.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import distrifusion as df
from distrifusion.comm import Comm
from distrifusion.comm.tape import RECORDERS
from distrifusion.forms import CODECS
from distrifusion.planner import Traffic
from models import SHAPES, build, conditioning, distance, latents
from playing import PlayedRecorder
from test_traffic import numbers, predicted
from transformers_cross import CROSS
from transformers_joint import JOINT
from transformers_tiny import build as build_transformer
from transformers_video import VIDEO

TRANSFORMERS = {**CROSS, **JOINT, **VIDEO}
OTHERS = {"z-image", "cogvideox-5b-image"}  # gives a list of tensors; knows one size
EXACT = {torch.float32: 2e-5, torch.bfloat16: 3e-2}  # float32 sums in another order; bfloat16 has 8 bits
REFUSED = df.ConfigError, df.UnsupportedModel


@dataclass(frozen=True)
class Case:
    """A model by name, ``size`` of its latents or in tokens, and how it is called by how many ranks."""

    name: str
    world: int
    settings: dict[str, Any]
    batch: int
    size: tuple[int, int]
    dtype: torch.dtype
    is_channels_last: bool

    def model(self) -> Any:
        name = self.name
        model = build_transformer(TRANSFORMERS[name]) if name in TRANSFORMERS else build(name)
        model = nn.Module.to(model, self.dtype)
        return model.to(memory_format=torch.channels_last) if self.is_channels_last else model

    def arguments(self) -> dict[str, Any]:
        """Of a call; with ``cfg=2`` of both branches."""
        if self.name in TRANSFORMERS:
            given = TRANSFORMERS[self.name].arguments(self.batch, *self.size)
        else:
            sample = latents(self.name, self.batch, *self.size)
            if self.is_channels_last:
                sample = sample.contiguous(memory_format=torch.channels_last)
            given = {"sample": sample, "timestep": 500, **conditioning(self.name, self.batch)}
        found: dict[str, Any] = tree_map_only(Tensor, lambda x: x.to(self.dtype) if x.is_floating_point() else x, given)
        return found


def draw(number: int) -> Case:
    """The case of this number."""
    random = Random(number)
    name = random.choice(list(SHAPES) * 2 + [name for name in TRANSFORMERS if name not in OTHERS])
    is_unet, world = name in SHAPES, random.choice([2, 2, 3, 4, 5, 6, 7])
    strategy = random.choice(["sync", *["displaced"] * 3, "naive", "shifted", "shifted", "pipelined", "tensor"])
    cfg = 2 if world % 2 == 0 and random.random() < 0.2 else 1
    settings: dict[str, Any] = {"strategy": strategy, "cfg": cfg}
    settings |= _of_patches(random, strategy, world // cfg, is_unet) if strategy not in ("pipelined", "tensor") else {}
    if strategy == "pipelined":
        settings["warmup_steps"] = random.choice([0, 1, 2])
        more: list[dict[str, Any]] = [{}, {"stride": 2}, {"patch": 2}, {"patches": random.choice([1, 2, 3, 4])}]
        settings |= random.choice(more[:3] if is_unet else more)
    unit = 4 if is_unet and SHAPES[name].multiple > 1 else 1
    longest = 24 // unit if is_unet else 9
    size = random.randint(4, longest) * unit, random.randint(4, longest) * unit
    dtype = torch.bfloat16 if random.random() < 0.1 and "max_memory" not in settings else torch.float32
    is_channels_last = is_unet and random.random() < 0.2
    return Case(name, world, settings, random.choice([1, 2, 3]) * cfg, size, dtype, is_channels_last)


def _of_patches(random: Random, strategy: str, patches: int, is_unet: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"split": random.choice(["rows", "cols"]), "warmup_steps": random.choice([0, 0, 1, 2])}
    if is_unet and random.random() < 0.25:
        found["topology"] = random.choice(["ring-x", "torus"])
    if strategy in ("sync", "displaced"):
        if random.random() < 0.5:
            found["codec"] = random.choice(
                [*CODECS, {"context": "1bit", "halo": "fp16"}, {"halo": "int8"}, {"output": "int4"}]
            )
        if is_unet and random.random() < 0.2:
            found["context_window"] = random.choice([0.0, 0.3, 1.0])
        if random.random() < 0.25:
            found["balance"] = tuple(random.choice([1, 1, 2, 3]) for _ in range(patches))
    if strategy == "displaced":
        found["group_norm"] = random.choice(["corrected", "corrected", "carried", "stale", "sync", "separate"])
    if strategy == "shifted":
        found |= {"overlap": random.choice([0, 0, 1, 2]), "remember": random.random() < 0.6}
        found |= {"latents": random.choice(["rows", "whole"]), "shift": random.choice([None, "golden", "random", 1, 3])}
    elif random.random() < 0.2:
        found["cuda_graphs"] = True
    if "cuda_graphs" not in found and random.random() < 0.1:
        found["max_memory"] = "4GiB"
    return found


def complaint(case: Case) -> str | None:
    """What is not as it should be with a held input; None where all is.

    Raises:
        ConfigError, UnsupportedModel: the case is none, and all ranks have been told so.
    """
    config, arguments = df.ParallelConfig(**case.settings), case.arguments()
    num = case.world + 4 if config.strategy == "pipelined" else 7 if config.cuda_graphs else 5
    with torch.no_grad():
        plain = case.model()
        if config.topology != "plane":
            df.parallelize(plain, df.ParallelConfig(topology=config.topology))
        truth = plain(**arguments)[0]

    def rank(comm: Comm) -> list[tuple[Tensor, Traffic]]:
        model, found = df.parallelize(case.model(), config, comm), []
        for _ in range(num):
            comm.meter.clear()
            with torch.no_grad():
                result = model(**arguments)[0].clone()
            found.append((result, Traffic(comm.meter.messages.copy(), comm.meter.bytes.copy())))
        return found

    ran = df.run_ranks(case.world, rank, timeout=60)
    results = [result for result, _ in ran[0]]
    truth = truth.narrow(1, 0, results[0].shape[1]) if truth.ndim == 3 else truth  # without tokens of further pictures
    exact = EXACT[case.dtype]
    for each in ran[1:]:
        if not all(torch.equal(result, mine) for (result, _), mine in zip(each, results, strict=True)):
            return "ranks have different results"
    off = [distance(result, truth) for result in results]
    is_near = config.strategy in ("naive", "shifted") or config.group_norm == "separate"
    if is_near or config.context_window is not None:
        return None
    if (max(off[0], off[-1]) if config.strategy == "pipelined" else max(off)) > exact:
        return f"far from one device: {', '.join(f'{value:.0e}' for value in off)}"
    return _miscounted(case, config, arguments, ran) if config.strategy in ("sync", "displaced") else None


def _miscounted(case: Case, config: df.ParallelConfig, arguments: dict[str, Any], ran: list[Any]) -> str | None:
    """Where bytes or messages are not what is predicted."""
    if config.topology != "plane" or case.dtype != torch.float32:
        return None
    given = case.model(), arguments, config, case.world, case.batch, len(ran[0])
    for number, (steps, expected) in enumerate(zip(ran, predicted(*given), strict=True)):
        for step, ((_, found), wanted) in enumerate(zip(steps, expected, strict=True)):
            if numbers(found) != numbers(wanted):
                return f"rank {number}, step {step}: sent {numbers(found)}, predicted {numbers(wanted)}"
            is_late = config.strategy == "displaced" and step > config.warmup_steps and config.group_norm != "sync"
            if is_late and sum(numbers(found)[0].values()) > 8:
                return f"rank {number}, step {step}: more than 8 messages: {numbers(found)[0]}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    order = parser.parse_args()
    RECORDERS["cpu"] = PlayedRecorder
    until, number, tally = time.monotonic() + order.seconds, order.seed * 1_000_000, Counter[str]()
    while time.monotonic() < until:
        number = number + 1 if order.only is None else order.only
        case, said, kind = draw(number), None, "as it should be"
        try:
            said = complaint(case)
        except REFUSED:
            kind = "refused"
        except Exception as failure:  # whatever it is, it is to be told, and the others are to run
            said = f"{type(failure).__name__}: {failure}"
        if said is not None:
            kind = "not as it should be"
            print(f"{number}: {said}\n    {case}", flush=True)
        tally[kind] += 1
        if order.only is not None:
            break
    print(dict(tally))


if __name__ == "__main__":
    main()
