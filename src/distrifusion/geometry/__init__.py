"""Which rows belong to whom, and which rows a layer must borrow. Integers only: no tensors, no communication.

Everything is said along one dim, rows or columns; "row" stands for either. The one rule that carries the rest
(distdl's): what a rank borrows follows from the rows of *output* that it owns, so stride, uneven patches and kernels
larger than a patch need no special case, and what I send is my peer's need by the same function. Where the ends of the
picture meet, rows beyond it are those at the other end; nothing else changes.
"""

from .halos import Halo, Part, halo, moves
from .levels import Levels
from .moving import Blend, Moved, blend
from .readers import Chain, Nearby, Nearest, Reader, Window
from .seen import Visit, borders, near, newest
from .spans import Span, Split, laps

__all__ = [
    "Blend",
    "Chain",
    "Halo",
    "Levels",
    "Moved",
    "Nearby",
    "Nearest",
    "Part",
    "Reader",
    "Span",
    "Split",
    "Visit",
    "Window",
    "blend",
    "borders",
    "halo",
    "laps",
    "moves",
    "near",
    "newest",
]
