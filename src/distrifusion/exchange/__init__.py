"""How old an answer may be: the freshness policies.

A layer asks at its seam by one of three verbs. The policy answers with values of this step (`Fresh`), of the step
before (`Stale`), or with none (`Absent`), and sends what the peers will want. Layers never know which policy they
talk to. Where the ranks share weights and not the picture, there is one verb more (`Summed`).
"""

from __future__ import annotations

from .absent import Absent
from .fresh import Fresh, Summed
from .named import Named
from .protocol import Exchange, Recall, Sides
from .rows import concatenated, outgoing, packed
from .stale import Stale, uses_old_moments

__all__ = [
    "Absent",
    "Exchange",
    "Fresh",
    "Named",
    "Recall",
    "Sides",
    "Stale",
    "Summed",
    "concatenated",
    "outgoing",
    "packed",
    "uses_old_moments",
]
