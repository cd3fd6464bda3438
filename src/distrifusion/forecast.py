"""What a picture will take of the memory that is given, from configurations alone, before anything is loaded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint
from .config import ParallelConfig
from .mesh import Mesh
from .planner.memory import Budget

if TYPE_CHECKING:
    import torch

TOKENS = 77  # of a text, where its encoder does not say how many


def forecast(
    found: Checkpoint,
    config: ParallelConfig,
    mesh: Mesh,
    size: tuple[int, int] | None,
    *,
    dtype: str | None,
    device: str,
    is_guided: bool = True,
) -> Budget:
    """How one picture with ``size``, its latent's rows and columns, fits into ``config.max_memory`` on each rank.

    Each rank makes the same plan again with what it is called with, before the work it is about. A transformer's step
    is planned there alone, since only its pipeline knows the arguments; where ranks share the model, none is.

    Args:
        found: the model.
        config: with ``max_memory``.
        mesh: of the ranks.
        size: of the latent; None, where only the pipeline knows it: whether the weights fit.
        dtype: torch's name of it, for weights; None: the checkpoint's own.
        device: of the ranks.
        is_guided: both branches of guidance are in one batch.

    Raises:
        ConfigError: it does not fit; says what is needed.
    """
    import torch

    from .loading import weights_budget
    from .reading import readings_of
    from .strategies.holding import shares_model

    numbers = getattr(torch, dtype or found.dtype or "float32")
    readings = readings_of(found.path, config, mesh, numbers, {})
    budget = weights_budget(found, config, mesh, readings, dtype=numbers, device=device)
    budget.check_weights()
    if size is None:
        return budget
    if found.denoiser == "unet" and not shares_model(mesh):
        _plan_step(budget, found, config, mesh, size, numbers, 2 if is_guided else 1)
    _plan_decode(budget, found, config, mesh, size, numbers)
    return budget


def _plan_step(
    budget: Budget,
    found: Checkpoint,
    config: ParallelConfig,
    mesh: Mesh,
    size: tuple[int, int],
    dtype: torch.dtype,
    batch: int,
) -> None:
    import torch

    from .layers import Attached, Frame, FrameHolder
    from .models import table_for
    from .strategies.budget import Pretended, StepTrial, largest_patch, patch_layers

    unet, holder = _built(found, "unet", dtype), FrameHolder()
    if unet is None:
        return
    table, dim, settings = table_for(unet), 3 if config.split == "cols" else 2, unet.config
    num_patches = mesh.size("patch")
    levels = table.levels(*size, config.weights or (1.0,) * num_patches, dim).with_rings(*config.rings, dim)
    batch = max(batch // mesh.size("cfg"), 1)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    width = settings.get("cross_attention_dim")
    given: dict[str, Any] = {"sample": empty(batch, settings["in_channels"], *size), "timestep": empty()}
    if isinstance(width, int):
        tokens = _settings(found, "text_encoder").get("max_position_embeddings", TOKENS)
        given["encoder_hidden_states"] = empty(batch, tokens, width)
    if settings.get("addition_embed_type") == "text_time":
        times = 6 * settings["addition_time_embed_dim"]
        pooled = settings["projection_class_embeddings_input_dim"] - times
        given["added_cond_kwargs"] = {"text_embeds": empty(batch, pooled), "time_ids": empty(batch, 6)}
    attached = Attached()
    attached.follow(patch_layers(table, holder, is_cut=num_patches > 1, has_budget=True))
    frame = Frame(largest_patch(levels.splits[0]), dim, levels, Pretended(), context_window=config.context_window)
    _, fit, budget.kept = StepTrial(table, holder, table.bind((), given), frame).fit(
        budget, keeps=config.keeps_words and num_patches > 1
    )
    budget.accept(fit)


def _plan_decode(
    budget: Budget, found: Checkpoint, config: ParallelConfig, mesh: Mesh, size: tuple[int, int], dtype: torch.dtype
) -> None:
    import torch

    from .layers import Attached, FrameHolder
    from .models import vae_halves
    from .strategies.budget import half_fit

    vae, holder = _built(found, "vae", dtype), FrameHolder()
    halves = vae_halves(vae) if vae is not None else None
    half = next((half for half in halves or () if half.kind == "decode"), None)
    if half is None:
        return
    frames = (1,) if found.sizes.is_video else ()
    channels = vae.config.get("latent_channels") or vae.config["z_dim"]
    sample = torch.empty((1, channels, *frames, *size), dtype=dtype)
    dim = 3 if config.split == "cols" else 2
    attached = Attached()
    attached.follow(half.layers(holder))
    levels = half.levels(sample, mesh.world, dim, config.rings)
    _, fit = half_fit(half, holder, levels, dim, {half.input_name: sample}, budget)
    budget.accept(fit)


def _built(found: Checkpoint, part: str, dtype: torch.dtype) -> Any:
    """A component with weights that take no memory; None where there is no such component of diffusers."""
    import diffusers
    import torch

    from .footprint import imagined

    settings = _settings(found, part)
    made = getattr(diffusers, str(settings.get("_class_name")), None)
    if made is None:
        return None
    if settings.get("force_upcast") and part == "vae" and dtype == torch.float16:
        dtype = torch.float32  # as the pipelines do for one decode
    return imagined(lambda: made.from_config(settings), dtype)


def _settings(found: Checkpoint, part: str) -> dict[str, Any]:
    file = found.path / part / "config.json"
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return settings
