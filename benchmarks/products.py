"""Matrix products of float32 on this CPU: torch's own beside oneDNN's, in turn, medians.

``OMP_NUM_THREADS=1 python benchmarks/products.py``

The shapes are those of patches: of ``sdxl-mini`` and SDXL at 1024 px on two ranks, FLUX's linear layers, a VAE's
attention. ``gain`` is how many times faster oneDNN is; the errors of both are relative L2 distances from float64. The
first line is what `distrifusion.products` decides by.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distrifusion import products
from distrifusion.products import Products

LINEAR = [(2048, 128, 128), (2048, 128, 1024), (512, 256, 2048), (512, 1024, 256), (77, 256, 256), (512, 1280, 1280)]
LINEAR += [(2304, 3072, 3072), (2304, 3072, 12288)]  # tokens, channels in and out
CONV = [(192, 64, 64, 128), (512, 256, 16, 32), (640, 320, 64, 128)]  # channels in and out, rows, columns
ATTENTION = [(2, 2048, 4096, 64), (4, 512, 1024, 64), (4, 512, 77, 64), (10, 2048, 4096, 64), (1, 8192, 16384, 512)]


Case = tuple[Callable[..., Tensor], list[Tensor]]
"""What to do, and with what."""


def cases() -> dict[str, Case]:
    """By name; heads, queries, keys and channels of an attention."""
    found: dict[str, Case] = {}
    torch.manual_seed(0)
    for tokens, channels, out in LINEAR:
        x, weight, bias = torch.randn(1, tokens, channels), torch.randn(out, channels) / channels**0.5, torch.randn(out)
        found[f"linear {tokens} x {channels} -> {out}"] = F.linear, [x, weight, bias]
    for channels, out, rows, cols in CONV:
        x, weight, bias = torch.randn(1, channels, rows, cols), torch.randn(out, channels, 1, 1), torch.randn(out)
        found[f"convolution 1 x 1, {rows} x {cols} x {channels} -> {out}"] = F.conv2d, [x, weight, bias]
    for heads, queries, keys, width in ATTENTION:
        given = [torch.randn(1, num, heads, width).transpose(1, 2) for num in (queries, keys, keys)]
        found[f"attention {heads} x {queries} to {keys} x {width}"] = F.scaled_dot_product_attention, given
    return found


def timed(work: Callable[..., Tensor], given: list[Tensor], rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of torch's own and of oneDNN's, and their errors."""
    results = [work(*given)] * 2
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for which, around in enumerate((nullcontext(), Products())):
            started = perf_counter()
            with around:
                results[which] = work(*given)
            taken[which].append(perf_counter() - started)
    truth = work(*(each.double() for each in given))
    return [1e3 * median(each) for each in taken], [float((each - truth).norm() / truth.norm()) for each in results]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    gain = products._measured()
    capability, chosen = torch.backends.cpu.get_cpu_capability(), "oneDNN" if products.is_wanted() else "torch"
    print(f"{capability}, {torch.get_num_threads()} threads: oneDNN {gain:.2f} times as fast; ranks take {chosen}'s\n")
    rows: dict[str, Any] = {}
    for name, (work, tensors) in cases().items():
        (own, other), errors = timed(work, tensors, given.rounds)
        rows[name] = {"torch_ms": round(own, 3), "onednn_ms": round(other, 3), "gain": round(own / other, 2)}
        apart = " and ".join(f"{error:.1e}" for error in errors)
        print(f"{name:44} {own:8.2f} ms {other:8.2f} ms   gain {own / other:5.2f}   errors {apart}", flush=True)
    print(json.dumps({"gain": round(gain, 2), "capability": capability, "chosen": chosen, "products": rows}))


if __name__ == "__main__":
    main()
