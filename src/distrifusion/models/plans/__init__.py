"""Plans of the diffusion transformers of diffusers. A new one is an entry here: see docs/adding-a-model.md."""

from ..plan import Plan
from .cross import CROSS
from .joint import JOINT
from .video import VIDEO

PLANS: tuple[Plan, ...] = (*CROSS, *JOINT, *VIDEO)

__all__ = ["PLANS"]
