"""Chains of units cut into stages, held against every cut there is."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from distrifusion.stages import SLACK, Cut, Link, chain, cut, loads, rings

CASES = [
    (num_units, num_stages, seed)
    for num_units in (2, 3, 5, 8)
    for num_stages in (1, 2, 3)
    for seed in range(3)
    if num_stages <= num_units
]


def costs_of(num_units: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(100 * num_units + seed)
    return tuple(draw.choice([0, 1, 2, 3, 7, 30]) for _ in range(num_units))


def all_chains(num_units: int, num_stages: int) -> list[tuple[int, ...]]:
    return [
        tuple(sum(place >= bound for bound in bounds) for place in range(num_units))
        for bounds in combinations(range(1, num_units), num_stages - 1)
    ]


@pytest.mark.parametrize(("num_units", "num_stages", "seed"), CASES)
def test_the_dearest_stage_of_a_chain_is_as_cheap_as_can_be(num_units: int, num_stages: int, seed: int) -> None:
    costs, every = costs_of(num_units, seed), all_chains(num_units, num_stages)
    found = chain(costs, num_stages)
    assert found in every  # consecutive, and no stage without a unit
    assert max(loads(costs, found)) == min(max(loads(costs, each)) for each in every)


@pytest.mark.parametrize(("num_units", "num_stages", "seed"), [case for case in CASES if case[1] > 1])
def test_rings_are_all_that_come_near_the_best(num_units: int, num_stages: int, seed: int) -> None:
    costs = costs_of(num_units, seed)
    every = [
        (*[num_stages - 1] * head, *inner, *[num_stages - 1] * tail)
        for head in range(1, num_units)
        for tail in range(1, num_units - head)
        for inner in all_chains(num_units - head - tail, num_stages - 1)
    ]
    found = rings(costs, num_stages)
    if not every:
        assert found == ()
        return
    best = min(max(loads(costs, each)) for each in every)
    assert found
    assert set(found) <= set(every)
    assert min(max(loads(costs, each)) for each in found) == best
    assert all(max(loads(costs, each)) <= SLACK * best for each in found)


def links_of(reads: dict[str, str], size: int = 10) -> list[Link]:
    """Units of equal cost, each named by a letter that is also what it makes; ``reads`` are letters too."""
    return [Link(100, frozenset(names), {name: size}) for name, names in reads.items()]


def test_each_stage_reads_only_what_others_make() -> None:
    found = cut(links_of({"a": "", "b": "a", "c": "b", "d": "c"}), frozenset("d"), 2)
    assert found == Cut((0, 0, 1, 1), {"b": (1,)}, 1)
    found = cut(links_of({"a": "", "b": "a", "c": "ab", "d": "ac"}), frozenset("d"), 4)
    assert found.readers == {"a": (1, 2, 3), "b": (2,), "c": (3,)}


def test_skips_keep_the_ends_together_where_few_bytes_cross() -> None:
    unet = {"a": "", "b": "a", "c": "b", "d": "c", "e": "d", "f": "ce", "g": "bf", "h": "ag"}
    found = cut(links_of(unet), frozenset("h"), 2)
    assert found == Cut((1, 1, 0, 0, 0, 0, 1, 1), {"b": (0,), "f": (1,)}, 1)  # no skip crosses
    plain = {name: chr(ord(name) - 1) if name > "a" else "" for name in unet}
    assert cut(links_of(plain), frozenset("h"), 2).stages == (0, 0, 0, 0, 1, 1, 1, 1)


def test_the_output_is_made_where_its_last_part_is() -> None:
    links = links_of({"a": "", "b": "a", "c": "b", "d": "a"})
    assert cut(links, frozenset("ac"), 4) == Cut((0, 1, 2, 3), {"a": (1, 2, 3), "b": (2,)}, 2)
    assert cut(links, frozenset(), 2).output == 1
