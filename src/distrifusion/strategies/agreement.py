"""Ranks that were given different work are told so, before they wait for each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..comm import Comm
from ..config import ParallelConfig
from ..errors import RanksDisagree
from ..models import Call

NUM_PROBES = 64
TOLERANCE = 0.1  # of the mean magnitude: devices of different makes round differently, other seeds differ by over 1


def check_call(comm: Comm, call: Call, config: ParallelConfig, conditioning: Any = None) -> None:
    """Compare size, batch, dtype, configuration and conditioning of all ranks. Blocks; once per picture and branch.

    ``conditioning``: the text, the class, the condition image; a tensor, a tuple of them or None.

    Raises:
        RanksDisagree: names what differs, and two values with their ranks.
    """
    batch, channels, *sides = call.sample.shape
    facts = {
        "latent size": " x ".join(map(str, sides)),
        "batch": batch,
        "channels": channels,
        "dtype": str(call.sample.dtype).removeprefix("torch."),
        "configuration": str(config),
    }
    given = conditioning if isinstance(conditioning, tuple) else (conditioning,)
    probes = [probe(tensor).tolist() for tensor in given if isinstance(tensor, Tensor)]
    agree(comm, {**facts, "number of conditions": len(probes)})
    everyone = comm.all_gather_object(probes)
    for i in range(len(probes)):
        _close("conditions", [torch.tensor(theirs[i]) for theirs in everyone], "the same prompt (and condition image)")


def agree_on_input(comm: Comm, name: str, sample: Tensor, facts: dict[str, Any]) -> None:
    """Compare what the ranks are about to ``name`` (encode or decode): its shape, dtype, values, and ``facts``. Blocks.

    Raises:
        RanksDisagree: names what differs, and two values with their ranks.
    """
    shape, dtype = " x ".join(map(str, sample.shape)), str(sample.dtype).removeprefix("torch.")
    agree(comm, {f"input to {name}": f"{shape} {dtype}", **facts})
    probes = comm.all_gather_object(probe(sample).tolist())
    _close(f"values to {name}", [torch.tensor(values) for values in probes], "the same picture and seed")


def agree(comm: Comm, facts: dict[str, Any]) -> None:
    """Compare named values of all ranks. Blocks.

    Raises:
        RanksDisagree: names what differs, and two values with their ranks.
    """
    everyone = comm.all_gather_object(facts)
    for name, value in everyone[0].items():
        for rank, theirs in enumerate(everyone):
            if theirs.get(name) != value:
                raise RanksDisagree(
                    f"{name} differs: rank 0 has {value}, rank {rank} has {theirs.get(name)}; "
                    "every rank must make the same calls with the same arguments"
                )


def probe(sample: Tensor) -> Tensor:
    """Some of the values ``[64 or fewer]``, spread over the whole, for comparison between ranks."""
    flat = sample.reshape(-1)
    return flat[:: max(flat.numel() // NUM_PROBES, 1)][:NUM_PROBES]


def check_latents(probes: list[Tensor]) -> None:
    """Compare the latents that the ranks stepped from. On an accelerator this is left out: the host must not wait.

    Raises:
        RanksDisagree: two ranks have different latents, so they drew different noise.
    """
    if probes[0].device.type == "cpu":
        advice = "the same seed (generator=torch.Generator().manual_seed(0), or torch.manual_seed(0) before the call)"
        _close("latents", probes, advice)


def _close(name: str, probes: list[Tensor], advice: str) -> None:
    first = probes[0].float()
    for rank, other in enumerate(probes[1:], 1):
        is_other = first.shape != other.shape
        if not is_other:
            difference = (first - other.float()).abs().mean()
            is_other = bool(torch.isfinite(difference) and not difference <= TOLERANCE * first.abs().mean())
        if is_other:
            shown = [", ".join(f"{value:.3f}" for value in values[:3].tolist()) for values in (first, other)]
            raise RanksDisagree(
                f"{name} differ: rank 0 starts with [{shown[0]}, ...], rank {rank} with [{shown[1]}, ...]; "
                f"give every rank {advice}"
            )
