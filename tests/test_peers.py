"""benchmarks/peers: whose turn it is, what is made of the answers, and one run beside diffusers' Ulysses."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

PEERS = Path(__file__).parents[1] / "benchmarks" / "peers"


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PEERS))
    return import_module("compare")


def answers(*seconds: float) -> list[list[dict[str, float]]]:
    """Of two ranks."""
    return [[{"seconds": each, "cpu_seconds": each / 2} for each in seconds]] * 2


def test_turns_alternate_between_the_libraries(compare: Any) -> None:
    found = [(entry.library, entry.case, entry.ranks) for entry in compare.entries_for("distrifuser", [None, "int8"])]
    assert found == [
        ("ours", "bare", [0]),
        ("distrifuser_unet", "bare", [0]),
        ("ours", "displaced", None),
        ("ours", "displaced int8", None),
        ("distrifuser_unet", "corrected_async_gn", None),
        ("ours", "sync", None),
        ("ours", "sync int8", None),
        ("distrifuser_unet", "full_sync", None),
    ]
    assert [entry.case for entry in compare.entries_for("ulysses", [None])][2:] == ["displaced", "ulysses", "sync"]


def test_ratios_are_taken_within_a_round(compare: Any) -> None:
    entries = compare.entries_for("ulysses", [None])
    bare, theirs_bare, displaced, ulysses, sync = entries
    for slow in (1.0, 10.0, 3.0):  # the machine, in each round
        for entry, pace in ((bare, 4.0), (theirs_bare, 4.0), (displaced, 2.0), (ulysses, 3.0), (sync, 2.5)):
            entry.take(answers(slow * pace, slow * pace))
    order = compare.parse(["ulysses", "--rounds", "3", "--steps", "2"])
    found = compare.summary(order, compare.Settings("flux-mini", 1024, 78, [None]), entries)
    assert found["ratios"] == {"displaced over ulysses": 1.5, "sync over ulysses": 1.2}
    rows = {(row["library"], row["case"]): row for row in found["cases"]}
    assert rows["ours", "displaced"]["speedup"] == 2.0
    assert (rows["ours", "displaced"]["ranks"], rows["ours", "bare"]["ranks"]) == (2, 1)
    assert rows["ulysses", "ulysses"]["seconds_per_step"] == 9.0
    assert rows["ulysses", "ulysses"]["cpu_seconds_per_step"] == 9.0  # of both ranks


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["xdit"], "argument peer: invalid choice: 'xdit'"),
        (["distrifuser", "--model", "flux-mini"], "--model flux-mini: for distrifuser it must be one of sdxl, "),
        (["ulysses", "--python", "no-such-python"], "--python no-such-python: there is no such program"),
        (["ulysses", "--world", "1"], "--world 1 must be at least 2"),
        (["ulysses", "--size", "1000"], "--size 1000 must be a multiple of 64 for 2 ranks"),
        (["ulysses", "--codec", "zip"], "codec='zip' must be one of "),
    ],
)
def test_bad_arguments_are_one_line(
    compare: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        compare.parse(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_library_that_fails_is_named_with_its_reason(compare: Any) -> None:
    turns = import_module("turns")
    with pytest.raises(turns.LostError, match=r"a rank of nonsense failed:\n(.|\n)*No module named 'nonsense'"):
        turns.Ranks("nonsense", sys.executable, compare.Settings("sdxl-mini", 64, 77, [None]), 1, None)


def test_a_run_beside_ulysses(compare: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["ulysses", "--size", "64", "--rounds", "1", "--steps", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["library"], row["case"]): row for row in found["cases"]}
    assert set(rows) == {("ours", "bare"), ("ours", "displaced"), ("ours", "sync")} | {
        ("ulysses", "bare"),
        ("ulysses", "ulysses"),
    }
    assert rows["ours", "sync"]["error"] < 1e-5
    assert rows["ulysses", "ulysses"]["error"] < 1e-5  # the patched division has changed nothing else
    assert rows["ours", "displaced"]["error"] > 1e-5  # drifting latents
    assert all(row["seconds_per_step"] > 0 for row in found["cases"])
