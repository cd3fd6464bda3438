"""What a tensor is made of, and what it cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distrifusion.dataflow import ELEMENT, Dataflow


def marked(flow: Dataflow, *names: str) -> list[Tensor]:
    tensors = [torch.ones(2, 4) for _ in names]
    for name, tensor in zip(names, tensors, strict=True):
        flow.mark(tensor, name)
    return tensors


@pytest.mark.parametrize("inference", [False, True])
def test_sources_go_through_operations(inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad(), Dataflow() as flow:
        a, b = marked(flow, "a", "b")
        plain = torch.ones(2, 4)
        assert flow.sources(plain + 1) == frozenset()
        assert flow.sources(a[:, 1:].reshape(-1)) == {"a"}
        assert flow.sources(torch.cat([a, plain], 1)) == {"a"}
        assert flow.sources(a * b) == {"a", "b"}
        assert flow.sources(F.interpolate(b[None], scale_factor=2.0)) == {"b"}
        assert flow.sources(*a.chunk(2), {"more": [b]}) == {"a", "b"}
        assert flow.sources(torch.empty_like(a, device="meta")) == {"a"}
        assert flow.sources(None, 3, "a") == frozenset()


def test_what_is_written_in_place_counts() -> None:
    with Dataflow() as flow:
        a, b = marked(flow, "a", "b")
        plain = torch.zeros(2, 4)
        plain += a
        assert flow.sources(plain) == {"a"}
        plain[:, 1:] = b[:, 1:]
        assert flow.sources(plain) == {"a", "b"}
        other = torch.zeros(2, 4)
        torch.add(a, 1, out=other)
        assert flow.sources(other) == {"a"}
        a *= 2
        assert flow.sources(a) == {"a"}


def test_a_mark_replaces_where_a_tensor_came_from() -> None:
    with Dataflow() as flow:
        (a,) = marked(flow, "a")
        later = a + 1
        flow.mark(later, "b")
        assert flow.sources(later * 2) == {"b"}


ROWS, WEIGHT = torch.ones(5, 8), torch.ones(3, 8)
X, DENSE, GROUPED = torch.ones(2, 6, 8, 8), torch.ones(4, 6, 3, 3), torch.ones(4, 3, 3, 3)
Q, K, BIAS = torch.ones(2, 3, 10, 4), torch.ones(2, 3, 7, 4), torch.ones(3, 10, 7)
Q1, K1, KT, K1T = Q[0], K[0], K.transpose(-1, -2), K[0].transpose(-1, -2)


@pytest.mark.parametrize(
    ("run", "products"),
    [
        (lambda: F.linear(ROWS, WEIGHT), 5 * 8 * 3),
        (lambda: F.conv2d(X, DENSE, padding=1), 2 * 4 * 8 * 8 * 6 * 9),
        (lambda: F.conv2d(X, GROUPED, stride=2, groups=2, padding=1), 2 * 4 * 4 * 4 * 3 * 9),
        (lambda: F.scaled_dot_product_attention(Q, K, K), 2 * 2 * 3 * 10 * 7 * 4),
        (lambda: Q @ KT, 2 * 3 * 10 * 7 * 4),
        (lambda: torch.bmm(Q1, K1T), 3 * 10 * 7 * 4),
        (lambda: torch.baddbmm(BIAS, Q1, K1T), 3 * 10 * 7 * 4),
        (lambda: F.silu(X), 0),
    ],
)
def test_work_counts_multiplications_and_elements(run: Callable[[], Tensor], products: int) -> None:
    with Dataflow() as flow:
        made = run()
    assert flow.work == products + ELEMENT * made.numel()
