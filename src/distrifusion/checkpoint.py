"""What can be known of a diffusers folder before it is loaded: read here in milliseconds, refused here in one line.

No torch: only JSON, and the headers of the safetensors files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .sizes import Sizes, sizes_of

BUNDLED = Path(__file__).parent / "bundled" / "landscapes"

HUB_KEYWORDS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
"""Keywords of from_pretrained that say how a model comes from the hub."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Checkpoint:
    """A pipeline's folder whose parts are there and whose weights are readable.

    ``denoiser`` is the name of its component, ``dtype`` that of its weights, as torch names it; ``num_weights``
    is their number in all components.
    """

    path: Path
    pipeline: str
    sizes: Sizes = field(default_factory=Sizes)
    denoiser: str | None = None
    dtype: str | None = None
    num_weights: int = 0

    @property
    def default_size(self) -> tuple[int, int] | None:
        """The model's own (height, width) in pixels; None where only the pipeline knows."""
        return self.sizes.default

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int] | None:
        """Latent (rows, columns) of a picture of ``height`` x ``width`` pixels; None where only the pipeline knows.

        Raises:
            ConfigError: a side that the model cannot take; names the nearest ones that fit.
        """
        for name, side in (("height", height), ("width", width)):
            if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 1):
                raise ConfigError(f"{name}={side!r} must be a whole number of pixels, at least 1")
        sizes = self.sizes
        if sizes.factor is None:
            return None
        unit, why = sizes.unit, "or the VAE cannot take it"
        if sizes.patch > 1:
            why = "so that a row of tokens has all its pixels"
        for name, side in (("height", height), ("width", width)):
            if side is not None and side % unit:
                below, above = side // unit * unit, -(-side // unit) * unit
                fits = f"{below} or {above} fits" if below else f"{above} fits"
                raise ConfigError(f"{name}={side} must be a multiple of {unit}, {why}: {fits}")
        if self.default_size is None and (height is None or width is None):
            return None
        default_height, default_width = self.default_size or (0, 0)
        return (height or default_height) // sizes.factor, (width or default_width) // sizes.factor


def find(
    model: str | Path | None, *, variant: str | None = None, without: Collection[str] = (), **hub: Any
) -> Checkpoint:
    """The checkpoint behind ``model``: a folder, a hub id, or None for the bundled one.

    A hub id is fetched here, once, and not by each rank. ``variant`` names the weights that will be loaded
    (``"fp16"``), ``without`` the components that will not be, ``hub`` is for its client (``revision``, ``token`` ...).

    Raises:
        ConfigError: no such model, or a part of it is missing or unreadable.
    """
    if model is None:
        if not (BUNDLED / "model_index.json").is_file():
            raise ConfigError("this installation carries no bundled model: name one, a diffusers folder or a hub id")
        return inspect(BUNDLED, "the bundled model", variant, without)
    path = Path(model).expanduser()
    if path.is_dir():
        return inspect(path, f"model {str(model)!r}", variant, without)
    if path.is_file():
        raise ConfigError(
            f"model {str(model)!r} is a single file: convert it once with from_single_file(...).save_pretrained(...) "
            "and name that folder"
        )
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        raise ConfigError(
            f"model {str(model)!r} is neither a folder with a model_index.json nor a hub id such as 'org/name'"
        )
    return inspect(_fetched(model, variant=variant, **hub), f"model {model!r}", variant, without)


def inspect(path: Path, name: str, variant: str | None = None, without: Collection[str] = ()) -> Checkpoint:
    """Read the folder at ``path``; ``name`` is what messages call it.

    Raises:
        ConfigError: a part is missing or unreadable.
    """
    if not (path / "model_index.json").is_file():
        raise ConfigError(
            f"{name} is a folder without a model_index.json: name one that a diffusers pipeline's save_pretrained wrote"
        )
    index = _json(path / "model_index.json", name)
    components = {
        part: value
        for part, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(value) and part not in without
    }
    dtypes: dict[str, str | None] = {}
    num_weights = 0
    for part in components:
        if not (path / part).is_dir():
            raise ConfigError(f"{name} is incomplete: its model_index.json names {part!r}, and there is no such folder")
        for file in sorted((path / part).glob("*.safetensors")):
            if f".{variant}" in file.name if variant else file.name.count(".") == 1:
                dtype, count = _header(file, f"{part}/{file.name} of {name}")
                dtypes.setdefault(part, dtype)
                num_weights += count
    denoiser = next((part for part in ("unet", "transformer") if part in components), None)
    pipeline, classes = str(index.get("_class_name")), {part: value[1] for part, value in components.items()}
    sizes = sizes_of(pipeline, classes, lambda part: _json(path / part / "config.json", name))
    return Checkpoint(
        path=path,
        pipeline=pipeline,
        sizes=sizes,
        denoiser=denoiser,
        dtype=_DTYPES.get(dtypes.get(denoiser) or "") if denoiser else None,
        num_weights=num_weights,
    )


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path.name} of {name} is not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path.name} of {name} holds {type(found).__name__} where an object should be")
    return found


def _header(path: Path, name: str) -> tuple[str | None, int]:
    """The dtype of the first tensor of a safetensors file, and the number of values in all of them.

    The length of the file is checked against its header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise ConfigError(f"{name} is a git-lfs pointer, not the weights: run `git lfs pull` in the folder")
        if len(start) < 8 or length > size - 8:
            raise ConfigError(f"{name} is corrupt: it is no safetensors file, or cut off in its header ({size} bytes)")
        try:
            header = json.loads(file.read(length))
            entries = [entry for key, entry in header.items() if key != "__metadata__"]
            end = max((entry["data_offsets"][1] for entry in entries), default=0)
            dtype = str(entries[0]["dtype"]) if entries else None
            count = sum(prod(entry["shape"]) for entry in entries)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ConfigError(f"{name} is corrupt: its header is not that of a safetensors file") from error
    if 8 + length + end != size:
        raise ConfigError(f"{name} is corrupt: {size} bytes where its header says {8 + length + end}")
    return dtype, count


def _fetched(model: str, **hub: Any) -> Path:
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(model, **hub))
    except Exception as error:  # whatever the hub's client raises: no such model, no access, no network
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"model {model!r} is no folder here, and the hub did not give it: {reason[:300]}") from error
