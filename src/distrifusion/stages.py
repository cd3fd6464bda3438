"""A chain of units of work cut into stages of about equal cost. Integers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

SLACK = 1.03
"""How much longer than the shortest the slowest stage of another cut may take, for that cut to be worth a look."""


@dataclass(frozen=True)
class Link:
    """One unit of the chain, which runs after those before it."""

    cost: int
    reads: frozenset[str]  # names of what others make
    makes: Mapping[str, int]  # name -> bytes


@dataclass(frozen=True)
class Cut:
    """The stage of each link, and which other stages read what."""

    stages: tuple[int, ...]
    readers: Mapping[str, tuple[int, ...]]
    output: int  # the stage that makes the last part of the output


def cut(links: Sequence[Link], output: frozenset[str], num_stages: int) -> Cut:
    """Stages of about equal cost, of which as few bytes as possible go to other stages.

    ``output`` is made where its last part is made. Where links near the end read what links near the beginning make,
    as over the skip connections of a U-Net, the last stage has the first links too.
    """
    makers = {name: place for place, link in enumerate(links) for name in link.makes}
    sizes = {name: size for link in links for name, size in link.makes.items()}
    last = max((makers[name] for name in output), default=len(links) - 1)
    readers: dict[str, set[int]] = {}  # name -> places of links
    for place, link in enumerate(links):
        for name in link.reads | output if place == last else link.reads:
            readers.setdefault(name, set()).add(place)

    def crossing(stages: Sequence[int]) -> dict[str, tuple[int, ...]]:
        others = {
            name: {stages[place] for place in places} - {stages[makers[name]]} for name, places in readers.items()
        }
        return {name: tuple(sorted(found)) for name, found in others.items() if found}

    def num_bytes(stages: Sequence[int]) -> int:
        return sum(sizes[name] * len(found) for name, found in crossing(stages).items())

    quarter = len(links) / 4
    has_skips = any(makers[name] < quarter and max(places) >= len(links) - quarter for name, places in readers.items())
    costs = tuple(link.cost for link in links)
    candidates = rings(costs, num_stages) if has_skips and num_stages > 1 else ()
    stages = min(candidates or (chain(costs, num_stages),), key=num_bytes)
    return Cut(stages, crossing(stages), stages[last])


@lru_cache
def chain(costs: tuple[int, ...], num_stages: int) -> tuple[int, ...]:
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


@lru_cache
def rings(costs: tuple[int, ...], num_stages: int) -> tuple[tuple[int, ...], ...]:
    """The stage of each unit where the last stage has the last units and the first ones, for each number of first
    units that comes near the best. None where there are fewer than two units more than other stages.
    """
    num_units, ends = len(costs), [0, *accumulate(costs)]
    found: list[tuple[int, tuple[int, ...]]] = []  # cost of the dearest stage, stages
    for head in range(1, num_units - num_stages + 1):
        if found and ends[head] > SLACK * min(found)[0]:
            break
        # The later the tail starts, the cheaper the last stage and the dearer the others: the best is where they cross.
        first = low = head + num_stages - 1
        high = num_units - 1
        while low < high:
            start = (low + high) // 2
            others = chain(costs[head:start], num_stages - 1)
            is_late = max(loads(costs[head:start], others)) >= ends[head] + ends[-1] - ends[start]
            low, high = (low, start) if is_late else (start + 1, high)
        for start in range(max(low - 1, first), low + 1):
            others = chain(costs[head:start], num_stages - 1)
            last = num_stages - 1
            stages = (*[last] * head, *others, *[last] * (num_units - start))
            found.append((max(loads(costs, stages)), stages))
    return tuple(stages for cost, stages in found if cost <= SLACK * min(found)[0])


def loads(costs: Sequence[int], stages: Sequence[int]) -> list[int]:
    """The cost of each stage."""
    sums = [0] * (max(stages) + 1)
    for cost, stage in zip(costs, stages, strict=True):
        sums[stage] += cost
    return sums


def _filled(costs: Sequence[int], num_stages: int, limit: int) -> tuple[int, ...] | None:
    """The stages, filled up to ``limit`` one after the other; None where that takes more of them."""
    stages: list[int] = []
    stage = load = 0
    for i, cost in enumerate(costs):
        is_needed_later = len(costs) - i <= num_stages - 1 - stage  # one unit for each of the stages to come
        if stages and (load + cost > limit or is_needed_later):
            stage, load = stage + 1, 0
        if stage == num_stages or load + cost > limit:
            return None
        stages.append(stage)
        load += cost
    return tuple(stages)
