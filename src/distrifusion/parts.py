"""The parts of what is to be parallel: a pipeline's denoisers, VAE, ControlNets and text encoders, by name."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from .errors import UnsupportedModel
from .models import is_known, table_for, vae_halves

DENOISERS = ("unet", "transformer", "transformer_2")
"""Components of a pipeline that predict the noise."""


def models_of(target: Any) -> list[Any]:
    """All that may be parallel of ``target``: denoisers, whose ControlNets go with them, and the VAE."""
    vae = vae_of(target)
    return denoisers_of(target) + ([vae] if vae is not None else [])


def vae_of(target: Any) -> Any:
    """The VAE of a pipeline, or ``target`` where it is a VAE that is known; else None."""
    if isinstance(target, DiffusionPipeline):
        vae = getattr(target, "vae", None)
        return unwrapped(vae) if isinstance(vae, nn.Module) else None
    model = unwrapped(target) if isinstance(target, nn.Module) else None
    return model if model is not None and vae_halves(model) is not None else None


def denoisers_of(target: Any) -> list[Any]:
    """The denoisers of ``target`` that have a table; none where it is a VAE.

    Raises:
        UnsupportedModel: there is none; says what is known.
    """
    if isinstance(target, DiffusionPipeline):
        found = [getattr(target, name, None) for name in DENOISERS]
        models = [unwrapped(model) for model in found if isinstance(model, nn.Module)]
        if not models:
            raise UnsupportedModel(
                f"{type(target).__name__} has no denoiser by one of the names {', '.join(DENOISERS)}; "
                "give the denoiser itself"
            )
        known = [model for model in models if is_known(model)]
        if not known:
            table_for(models[0])  # raises, with the list
        return known
    if isinstance(target, nn.Module):
        model = unwrapped(target)
        if vae_halves(model) is not None:
            return []
        table_for(model)
        return [model]
    raise UnsupportedModel(f"{type(target).__name__} is neither a diffusers pipeline nor a denoiser nor a VAE")


def controlnets_of(target: Any) -> list[Any]:
    """The ControlNets of a pipeline, each once."""
    controlnet = getattr(target, "controlnet", None) if isinstance(target, DiffusionPipeline) else None
    if not isinstance(controlnet, nn.Module):
        return []
    controlnet = unwrapped(controlnet)
    nets = [unwrapped(net) for net in getattr(controlnet, "nets", None) or [controlnet]]
    return list({id(net): net for net in nets}.values())


def text_encoders_of(target: Any) -> dict[str, nn.Module]:
    """The text encoders of a pipeline, by name."""
    if not isinstance(target, DiffusionPipeline):
        return {}
    found = {name: part for name, part in target.components.items() if name.startswith("text_encoder")}
    return {name: unwrapped(part) for name, part in sorted(found.items()) if isinstance(part, nn.Module)}


def compiled_wrapper(target: Any, model: nn.Module) -> Any:
    """What ``torch.compile(model)`` made, if it is the target, or in the target."""
    controlnet = getattr(target, "controlnet", None)
    candidates = [target, *(getattr(target, name, None) for name in DENOISERS), controlnet]
    candidates += getattr(controlnet, "nets", None) or []
    return next((each for each in candidates if getattr(each, "_orig_mod", None) is model), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module below ``torch.compile``."""
    original = getattr(model, "_orig_mod", model)
    assert isinstance(original, nn.Module)
    return original


def timesteps_of(target: Any) -> Callable[[], Any]:
    """Asks the pipeline's present scheduler for its timesteps: ``set_timesteps`` makes a new tensor each time."""
    if not isinstance(target, DiffusionPipeline):
        return lambda: None
    pipe = weakref.ref(target)
    scheduler = getattr(target, "scheduler", None)

    def timesteps() -> Any:
        nonlocal scheduler
        alive = pipe()
        if alive is not None:  # else the pipelines that from_pipe made of it, which have its scheduler, live on
            scheduler = getattr(alive, "scheduler", None)
        return getattr(scheduler, "timesteps", None)

    return timesteps
