"""A chain of units of work cut into stages of about equal cost. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

SLACK = 1.03
"""How much longer than the shortest the slowest stage of another cut may take, for that cut to be worth a look."""


def chain(costs: Sequence[int], num_stages: int) -> tuple[int, ...]:
    """The stage of each unit: consecutive units, none without, the dearest stage as cheap as possible.

    There are at least as many units as stages.
    """
    assert len(costs) >= num_stages
    low, high = -(-sum(costs) // num_stages), sum(costs)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _filled(costs, num_stages, middle) is not None else (middle + 1, high)
    found = _filled(costs, num_stages, low)
    assert found is not None
    return found


def rings(costs: Sequence[int], num_stages: int) -> list[tuple[int, ...]]:
    """The stage of each unit where the last stage has the last units and the first ones: every cut about as good as
    the best, by the number of first units. Empty where there are fewer units than that takes.
    """
    num_units, ends = len(costs), [0, *accumulate(costs)]
    found: list[tuple[int, tuple[int, ...]]] = []  # cost of the dearest stage, stages
    for head in range(1, num_units - num_stages + 1):
        if found and ends[head] > SLACK * min(found)[0]:
            break
        # With a longer tail the middle gets cheaper and the last stage dearer: the best is where they cross.
        low, high = head + num_stages - 1, num_units - 1  # where the tail starts
        while low < high:
            start = (low + high) // 2
            outside = ends[head] + ends[-1] - ends[start]
            low, high = (low, start) if _dearest(costs[head:start], num_stages - 1) >= outside else (start + 1, high)
        for start in {low, max(low - 1, head + num_stages - 1)}:
            inner = chain(costs[head:start], num_stages - 1)
            stages = (*[num_stages - 1] * head, *inner, *[num_stages - 1] * (num_units - start))
            found.append((max(loads(costs, stages, num_stages)), stages))
    return [stages for cost, stages in found if cost <= SLACK * min(found)[0]]


def loads(costs: Sequence[int], stages: Sequence[int], num_stages: int) -> list[int]:
    """The cost of each stage."""
    sums = [0] * num_stages
    for cost, stage in zip(costs, stages, strict=True):
        sums[stage] += cost
    return sums


def _dearest(costs: Sequence[int], num_stages: int) -> int:
    return max(loads(costs, chain(costs, num_stages), num_stages))


def _filled(costs: Sequence[int], num_stages: int, limit: int) -> tuple[int, ...] | None:
    """The stages, filled up to ``limit`` one after the other; None where that takes more of them."""
    stages: list[int] = []
    stage, load, is_empty = 0, 0, True
    for i, cost in enumerate(costs):
        is_needed_later = len(costs) - i <= num_stages - 1 - stage  # one unit for each of the stages to come
        if not is_empty and (load + cost > limit or is_needed_later):
            stage, load = stage + 1, 0
        if stage == num_stages or load + cost > limit:
            return None
        stages.append(stage)
        load, is_empty = load + cost, False
    return tuple(stages)
