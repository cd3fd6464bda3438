"""A transformer out of a pipeline's folder, and the arguments of its call as its own pipeline makes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..config import ParallelConfig
from ..errors import UnsupportedModel
from ..models import Call, Table, table_for
from ..painter import Painter, Setup

_PROMPT = "a lake in the mountains"
_UNGUIDED = (1.0, 0.0)  # strengths at which pipelines predict one branch alone


def transformer_of(
    folder: str, batch: int, dtype: torch.dtype, device: str
) -> tuple[nn.Module, Callable[[int, int], Call]]:
    """The transformer, and what gives its first call for ``batch`` pictures of a height and width in pixels.

    The text is encoded by the pipeline's own encoders, so the pipeline is loaded as a whole.

    Raises:
        UnsupportedModel: a class without a table, or a pipeline that needs more than a prompt.
    """
    setup = Setup(folder, ParallelConfig(), device=device, dtype=str(dtype).removeprefix("torch."))
    pipeline = Painter(setup).pipeline
    table = table_for(pipeline.transformer)
    known = inspect.signature(pipeline.__call__).parameters

    def first_call(height: int, width: int) -> Call:
        words = {
            "prompt": [_PROMPT] * batch,
            "height": height,
            "width": width,
            "use_resolution_binning": False,
            "generator": torch.Generator().manual_seed(0),
        }
        for scale in _UNGUIDED:
            given = {**words, "guidance_scale": scale}
            call = _captured(pipeline, table, {name: given[name] for name in given if name in known})
            if call.sample.shape[0] == batch:
                return call
        raise UnsupportedModel(
            f"{type(pipeline).__name__} makes {call.sample.shape[0]} latents of {batch} prompts without guidance, "
            "which is not known here"
        )

    return pipeline.transformer, first_call


class _Enough(Exception):  # noqa: N818 - not an error: the pipeline has come to its first call
    pass


def _captured(pipeline: Any, table: Table, words: dict[str, Any]) -> Call:
    calls: list[Call] = []

    def stop(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(table.bind(args, kwargs))
        raise _Enough

    hook = pipeline.transformer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        pipeline(**words)
    except _Enough:
        return calls[0]
    except (TypeError, ValueError, AttributeError) as error:
        raise UnsupportedModel(f"{type(pipeline).__name__} asks for more than a prompt and a size: {error}") from error
    finally:
        hook.remove()
    raise UnsupportedModel(f"{type(pipeline).__name__} does not call its transformer")
