"""Some of the random cases; `random_cases.py` runs as many as there is time for."""

from __future__ import annotations

from typing import Any

import pytest

from distrifusion.comm.tape import RECORDERS
from distrifusion.exchange import Fresh
from playing import PlayedRecorder
from random_cases import complaint, draw


@pytest.mark.parametrize("number", [1, 9, 18, 21, 22, 33, 43, 54])
def test_random_cases(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every strategy, with models and settings that no other test puts together."""
    monkeypatch.setitem(RECORDERS, "cpu", PlayedRecorder)
    case = draw(number)
    assert complaint(case) is None, case


def test_a_wrong_result_is_complained_of(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = Fresh.gather

    def doubled(self: Fresh, key: str, own: Any, *args: Any, **more: Any) -> Any:
        return gather(self, key, [2 * part for part in own], *args, **more)

    monkeypatch.setattr(Fresh, "gather", doubled)
    assert "far from one device" in str(complaint(draw(56)))
