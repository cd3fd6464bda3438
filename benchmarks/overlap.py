"""What it costs to compute the core while the rest travels: ``OMP_NUM_THREADS=1 python benchmarks/overlap.py``.

A convolution in one kernel, against core and border rows in two (both borders as one batch) and an output put together;
an attention over all keys, against own keys and the peers' keys apart, merged by their log-sum-exp. CPU time of the two
in turn, medians; seconds on a quiet core. The shapes are those of ``sdxl-mini`` at 1024 px on two ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from statistics import median
from time import process_time

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDS = 25
CONVS = [(64, 64, 128), (128, 32, 64), (256, 16, 32)]  # channels, rows, columns
ATTENTIONS = [(2, 64, 2048, 2048), (4, 64, 512, 512)]  # heads, width of a head, own tokens, the peer's


def conv_at_once(rows: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(rows, weight, padding=(0, 1))


def conv_core_first(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows`` ``[B, C, 1 + own + 1, W]``: its first and last row are the halo."""
    batch, _, num_rows, width = rows.shape
    out = rows.new_empty(batch, weight.shape[0], num_rows - 2, width)
    out[:, :, 1:-1] = F.conv2d(rows[:, :, 1:-1], weight, padding=(0, 1))
    borders = F.conv2d(torch.cat([rows[:, :, :3], rows[:, :, -3:]]), weight, padding=(0, 1))
    out[:, :, :1], out[:, :, -1:] = borders.chunk(2)
    return out


def attention_at_once(q: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor]) -> Tensor:
    """Joining K and V of both is part of it."""
    return F.scaled_dot_product_attention(q, torch.cat(keys, 2), torch.cat(values, 2))


def attention_own_first(q: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor]) -> Tensor:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    (own, own_lse), (other, other_lse) = (flash(q, k, v) for k, v in zip(keys, values, strict=True))
    share = torch.sigmoid(own_lse - other_lse).unsqueeze(-1)  # [B, heads, tokens, 1]
    return torch.lerp(other, own, share.to(own.dtype))


def compare(name: str, plain: Callable[[], Tensor], split: Callable[[], Tensor]) -> dict[str, object]:
    error = float((plain() - split()).norm() / plain().norm())
    times: dict[str, list[float]] = {"plain": [], "split": []}
    for _ in range(ROUNDS):
        for key, work in (("plain", plain), ("split", split)):
            start = process_time()
            work()
            times[key].append(process_time() - start)
    one, two = median(times["plain"]), median(times["split"])
    row = {"case": name, "ms": 1e3 * one, "ms_split": 1e3 * two, "ratio": two / one, "relative_error": error}
    print(f"{name:40} {1e3 * one:8.2f} ms at once  {1e3 * two:8.2f} ms split  x {two / one:.2f}  ({error:.0e})")
    return row


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for channels, height, width in CONVS:
        x, weight = torch.randn(1, channels, height + 2, width), torch.randn(channels, channels, 3, 3)
        rows.append(
            compare(
                f"conv {channels} x {height} x {width}",
                lambda x=x, weight=weight: conv_at_once(x, weight),  # type: ignore[misc]
                lambda x=x, weight=weight: conv_core_first(x, weight),  # type: ignore[misc]
            )
        )
    for heads, width, own, other in ATTENTIONS:
        q = torch.randn(1, heads, own, width)
        keys, values = ((torch.randn(1, heads, own, width), torch.randn(1, heads, other, width)) for _ in range(2))
        rows.append(
            compare(
                f"attention {heads} heads x {own} + {other}",
                lambda q=q, k=keys, v=values: attention_at_once(q, k, v),  # type: ignore[misc]
                lambda q=q, k=keys, v=values: attention_own_first(q, k, v),  # type: ignore[misc]
            )
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
