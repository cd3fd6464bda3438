"""``parallelize`` and ``restore``: a diffusers pipeline, denoiser or VAE spread over the ranks, in place, and back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from diffusers import DiffusionPipeline
from torch import nn

from .comm import Comm, alone
from .comm.shared import SharedChannel
from .config import ParallelConfig
from .errors import ConfigError, UnsupportedModel
from .footprint import give_back_at_once, weight_bytes
from .mesh import Mesh
from .metrics import Report
from .models import controlnet_table, known_ends, table_for, vae_halves
from .parts import (
    compiled_wrapper,
    controlnets_of,
    denoisers_of,
    models_of,
    text_encoders_of,
    timesteps_of,
    vae_of,
)
from .planner.memory import LIBRARIES, Budget
from .products import asked_for, is_wanted
from .strategies.agreement import agree
from .strategies.balance import Balance
from .strategies.budget import shared_bytes
from .strategies.condition import SharedCondition
from .strategies.denoiser import ParallelDenoiser
from .strategies.encoders import SharedEncoder
from .strategies.guidance import Guidance
from .strategies.vae import ParallelVAE

T = TypeVar("T")

READ = "_distrifusion_read"
"""The attribute of a denoiser that says how its weights were read: see loading.py."""

_MARK = "_distrifusion"  # the attribute of a model that is parallel
_SHARED = "_distrifusion_shared"  # and of a text encoder that one rank runs for all


def parallelize(target: T, config: ParallelConfig | None = None, comm: Comm | None = None) -> T:
    """Spread every denoising step of ``target`` over the ranks, and what its VAE encodes and decodes, in place.

    Every rank calls this, and then the same pipeline with the same arguments; every rank gets the whole result.

    Args:
        target: a diffusers pipeline, a denoiser or a VAE, already loaded. A pipeline's VAE that cannot be parallel runs
            whole on every rank, and the report says so; ``restore(pipe.vae)`` asks for that.
        config: how; None: ``ParallelConfig()``, displaced patches over all ranks.
        comm: the ranks; None: torch.distributed's group if there is one, else one made from torchrun's variables
            (LOCAL_RANK picks the device; NCCL on CUDA, Gloo on CPU), else a world of one.

    Returns:
        The same object. A world of one changes nothing, but for a ``topology`` whose ends meet, and ``max_memory``.

    Raises:
        ConfigError: the world does not fit the configuration, the target is parallel already, or DISTRIFUSION_ONEDNN is
            neither 0 nor 1.
        UnsupportedModel: a model without a table, or a module that would be computed wrongly in patches.
        RanksDisagree: the ranks have different configurations.
    """
    config = config if config is not None else ParallelConfig()
    asked_for()  # a bad variable is refused before the ranks wait for each other
    models, vae = denoisers_of(target), vae_of(target)
    for model in [*models, *controlnets_of(target)]:
        if hasattr(model, _MARK):
            raise ConfigError(f"this {type(model).__name__} is parallel already; call df.restore first")
    if comm is None:
        comm = _comm_from_environment(target, models or [vae])
    if comm is None or comm.world == 1:
        Mesh.fit(config, 1)
        if config.topology == "plane" and config.max_memory is None:
            return target
        comm = comm if comm is not None else alone(next((models or [vae])[0].parameters()).device)
    if config.topology != "plane":
        _check_ends(target, config)
    agree(comm, {"configuration": str(config)})  # before ranks act on other ones in another order
    mesh = Mesh.fit(config, comm.world)
    guidance = Guidance(mesh, comm)
    timesteps = timesteps_of(target)
    budget = _budget(target, models or [vae], config, comm, mesh)
    is_shared = hasattr(vae, _MARK)
    try:
        products = config.max_memory is None and _take_products(comm)
        whole = _spread_vae(vae, config, comm, timesteps, budget, is_target=not models, products=products)
        agree(comm, {"VAE": "; ".join(whole) or "parallel"})  # or a rank with offload would leave the others to wait
        for model in models:
            nets = [] if model is target else controlnets_of(target)
            is_cut = config.strategy in ("pipelined", "tensor")  # into stages or slices, not patches
            tables = [None if is_cut else controlnet_table(net, model) for net in nets]
            notes = [*whole, *filter(None, [getattr(model, READ, "")])]
            conditions: list[SharedCondition] = []
            if None in tables:  # their outputs are added up: all in patches, or all whole
                notes += [f"{type(net).__name__} runs whole on every rank" for net in nets]
                conditions += [SharedCondition(net, comm) for net in nets]
                tables.clear()
            feeders: list[ParallelDenoiser] = []
            shared: dict[str, Any] = {
                "guidance": guidance,
                "balance": Balance(config, mesh, comm),
                "products": products,
            }
            for table in filter(None, tables):
                wrapper = compiled_wrapper(target, table.model)
                feeders.append(ParallelDenoiser(table, config, comm, timesteps, wrapper=wrapper, **shared))
                setattr(table.model, _MARK, feeders[-1])
            own = table_for(model)
            shared |= {"wrapper": compiled_wrapper(target, model), "conditions": conditions, "budget": budget}
            parallel = ParallelDenoiser(own, config, comm, timesteps, feeders=feeders, notes=notes, **shared)
            setattr(model, _MARK, parallel)
    except Exception:
        for model in [*models, *controlnets_of(target), *([] if is_shared else [vae])]:
            _take_back(model)
        raise
    if config.text_encoders != "every" and comm.world > 1:
        _share_encoders(target, comm, is_freed=config.text_encoders == "freed")
    return target


def _take_products(comm: Comm) -> bool:
    """Whether all ranks want `fast_products`: those that compute the same are to have the same bits. Blocks."""
    return all(comm.all_gather_object(comm.device.type == "cpu" and is_wanted()))


def _share_encoders(target: Any, comm: Comm, is_freed: bool) -> None:
    """Let one rank run each text encoder for all, but those that an offload hook moves about, which stay as they are.

    Raises:
        RanksDisagree: ranks of which some have such hooks: one would wait for what another never says.
    """
    encoders = {name: part for name, part in text_encoders_of(target).items() if not hasattr(part, "_hf_hook")}
    # Another pipeline's may be shared already, as those of a refiner and its base.
    new = {name: part for name, part in encoders.items() if not hasattr(part, _SHARED)}
    agree(comm, {"text encoders that run once": ", ".join(new) or "none"})
    for place, (name, encoder) in enumerate(encoders.items()):
        if name in new:
            setattr(encoder, _SHARED, SharedEncoder(encoder, name, comm, place % comm.world, freed=is_freed))


def _check_ends(target: Any, config: ParallelConfig) -> None:
    """Refuse what would see the ends of a picture where they are to meet.

    Raises:
        UnsupportedModel: a T2I-Adapter, or a ControlNet of another kind than the U-Net's.
    """
    strangers = [getattr(target, "adapter", None)] if isinstance(target, DiffusionPipeline) else []
    for model in denoisers_of(target) if isinstance(target, DiffusionPipeline) else []:
        strangers += [net for net in controlnets_of(target) if controlnet_table(net, model) is None]
    for stranger in strangers:
        if stranger is not None:
            raise UnsupportedModel(
                f"topology={config.topology!r}: {type(stranger).__name__} runs whole and sees the ends of the picture; "
                "leave it out"
            )


def _budget(target: Any, models: list[Any], config: ParallelConfig, comm: Comm, mesh: Mesh) -> Budget | None:
    """The memory of a rank, where it is given.

    Raises:
        ConfigError: it does not hold the weights.
    """
    if config.max_memory is None:
        return None
    assert isinstance(config.max_memory, int)
    parts = list(target.components.values()) if isinstance(target, DiffusionPipeline) else models
    is_cpu = comm.device.type == "cpu"
    if is_cpu:
        give_back_at_once()
    weights = weight_bytes(*(part for part in parts if isinstance(part, nn.Module)))
    rings = shared_bytes(mesh, streams=config.patches is not None) if comm.wire == SharedChannel.name else 0
    budget = Budget(config.max_memory, weights, LIBRARIES if is_cpu else 0, rings)
    budget.check_weights()
    return budget


def _spread_vae(
    vae: Any,
    config: ParallelConfig,
    comm: Comm,
    timesteps: Callable[[], Any],
    budget: Budget | None,
    is_target: bool,
    products: bool,
) -> list[str]:
    """Make ``vae`` parallel, if there is one; what the report is to say where it is not.

    Raises:
        ConfigError: the world does not fit, or it is parallel already, other than by a pipeline that shares it.
        UnsupportedModel: it is the target, and cannot be parallel; or its pictures have ends that cannot meet.
    """
    if vae is None:
        return []
    name = type(vae).__name__
    before = getattr(vae, _MARK, None)
    if before is not None:
        if is_target:
            raise ConfigError(f"this {name} is parallel already; call df.restore first")
        if before.topology != config.topology:
            raise ConfigError(
                f"this {name} has topology={before.topology!r} already, in a pipeline that shares it, "
                f"and is to have {config.topology!r}; call df.restore on that first"
            )
        if before.place != (comm.rank, comm.world):
            raise ConfigError(
                f"this {name} is parallel already, as rank {before.place[0]} of {before.place[1]}, and this is rank "
                f"{comm.rank} of {comm.world}: give each rank one of its own, or call df.restore first"
            )
        return []
    halves = vae_halves(vae)
    needs_it = is_target or config.topology != "plane"
    if config.topology != "plane" and name not in known_ends():
        raise UnsupportedModel(f"{name} makes no picture whose ends meet; known are {', '.join(known_ends())}")
    if halves is None:
        return [f"{name} runs whole on every rank"]
    try:
        setattr(vae, _MARK, ParallelVAE(halves, config, comm, timesteps, budget, products))
    except UnsupportedModel as why:
        if needs_it:
            raise
        return [f"{name} runs whole on every rank: {why}"]
    return []


def restore(target: T) -> T:
    """Take everything back: the models are bit-equal to before and carry no wrapper.

    What is not parallel is left alone. A VAE that other pipelines share runs whole in these too from then on.

    Raises:
        ConfigError: another library has wrapped the model since (offload or cache hooks): ours cannot be taken out.
    """
    for model in models_of(target):
        _take_back(model)
    for encoder in text_encoders_of(target).values():
        shared = getattr(encoder, _SHARED, None)
        if shared is not None:
            shared.detach()
            delattr(encoder, _SHARED)
    _take_back(vae_of(target))
    return target


def _take_back(model: Any) -> None:
    parallel = getattr(model, _MARK, None)
    if parallel is not None:
        parallel.detach()
        for each in parallel.models:
            delattr(each, _MARK)
            each.__dict__.pop(READ, None)  # it is whole


def reset(target: Any) -> None:
    """The next call starts a new picture. Pipelines do this by themselves; loops over a bare denoiser may need it."""
    for model in models_of(target):
        parallel = getattr(model, _MARK, None)
        if parallel is not None:
            parallel.reset()


def report(target: Any) -> Report:
    """What ran on this rank for the present or last picture; a target that is not parallel: one rank, no steps.

    Of a pipeline with two denoisers, such as Wan 2.2's: the steps of the first and then of the second.
    """
    denoisers, own = denoisers_of(target), getattr(vae_of(target), _MARK, None)
    vae: ParallelVAE | None = own
    parallels = [getattr(model, _MARK) for model in denoisers if hasattr(model, _MARK)]
    if parallels:
        mark = timesteps_of(target)()
        reports = [parallel.report for parallel in parallels if parallel.is_of(mark)] or [parallels[0].report]
        found: Report = functools.reduce(Report.then, reports[1:], reports[0].copy())
    else:
        found = vae.report if vae is not None and not denoisers else Report("none", str(Mesh((1, 1, 1))))
    if vae is not None:
        found.vae = dict(vae.tally)
    budgets = [each.budget for each in (*parallels, vae) if each is not None and each.budget is not None]
    found.notes += budgets[0].lines if budgets else []
    return found


def _comm_from_environment(target: Any, models: list[Any]) -> Comm | None:
    from .comm.torch_dist import TorchComm

    device = next(models[0].parameters()).device
    comm = TorchComm.from_environment(device.type)
    if comm is not None and device.type != "cpu" and comm.device != device:
        # Loaded with .to("cuda"), which is the first device on every rank.
        target.to(comm.device)
    return comm
