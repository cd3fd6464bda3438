"""``parallelize`` and ``restore``: a diffusers pipeline or denoiser spread over the ranks, in place, and back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from diffusers import DiffusionPipeline
from torch import nn

from .comm import Comm
from .config import ParallelConfig
from .errors import ConfigError, UnsupportedModel
from .mesh import Mesh
from .metrics import Report
from .models import controlnet_table, is_known, table_for
from .strategies.agreement import agree
from .strategies.denoiser import ParallelDenoiser
from .strategies.encoders import SharedEncoder
from .strategies.guidance import Guidance

T = TypeVar("T")

DENOISERS = ("unet", "transformer", "transformer_2")
"""Components of a pipeline that predict the noise."""

_MARK = "_distrifusion"  # the attribute of a denoiser that is parallel
_SHARED = "_distrifusion_shared"  # and of a text encoder that one rank runs for all


def parallelize(target: T, config: ParallelConfig | None = None, comm: Comm | None = None) -> T:
    """Spread every denoising step of ``target`` over the ranks, in place.

    Every rank calls this, and then the same pipeline with the same arguments; every rank gets the whole result.

    Args:
        target: a diffusers pipeline or a denoiser, already loaded.
        config: how; None: ``ParallelConfig()``, displaced patches over all ranks.
        comm: the ranks; None: torch.distributed's group if there is one, else one made from torchrun's variables
            (LOCAL_RANK picks the device; NCCL on CUDA, Gloo on CPU), else a world of one.

    Returns:
        The same object. A world of one changes nothing.

    Raises:
        ConfigError: the world does not fit the configuration, or the target is parallel already.
        UnsupportedModel: a model without a table, or a module that would be computed wrongly in patches.
        RanksDisagree: the ranks have different configurations.
    """
    config = config if config is not None else ParallelConfig()
    models = _denoisers(target)
    for model in [*models, *_controlnets(target)]:
        if hasattr(model, _MARK):
            raise ConfigError(f"this {type(model).__name__} is parallel already; call df.restore first")
    if comm is None:
        comm = _comm_from_environment(target, models)
    if comm is None or comm.world == 1:
        Mesh.fit(config, 1)
        return target
    agree(comm, {"configuration": str(config)})  # before ranks act on other ones in another order
    mesh = Mesh.fit(config, comm.world)
    guidance = Guidance(mesh, comm)
    timesteps = _timesteps_of(target)
    try:
        for model in models:
            nets = [] if model is target else _controlnets(target)
            is_cut = config.strategy == "pipelined"  # into stages, not patches
            tables = [None if is_cut else controlnet_table(net, model) for net in nets]
            notes: list[str] = []
            if None in tables:  # their outputs are added up: all in patches, or all whole
                notes += [f"{type(net).__name__} runs whole on every rank" for net in nets]
                tables.clear()
            if _is_compiled(target, model):
                notes.append("torch.compile does nothing while parallel")
            feeders: list[ParallelDenoiser] = []
            for table in filter(None, tables):
                feeders.append(ParallelDenoiser(table, config, comm, timesteps, guidance=guidance))
                setattr(table.model, _MARK, feeders[-1])
            own = table_for(model)
            parallel = ParallelDenoiser(own, config, comm, timesteps, guidance=guidance, feeders=feeders, notes=notes)
            setattr(model, _MARK, parallel)
    except Exception:
        for model in [*models, *_controlnets(target)]:
            _take_back(model)
        raise
    if config.text_encoders != "every":
        freed = config.text_encoders == "freed"
        for place, (name, encoder) in enumerate(_text_encoders(target).items()):
            if not hasattr(encoder, _SHARED):  # another pipeline's too, as the refiner's and the base's
                shared = SharedEncoder(encoder, name, comm, place % comm.world, freed=freed)
                setattr(encoder, _SHARED, shared)
    return target


def restore(target: T) -> T:
    """Take everything back: the model is bit-equal to before and carries no wrapper.

    What is not parallel is left alone.

    Raises:
        ConfigError: another library has wrapped the model since (offload or cache hooks): ours cannot be taken out.
    """
    for model in _denoisers(target):
        _take_back(model)
    for encoder in _text_encoders(target).values():
        shared = getattr(encoder, _SHARED, None)
        if shared is not None:
            shared.detach()
            delattr(encoder, _SHARED)
    return target


def _take_back(model: Any) -> None:
    parallel = getattr(model, _MARK, None)
    if parallel is not None:
        parallel.detach()
        for each in parallel.models:
            delattr(each, _MARK)


def reset(target: Any) -> None:
    """The next call starts a new picture. Pipelines do this by themselves; loops over a bare denoiser may need it."""
    for model in _denoisers(target):
        parallel = getattr(model, _MARK, None)
        if parallel is not None:
            parallel.reset()


def report(target: Any) -> Report:
    """What ran on this rank for the present or last picture; a target that is not parallel: one rank, no steps."""
    for model in _denoisers(target):
        parallel = getattr(model, _MARK, None)
        if parallel is not None:
            found: Report = parallel.report.copy()
            return found
    return Report("none", str(Mesh((1, 1, 1))))


def _denoisers(target: Any) -> list[Any]:
    """The denoisers of ``target`` that have a table.

    Raises:
        UnsupportedModel: there is none; says what is known.
    """
    if isinstance(target, DiffusionPipeline):
        found = [getattr(target, name, None) for name in DENOISERS]
        models = [_unwrapped(model) for model in found if isinstance(model, nn.Module)]
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
        model = _unwrapped(target)
        table_for(model)
        return [model]
    raise UnsupportedModel(f"{type(target).__name__} is neither a diffusers pipeline nor a denoiser")


def _controlnets(target: Any) -> list[Any]:
    """The ControlNets of a pipeline, each once."""
    controlnet = getattr(target, "controlnet", None) if isinstance(target, DiffusionPipeline) else None
    if not isinstance(controlnet, nn.Module):
        return []
    controlnet = _unwrapped(controlnet)
    nets = [_unwrapped(net) for net in getattr(controlnet, "nets", None) or [controlnet]]
    return list({id(net): net for net in nets}.values())


def _text_encoders(target: Any) -> dict[str, nn.Module]:
    """The text encoders of a pipeline, by name: not those that an offload hook moves about, which stay as they are."""
    if not isinstance(target, DiffusionPipeline):
        return {}
    found = {name: part for name, part in target.components.items() if name.startswith("text_encoder")}
    modules = {name: _unwrapped(part) for name, part in sorted(found.items()) if isinstance(part, nn.Module)}
    return {name: module for name, module in modules.items() if not hasattr(module, "_hf_hook")}


def _is_compiled(target: Any, model: nn.Module) -> bool:
    candidates = [target, *(getattr(target, name, None) for name in DENOISERS)]
    return model._compiled_call_impl is not None or any(
        getattr(candidate, "_orig_mod", None) is model for candidate in candidates
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module below ``torch.compile``."""
    original = getattr(model, "_orig_mod", model)
    assert isinstance(original, nn.Module)
    return original


def _timesteps_of(target: Any) -> Callable[[], Any]:
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


def _comm_from_environment(target: Any, models: list[Any]) -> Comm | None:
    from .comm.torch_dist import TorchComm

    device = next(models[0].parameters()).device
    comm = TorchComm.from_environment(device.type)
    if comm is not None and device.type != "cpu" and comm.device != device:
        # Loaded with .to("cuda"), which is the first device on every rank.
        target.to(comm.device)
    return comm
