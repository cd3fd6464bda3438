"""Tables that say what a model is made of. A model without one is refused by name."""

from __future__ import annotations

from typing import Any

from ..config import BUILT
from ..errors import UnsupportedModel
from .table import Call, Table

__all__ = ["Call", "Table", "controlnet_table", "is_known", "supported", "table_for"]


def table_for(model: Any) -> Table:
    """The table of a denoiser.

    Raises:
        UnsupportedModel: no table knows its class; lists those that are known.
    """
    from .unet import FAMILIES, UNetTable

    if type(model) in FAMILIES:
        return UNetTable(model)
    if "ControlNet" in type(model).__name__ and not type(model).__name__.startswith("UNet"):
        raise UnsupportedModel(f"{type(model).__name__} is spread together with its U-Net: give the pipeline of both")
    known = ", ".join(family.__name__ for family in FAMILIES)
    raise UnsupportedModel(f"{type(model).__name__} has no table; known are: {known}")


def controlnet_table(controlnet: Any, unet: Any) -> Table | None:
    """The table of a ControlNet that feeds ``unet``; None: it can only run whole on every rank, which is exact too."""
    from .controlnet import ControlNetTable, fits

    return ControlNetTable(controlnet) if fits(controlnet, unet) else None


def is_known(model: Any) -> bool:
    """Whether a table knows the class of ``model``."""
    try:
        table_for(model)
    except UnsupportedModel:
        return False
    return True


def supported() -> list[dict[str, Any]]:
    """One entry per class of denoiser: ``class``, ``models``, ``strategies``, ``features`` and ``checked``."""
    checked = (
        "sync equals one device (relative L2 <= 1e-5, float32), worlds 2 3 4 5 7, rows and columns, batch 1 and 3, "
        "odd sizes; displaced with held input equals sync; tests/test_unet_exact.py, tests/test_pipelines.py"
    )
    return [
        {
            "class": "UNet2DConditionModel",
            "models": ["Stable Diffusion 1.x", "Stable Diffusion 2.x", "SDXL base", "SDXL refiner"],
            "strategies": list(BUILT),
            "features": [
                "cfg=2",
                "ControlNet",
                "T2I-Adapter",
                "IP-Adapter (masks too)",
                "LoRA",
                "image-to-image",
                "inpainting",
                "PAG",
            ],
            "checked": checked,
        },
        {
            "class": "UNet2DModel",
            "models": ["DDPM", "DDIM (unconditional)"],
            "strategies": list(BUILT),
            "features": ["class labels", "attention with group norm inside"],
            "checked": checked,
        },
    ]
