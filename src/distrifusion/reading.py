"""What a rank reads of a denoiser's safetensors files: a model without weights, and those of its weights that it needs.

Where that cannot be, diffusers loads it whole, and the report says why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import ParallelConfig
from .mesh import Mesh
from .metrics import human_bytes
from .models import is_known
from .parts import DENOISERS
from .strategies.holding import Held, holding, shares_model, shares_weights
from .weights import DTYPES, Part, WeightFiles, set_part

Dtypes = torch.dtype | Mapping[str, torch.dtype] | None
"""As from_pretrained takes them: one for all components, or by name with ``"default"`` for the others."""

_OTHERWISE = {"quantization_config": None, "device_map": None, "use_flashpack": False, "low_cpu_mem_usage": True}
"""Arguments of from_pretrained, and the only value with which weights are read as they lie in the files."""


@dataclass
class Reading:
    """One denoiser that ranks need some of the weights of.

    ``model`` has none yet, and is None where diffusers is to load it whole; ``line`` is what the report says.
    """

    name: str
    line: str = ""
    model: nn.Module | None = None
    files: WeightFiles | None = None

    def held_bytes(self, config: ParallelConfig, mesh: Mesh, rank: int) -> int:
        """Bytes of its weights that ``rank`` will have. Of a model that is to be read in parts."""
        assert self.model is not None
        held = holding(self.model, config, mesh, rank)
        return sum(_held_bytes(weight, held.get(name)) for name, weight in _weights(self.model))

    @property
    def num_bytes(self) -> int:
        """Bytes of all of its weights."""
        assert self.model is not None
        return sum(weight.nbytes for _, weight in _weights(self.model))

    def fill(self, config: ParallelConfig, mesh: Mesh, rank: int) -> nn.Module:
        """The model with what ``rank`` needs of its weights."""
        assert self.model is not None
        assert self.files is not None
        model, files = self.model, self.files
        held = holding(model, config, mesh, rank)
        for name, weight in list(_weights(model)):
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if not isinstance(weight, nn.Parameter):
                module._buffers[leaf] = files.read(name, weight.dtype)
                continue
            part = Part(files, name, *held[name]) if name in held else None
            values = files.read(name, weight.dtype) if part is None else part.read(weight.dtype)
            parameter = module._parameters[leaf] = nn.Parameter(values, requires_grad=weight.requires_grad)
            set_part(parameter, part)
        files.close()
        in_all = sum(entry.num_bytes for entry in files.entries.values())
        self.line = f"{human_bytes(files.num_bytes)} of {human_bytes(in_all)} of the {self.name}'s files read"
        return model


def readings_of(
    path: Path, config: ParallelConfig, mesh: Mesh, dtype: Dtypes, arguments: Mapping[str, Any]
) -> list[Reading]:
    """The denoisers in ``path``, where ranks need some of their weights only; else none.

    Args:
        path: the pipeline's folder.
        config: with ``mesh``, of all ranks.
        mesh: see there.
        dtype: of the weights.
        arguments: that from_pretrained is to be called with beside these.
    """
    if not shares_model(mesh):
        return []
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    found = []
    for name in DENOISERS:
        library = index.get(name)
        if isinstance(library, list) and all(library) and name not in arguments:
            why = _why_whole(config, mesh, arguments)
            known = why if why is not None else _without_weights(path / name, library, dtype, arguments)
            if isinstance(known, str):
                found.append(Reading(name, f"the {name} was read whole on every rank: {known}"))
            else:
                found.append(Reading(name, "", *known))
    return found


def _why_whole(config: ParallelConfig, mesh: Mesh, arguments: Mapping[str, Any]) -> str | None:
    if not shares_weights(config, mesh):
        return "strategy='pipelined' without patches computes the first steps with all blocks on every rank"
    if config.strategy == "pipelined" and config.blocks == "every":
        return "blocks='every'"
    for option, plain in _OTHERWISE.items():
        if arguments.get(option, plain) not in (plain, None):
            return f"{option}={arguments[option]!r}"
    if arguments.get("use_safetensors") is False:
        return "use_safetensors=False"
    return None


def _without_weights(
    folder: Path, named: list[str], dtype: Dtypes, arguments: Mapping[str, Any]
) -> tuple[nn.Module, WeightFiles] | str:
    """A model whose weights are to be read, and where they are; or why it cannot be read in parts."""
    import diffusers

    library, kind = named
    made = getattr(diffusers, kind, None) if library == "diffusers" else None
    if made is None:
        return f"{library}.{kind} is no class of diffusers"
    variant = arguments.get("variant")
    files = WeightFiles.of(folder, variant)
    if files is None:
        return "its folder has no safetensors" + (f" of variant={variant!r}" if variant is not None else "")
    settings = made.load_config(folder)
    if settings.get("quantization_config") is not None:
        return "its weights are quantised"
    strange = {entry.dtype for entry in files.entries.values()} - DTYPES.keys()
    if strange:
        return f"its weights are {', '.join(sorted(strange))}"
    if isinstance(dtype, Mapping):
        dtype = dtype.get(folder.name, dtype.get("default", torch.float32))
    if dtype is not None and dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        return f"dtype={dtype}"
    model = _built(made, settings, dtype)
    if not is_known(model):
        return f"{kind} is not known by this name"
    model.register_to_config(_name_or_path=str(folder))
    names = {each: each for each in files.entries}
    model._fix_state_dict_keys_on_load(names)  # of attentions of old: new name -> name in the file
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    wanted = dict(_weights(model))
    extra = [each for each in names if each not in wanted and not any(re.search(one, each) for one in ignored)]
    missing = [each for each in wanted if each not in names]
    if missing or extra:
        return f"its files {'lack' if missing else 'have beside its weights'} {(missing or extra)[0]}"
    files = files.renamed({each: names[each] for each in wanted})
    for each, weight in wanted.items():
        if files.entries[each].shape != weight.shape:
            return f"{each} has the shape {tuple(files.entries[each].shape)} in its files"
    return model, files


def _built(made: Any, settings: Mapping[str, Any], dtype: torch.dtype | None) -> Any:
    """The model, its parameters on the ``meta`` device in the dtypes that from_pretrained would give them.

    What is computed when it is built, tables of positions, is there as it would be.
    """
    from accelerate import init_empty_weights

    with _default(dtype), init_empty_weights(include_buffers=False):
        model = made.from_config(settings)
    kept = made._keep_in_fp32_modules or ()
    for name, weight in list(_weights(model)):
        if dtype is None or not weight.is_floating_point():
            continue
        is_kept = any(part in name.split(".") for part in kept)
        owner, _, leaf = name.rpartition(".")
        module, values = model.get_submodule(owner), weight.to("meta", torch.float32 if is_kept else dtype)
        if isinstance(weight, nn.Parameter):
            module._parameters[leaf] = nn.Parameter(values.detach(), requires_grad=weight.requires_grad)
        else:
            module._buffers[leaf] = values
    return model.eval()


@contextmanager
def _default(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if dtype is not None else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What belongs into a file: parameters, and buffers that are kept."""
    yield from model.state_dict(keep_vars=True).items()


def _held_bytes(weight: torch.Tensor, held: Held | None) -> int:
    if held is None:
        return weight.nbytes
    spans, dim = held
    return weight.nbytes // weight.shape[dim] * sum(map(len, spans))
