"""One process's painter: the pipeline alone for one device, and as ranks that are threads and share its weights."""

from __future__ import annotations

import copy
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..comm import Comm, run_ranks
from ..config import ParallelConfig
from ..errors import UnsupportedModel
from ..painter import Painter, Setup, check_guidance
from ..parts import DENOISERS
from ..pipeline import parallelize, report, restore
from .plan import Case, Plan

PATIENCE = 3600.0  # seconds that ranks wait for each other: rank 0 also decodes, on a machine that may be busy
_REMEMBERED = 64  # batches of prompts whose encoding is kept


@dataclass
class Painting:
    """A batch of pictures.

    ``pictures`` float32 ``[B, H, W, 3]`` in 0..1; ``latents`` float32 ``[steps, B, C, h, w]``, after each step;
    ``patches`` rows (or columns) of latent of each rank of a patch group, empty where one rank has all.
    """

    pictures: np.ndarray
    latents: np.ndarray
    patches: tuple[int, ...] = ()


class Studio:
    """Paints batches of prompts: one thread of the CPU, whatever the number of ranks.

    Raises:
        DistrifusionError: the model does not load.
        UnsupportedModel: a pipeline that does not take a prompt or tell its steps.
    """

    def __init__(self, plan: Plan) -> None:
        if plan.device == "cpu":
            torch.set_num_threads(1)
        path = str(plan.checkpoint.path.absolute())
        setup = Setup(path=path, config=ParallelConfig(), device=plan.device, dtype=plan.dtype)
        self._plan = plan
        self._pipeline = Painter(setup).pipeline
        self._known = inspect.signature(self._pipeline.__call__).parameters
        tells = "callback" if "callback" in self._known else "callback_on_step_end"
        for name in ("prompt", "generator", "guidance_scale", tells):
            if name not in self._known:
                raise UnsupportedModel(f"{type(self._pipeline).__name__} takes no {name}, which a comparison needs")
        self._guidance = {} if plan.guidance_scale is None else {"guidance_scale": plan.guidance_scale}
        check_guidance(self._pipeline, self._guidance)
        self._pipeline.set_progress_bar_config(disable=True)
        if hasattr(self._pipeline, "encode_prompt"):
            self._pipeline.encode_prompt = _Remembered(self._pipeline.encode_prompt)
        self._twins: list[Any] = []

    def alone(self, case: Case, indices: Sequence[int]) -> Painting:
        """Pictures ``indices`` of one device, in ``case.steps`` steps."""
        return self._call(self._pipeline, case, indices, "pt")

    def spread(self, case: Case, indices: Sequence[int]) -> Painting:
        """Pictures ``indices`` as ``case`` paints them, on ranks that are threads."""
        while len(self._twins) < case.world:
            self._twins.append(twin(self._pipeline))

        def rank(comm: Comm) -> Painting:
            pipeline = self._twins[comm.rank]
            # They share text encoders and VAE, see `twin`: those run as they are, and one rank decodes.
            vae = pipeline.vae
            object.__setattr__(pipeline, "vae", None)
            parallelize(pipeline, replace(case.config, text_encoders="every"), comm)
            object.__setattr__(pipeline, "vae", vae)
            # Every rank ends with the whole latents, and one of them decodes.
            painting = self._call(pipeline, case, indices, "pt" if comm.rank == 0 else "latent")
            painting.patches = report(pipeline).patches
            comm.barrier()
            restore(pipeline)
            return painting

        try:
            return run_ranks(case.world, rank, timeout=PATIENCE, device=self._pipeline.device)[0]
        except BaseException:
            for pipeline in self._twins:
                with suppress(Exception):
                    restore(pipeline)
            self._twins.clear()  # another task starts from clean ones
            raise

    def _call(self, pipeline: Any, case: Case, indices: Sequence[int], output_type: str) -> Painting:
        plan = self._plan
        latents: list[np.ndarray] = []
        is_read = output_type == "pt"

        def keep(tensor: torch.Tensor) -> None:
            if is_read:
                latents.append(tensor.detach().float().cpu().numpy().copy())

        output = pipeline(
            prompt=[plan.prompts[index] for index in indices],
            height=plan.height,
            width=plan.width,
            num_inference_steps=case.steps,
            generator=[torch.Generator("cpu").manual_seed(plan.seed + index) for index in indices],
            output_type=output_type,
            **self._guidance,
            **self._telling(keep),
        )
        if not is_read:
            return Painting(np.empty(0), np.empty(0))
        pictures = output.images.detach().float().cpu().permute(0, 2, 3, 1).contiguous().numpy()
        return Painting(pictures, np.stack(latents))

    def _telling(self, keep: Callable[[torch.Tensor], None]) -> dict[str, Any]:
        """Arguments by which the pipeline gives its latents to ``keep`` after each step."""
        if "callback_on_step_end" not in self._known:
            return {"callback": lambda step, timestep, latents: keep(latents), "callback_steps": 1}

        def tell(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            keep(tensors["latents"])
            return {}

        return {"callback_on_step_end": tell, "callback_on_step_end_tensor_inputs": ["latents"]}


def twin(pipeline: Any) -> Any:
    """The pipeline once more, for another rank: its own module tree and scheduler, but the same weights in memory.

    ``parallelize`` sets ``forward`` on modules, so ranks cannot share them. The text encoder and the VAE they share.
    """
    double = copy.copy(pipeline)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and name in DENOISERS:
            shared = {id(tensor): tensor for tensor in [*part.parameters(), *part.buffers()]}
            object.__setattr__(double, name, copy.deepcopy(part, shared))  # not the pipeline's own: it notes classes
    object.__setattr__(double, "scheduler", copy.deepcopy(pipeline.scheduler))
    return double


class _Remembered:
    """``encode_prompt`` of a pipeline that is asked the same by every rank and every case."""

    def __init__(self, encode: Callable[..., Any]) -> None:
        self._encode = encode
        self._known: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, torch.Tensor) for value in [*args, *kwargs.values()]):
            return self._encode(*args, **kwargs)
        key = repr((args, sorted(kwargs.items())))
        with self._lock:
            if key not in self._known:
                self._known[key] = self._encode(*args, **kwargs)
                if len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)
            return self._known[key]
