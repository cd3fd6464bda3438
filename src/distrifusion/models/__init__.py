"""Tables that say what a model is made of. A model without one is refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..config import BUILT
from ..errors import UnsupportedModel
from ..layers import FrameHolder, Layer
from .table import Call, Table

if TYPE_CHECKING:
    from .vae import Half

__all__ = [
    "Call",
    "Half",
    "Table",
    "controlnet_table",
    "feed_forwards",
    "fused",
    "is_known",
    "known_ends",
    "sliced_layers",
    "stage_layers",
    "stream_layers",
    "supported",
    "table_for",
    "vae_halves",
]


def table_for(model: Any) -> Table:
    """The table of a denoiser.

    Raises:
        UnsupportedModel: no table knows its class; lists those that are known.
    """
    from .plans import PLANS
    from .transformer import TransformerTable
    from .unet import FAMILIES, UNetTable

    if type(model) in FAMILIES:
        return UNetTable(model)
    for plan in PLANS:
        if type(model) is plan.model:
            return TransformerTable(model, plan)
    if "ControlNet" in type(model).__name__ and not type(model).__name__.startswith("UNet"):
        raise UnsupportedModel(f"{type(model).__name__} is spread together with its U-Net: give the pipeline of both")
    from .vaes import PLANS as VAES

    known = ", ".join(family.__name__ for family in (*FAMILIES, *(plan.model for plan in PLANS), *VAES))
    raise UnsupportedModel(f"{type(model).__name__} has no table; known are: {known}")


def vae_halves(vae: Any) -> tuple[Half, ...] | None:
    """Encoder and decoder of a VAE; None: no table knows its class."""
    from .vae import halves
    from .vaes import PLANS

    return halves(vae) if type(vae) in PLANS else None


def controlnet_table(controlnet: Any, unet: Any) -> Table | None:
    """The table of a ControlNet that feeds ``unet``; None: it can only run whole on every rank, which is exact too."""
    from .controlnet import ControlNetTable, fits

    return ControlNetTable(controlnet) if fits(controlnet, unet) else None


def known_ends() -> list[str]:
    """Classes of VAEs that make pictures whose ends meet."""
    from .vaes import PICTURES, PLANS

    return [each.__name__ for each in PLANS if each in PICTURES]


def feed_forwards(model: Any, holder: FrameHolder) -> Iterator[Layer]:
    """Layers that can work on a part of their tokens at a time; not attached."""
    from .blocks import feed_forwards

    return feed_forwards(model, holder)


def stage_layers(model: Any, num_stages: int, holder: FrameHolder, inner: Iterable[Layer] = ()) -> Iterator[Layer]:
    """The units that stages of ``model``, which has a table, are made of, and the ``inner`` layers; not attached.

    A unit runs the inner layer of its module.

    Raises:
        ConfigError: fewer units than stages.
        UnsupportedModel: a model that is not known in stages.
    """
    from . import units
    from .plans import PLANS

    plan = next((plan for plan in PLANS if type(model) is plan.model), None)
    return units.stage_layers(model, plan, num_stages, holder, inner)


def stream_layers(model: Any, num_stages: int, holder: FrameHolder) -> Iterator[Layer]:
    """The same, and the patch layers of ``model``, for patches that stream through the stages.

    Raises:
        ConfigError: fewer units than stages.
        UnsupportedModel: it is no transformer.
    """
    from . import units
    from .plans import PLANS

    plan = next((plan for plan in PLANS if type(model) is plan.model), None)
    return units.stream_layers(model, plan, num_stages, holder)


def sliced_layers(model: Any, rank: int, num_ranks: int, holder: FrameHolder) -> Iterator[Layer]:
    """The layers of ``model``, which has a table, of which ``rank`` has a slice of the weights; not attached.

    Raises:
        ConfigError: fewer heads, groups or features than ranks.
        UnsupportedModel: a model, or a part of one, that is not known in slices.
    """
    from . import slices

    return slices.sliced_layers(model, rank, num_ranks, holder)


def fused(model: Any) -> frozenset[str]:
    """Names of modules into whose weights an adapter is fused."""
    from . import slices

    return slices.fused(model)


def is_known(model: Any) -> bool:
    """Whether a table knows the class of ``model``."""
    try:
        table_for(model)
    except UnsupportedModel:
        return False
    return True


_MODULES = (
    "sync equals one device (relative L2 <= 1e-5, float32) at worlds 2, 3, 4, 5, 7, rows and columns, batch 1 to 3, \
odd sizes; displaced with a held input equals sync: tests/test_unet_exact.py; pipelined with a held input equals one \
device after as many steps as stages, worlds 2 to 7: tests/test_pipelined.py, tests/test_pipelined_pipelines.py, in \
patches within stages at 2 x 2, 3 x 2, 2 x 3 and 2 x 2 x 2: tests/test_pipelined_patches.py; \
tensor equals one device at worlds 2 to 5, batch 2, heads and groups that the ranks do not divide: tests/test_tensor.py"
)


CHECKED_WITH = "0.42.1"
"""The release of diffusers that the tests ran with."""

_TRANSFORMERS = """\
sync equals one device (relative L2 <= 1e-5, float32) at worlds 2, 3, 4, 5, rows and columns, batch 1 and 2, uneven \
rows of tokens; displaced with a held input equals sync; cfg=2 at 2 and 4: tests/test_transformers.py; videos by \
frames at 2 to 5: tests/test_transformers_video.py; final latents of whole pipelines, sync and displaced in warm-up, \
worlds 2 and 3, cfg=2: tests/test_pipelines_cross.py, tests/test_pipelines_joint.py, tests/test_pipelines_video.py; \
pipelined with a held input equals one device after two steps at world 2: tests/test_pipelined_transformers.py, in \
patches within stages (3 classes): tests/test_pipelined_patches.py; \
in patches that stream, after one more than there are blocks, worlds 2 and 3: tests/test_stream.py; tensor \
equals one device at world 2, with 5 heads at 3 and 5, batch 2: tests/test_tensor.py"""


_VAES = {
    "AutoencoderKL": ["Stable Diffusion 1.x, 2.x, 3.x", "SDXL", "FLUX.1", "Z-Image"],
    "AutoencoderKLFlux2": ["FLUX.2"],
    "AutoencoderTiny": ["TAESD", "the bundled model"],
    "AutoencoderKLQwenImage": ["Qwen-Image"],
    "AutoencoderKLWan": ["Wan 2.1", "Wan 2.2"],
}


def supported() -> list[dict[str, Any]]:
    """One entry per class: ``class``, ``models``, ``strategies``, ``features``, ``checked``, ``diffusers``.

    Denoisers first, then VAEs. ``checked`` says what was compared with what, and the tests that do it: models of these
    shapes a few channels wide, with random weights, on ranks that are threads. ``diffusers`` is the release they ran
    with.
    """
    from .plans import PLANS

    transformers = [
        {
            "class": plan.model.__name__,
            "models": list(plan.names),
            "strategies": list(BUILT),
            "features": [
                "cfg=2: a batch is halved, two calls per step run at the same time",
                "LoRA (checked on FLUX.1 and Sana)",
                "attention processors and backends",
                *(["split by frames"] if plan.frames is not None else []),
            ],
            "checked": _TRANSFORMERS,
        }
        for plan in PLANS
    ]
    vaes = [
        {
            "class": name,
            "models": models,
            "strategies": list(BUILT),
            "features": [
                "exact under every strategy, by rows or columns over all ranks",
                "encode and decode",
                "slicing",
                "tiling (runs whole on every rank)",
            ],
            "checked": "encode and decode equal one device (relative L2 <= 1e-5, float32) at worlds 2, 3, 5, rows and "
            "columns, batch 1 and 2, odd sizes: tests/test_vae_exact.py; whole pipelines: tests/test_pipelines_vae.py",
        }
        for name, models in _VAES.items()
    ]
    return [{**entry, "diffusers": CHECKED_WITH} for entry in (*_unets(), *transformers, *vaes)]


def _unets() -> list[dict[str, Any]]:
    return [
        {
            "class": "UNet2DConditionModel",
            "models": [
                "Stable Diffusion 1.x",
                "Stable Diffusion 2.x",
                "SDXL base",
                "SDXL refiner",
                "x4 upscaler",
                "LCM",
                "DeepFloyd IF",
            ],
            "strategies": list(BUILT),
            "features": [
                "cfg=2",
                "text-to-image, image-to-image, inpainting (4 and 9 channels), InstructPix2Pix",
                "ControlNet in patches",
                "T2I-Adapter",
                "IP-Adapter (several, with masks, loaded before or after)",
                "LoRA (linear and convolution, loaded before or after)",
                "PAG (not with cfg=2)",
                "every scheduler of the pipeline",
                "callbacks, batches, sizes that change from call to call",
                "topology: panoramas and tiles",
            ],
            "checked": f"{_MODULES}; final latents of whole pipelines, sync and displaced in warm-up, worlds 2 and 3, "
            "cfg=2 at 2, 4 and 6: tests/test_pipelines.py, tests/test_adapters.py, tests/test_lora.py, "
            "tests/test_schedulers.py; rolled noise gives rolled pictures: "
            "tests/test_topology.py; what is refused: tests/test_unsupported.py",
        },
        {
            "class": "UNet2DModel",
            "models": ["DDPM", "DDIM (unconditional)"],
            "strategies": list(BUILT),
            "features": ["class labels", "attention with group norm inside"],
            "checked": f"{_MODULES}; DDPM and DDIM pipelines, worlds 2 and 3: tests/test_pipelines.py",
        },
        {
            "class": "ControlNetModel",
            "models": ["ControlNet for Stable Diffusion and SDXL, one or several, with the pipeline of their U-Net"],
            "strategies": list(BUILT),
            "features": [
                "cfg=2",
                "guess_mode",
                "global_pool_conditions",
                "LoRA",
                "other kinds run whole on every rank",
            ],
            "checked": "final latents of whole pipelines equal one device (relative L2 <= 1e-5, float32), sync and "
            "displaced in warm-up, worlds 2, 3 and 5, cfg=2 at 2, 4 and 6; displaced with a held input equals sync; at "
            "most 7 messages per displaced step beside the U-Net's 8: tests/test_controlnet.py",
        },
    ]
