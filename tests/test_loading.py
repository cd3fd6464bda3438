"""Ranks that read their own weights only: equal to loading whole, and what is never read."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distrifusion as df
from distrifusion import weights
from distrifusion.comm import Comm
from distrifusion.layers.slices import own_features
from distrifusion.loading import read
from distrifusion.mesh import Mesh
from distrifusion.planner.memory import LIBRARIES
from distrifusion.reading import readings_of
from distrifusion.strategies.holding import holding
from models import build as build_unet
from pipelines import NUMPY_WARNINGS, sample, sd, unet
from test_pipelines_cross import PIPELINES
from test_pipelines_joint import CASES
from test_tensor import UNEVEN, wider
from test_transformers import MODELS
from transformers_tiny import build

pytestmark = [*NUMPY_WARNINGS, pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")]

TENSOR = df.ParallelConfig(strategy="tensor")
STREAMED = df.ParallelConfig(strategy="pipelined", patches=3, warmup_steps=1)
SHARD = "30KB"  # so that a tiny model has several


def folder_of(model: Any, path: Path, *, shard: str = "5GB", name: str = "transformer") -> Path:
    """A pipeline's folder, as far as reading its denoiser asks for it."""
    model.save_pretrained(path / name, max_shard_size=shard)
    entry = ["diffusers", type(model).__name__]
    (path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", name: entry}))
    return path


def tensors_beside_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers, and tables of positions that modules keep without telling torch."""
    for name, module in model.named_modules():
        yield from ((f"{name}.{key}", value) for key, value in vars(module).items() if isinstance(value, Tensor))
    yield from model.named_buffers()


@pytest.mark.parametrize("name", [*MODELS, "sdxl", "ddpm", "class-labels"])
def test_every_class_is_what_it_is_when_it_is_loaded_whole(name: str, tmp_path: Path) -> None:
    """Own weights bit for bit, with their dtypes; tables of positions too. In one file and several, cast and not."""
    is_unet = name not in MODELS
    part = "unet" if is_unet else "transformer"
    original = build_unet(name) if is_unet else build({**MODELS, "lumina2": UNEVEN["lumina2"]}[name])
    is_odd = len(name) % 2 == 1
    path = folder_of(original, tmp_path, shard=SHARD if is_odd else "5GB", name=part)
    assert ((path / part / "diffusion_pytorch_model.safetensors.index.json").exists()) == is_odd
    dtype = torch.bfloat16 if is_odd else None
    whole = type(original).from_pretrained(str(path / part), **({"torch_dtype": dtype} if is_odd else {}))
    for config, rank in [(TENSOR, 1)] if is_unet else [(TENSOR, 1), (STREAMED, 0)]:
        mesh = Mesh.fit(config, 2)
        (reading,) = readings_of(path, config, mesh, dtype, {})
        assert reading.model is not None, reading.line
        model = reading.fill(config, mesh, rank)
        held = holding(whole, config, mesh, rank)
        assert held
        for (key, own), (other, all_of_it) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
            assert (key, own.dtype, own.requires_grad) == (other, all_of_it.dtype, all_of_it.requires_grad)
            spans, dim = held.get(key, (None, 0))
            wanted = all_of_it if spans is None else own_features(all_of_it, spans, dim) if spans else own[:0]
            assert torch.equal(own, wanted), key
        for (key, mine), (_, theirs) in zip(tensors_beside_weights(model), tensors_beside_weights(whole), strict=True):
            assert mine.dtype == theirs.dtype, key
            assert torch.equal(mine, theirs), key
        assert not model.training
        assert dict(model.config) == dict(whole.config)


class Spy:
    """Stands in for ``safe_open`` and notes what each rank, a thread, asks of the files."""

    def __init__(self) -> None:
        self.names: dict[str, set[str]] = {}
        self.num_bytes: dict[str, int] = {}
        self._open = weights.safe_open

    def __call__(self, *args: Any) -> Any:
        return _SpiedFile(self, self._open(*args))

    def note(self, name: str, value: Tensor) -> Tensor:
        rank = threading.current_thread().name
        self.names.setdefault(rank, set()).add(name)
        self.num_bytes[rank] = self.num_bytes.get(rank, 0) + value.nbytes
        return value


class _SpiedFile:
    def __init__(self, spy: Spy, file: Any) -> None:
        self._spy, self._file = spy, file

    def __enter__(self) -> _SpiedFile:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def keys(self) -> Any:
        return self._file.keys()

    def get_tensor(self, name: str) -> Tensor:
        return self._spy.note(name, self._file.get_tensor(name))

    def get_slice(self, name: str) -> Any:
        return _SpiedSlice(self._spy, name, self._file.get_slice(name))


class _SpiedSlice:
    def __init__(self, spy: Spy, name: str, cut: Any) -> None:
        self._spy, self._name, self._cut = spy, name, cut
        self.get_shape, self.get_dtype = cut.get_shape, cut.get_dtype

    def __getitem__(self, index: Any) -> Tensor:
        return self._spy.note(self._name, self._cut[index])


def _flux() -> Any:
    pipe = CASES["FLUX"].make()
    pipe.transformer = build(wider("flux", num_attention_heads=6))
    return pipe


def _sd() -> Any:
    return sd(unet=unet("sd"))


FOLDERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor], df.ParallelConfig, int, str]] = {
    "a U-Net in slices": (_sd, sample, TENSOR, 2, "5GB"),
    "FLUX in slices": (_flux, CASES["FLUX"].call, TENSOR, 3, SHARD),
    "PixArt in stages": (*PIPELINES["PixArtSigma"], STREAMED, 2, "5GB"),
    "HunyuanDiT in stages": (*PIPELINES["HunyuanDiT"], STREAMED, 3, SHARD),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_ranks_read_and_hold_their_own_weights_and_paint_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, call, config, world, shard = FOLDERS[name]
    made = make()
    made.save_pretrained(tmp_path, max_shard_size=shard)
    given = {key: None for key, part in made.components.items() if part is None}
    part = "unet" if "unet" in made.components else "transformer"
    original = getattr(made, part)
    spy = Spy()
    monkeypatch.setattr(weights, "safe_open", spy)

    def rank(comm: Comm, is_whole: bool) -> tuple[Tensor, int, list[str], bool]:
        if is_whole:
            pipe = make()
            df.parallelize(pipe, config, comm)
        else:
            pipe = df.load(tmp_path, config, comm, **given)
        pipe.set_progress_bar_config(disable=True)
        model = getattr(pipe, part)
        held = sum(weight.nbytes for weight in model.parameters())
        result, notes = call(pipe), df.report(pipe).notes
        df.restore(pipe)
        pairs = zip(model.state_dict().values(), original.state_dict().values(), strict=True)
        return result, held, notes, all(torch.equal(*pair) for pair in pairs)

    wanted = df.run_ranks(world, lambda comm: rank(comm, True))
    ran = df.run_ranks(world, lambda comm: rank(comm, False))
    mesh = Mesh.fit(config, world)
    everyone = [holding(original, config, mesh, place) for place in range(world)]
    shared = {key for held in everyone for key in held}
    sizes = {key: weight.nbytes for key, weight in original.named_parameters()}
    in_shares, by_all = (
        sum(sizes[key] for key in sizes if (key in shared) == is_shared) for is_shared in (True, False)
    )
    for place, (result, held, notes, is_back) in enumerate(ran):
        assert float((result - wanted[place][0]).norm()) <= 1e-6 * float(result.norm())
        assert held <= 1.15 / world * in_shares + by_all
        assert any(note.endswith(f"of the {part}'s files read") for note in notes), notes
        assert is_back
    if config is STREAMED:  # `restore` has the blocks sent
        for place in range(world):
            never = {key for key, (spans, _) in everyone[place].items() if not spans}
            assert spy.names[f"rank-{place}"] == sizes.keys() - never
            assert spy.num_bytes[f"rank-{place}"] == ran[place][1]


def test_slices_are_read_as_slices_and_the_rest_only_to_restore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder_of(build(MODELS["flux"]), tmp_path)
    spy = Spy()
    monkeypatch.setattr(weights, "safe_open", spy)
    mesh = Mesh.fit(TENSOR, 2)
    (reading,) = readings_of(path, TENSOR, mesh, None, {})
    in_all, own = reading.num_bytes, reading.held_bytes(TENSOR, mesh, 1)
    model = reading.fill(TENSOR, mesh, 1)
    (num_bytes,) = spy.num_bytes.values()
    assert num_bytes == sum(weight.nbytes for weight in model.parameters()) == own < in_all
    attention = model.transformer_blocks[0].attn
    assert attention.to_q.weight.shape[0] == attention.inner_dim // 2
    reading.files.check()
    (file,) = (path / "transformer").glob("*.safetensors")
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(df.ConfigError, match="was changed or taken away since this rank read its part"):
        reading.files.check()


def _bin(path: Path, model: Any) -> None:
    for file in (path / "transformer").glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(path / "transformer", safe_serialization=False)


def _quantised(path: Path, model: Any) -> None:
    file = path / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "gguf"}}))


def _another(path: Path, model: Any) -> None:
    (path / "model_index.json").write_text(json.dumps({"transformer": ["my_models", "Own"]}))


def _more(path: Path, model: Any) -> None:
    model.more = nn.Linear(2, 2)
    model.save_pretrained(path / "transformer")


@pytest.mark.parametrize(
    ("change", "settings", "arguments", "why"),
    [
        (_bin, {}, {}, "its folder has no safetensors"),
        (None, {}, {"variant": "fp16"}, "its folder has no safetensors of variant='fp16'"),
        (_quantised, {}, {}, "its weights are quantised"),
        (_another, {}, {}, "my_models.Own is no class of diffusers"),
        (_more, {}, {}, "its files have beside its weights more."),
        (None, {}, {"device_map": "balanced"}, "device_map='balanced'"),
        (None, {}, {"use_safetensors": False}, "use_safetensors=False"),
        (None, {"strategy": "pipelined"}, {}, "strategy='pipelined' without patches computes the first steps with"),
        (None, {"strategy": "pipelined", "patches": 2, "blocks": "every"}, {}, "blocks='every'"),
    ],
)
def test_what_cannot_be_read_in_parts_is_read_whole_and_said(
    change: Any, settings: dict[str, Any], arguments: dict[str, Any], why: str, tmp_path: Path
) -> None:
    path = folder_of(build(MODELS["pixart"]), tmp_path)
    if change is not None:
        change(path, build(MODELS["pixart"]))
    config = df.ParallelConfig(**{"strategy": "tensor", **settings})
    (reading,) = readings_of(path, config, Mesh.fit(config, 2), None, arguments)
    assert reading.model is None
    assert reading.line.startswith(f"the transformer was read whole on every rank: {why}")


def test_a_model_that_was_read_whole_says_so_in_its_report(tmp_path: Path) -> None:
    make, call = PIPELINES["PixArtSigma"]
    make().save_pretrained(tmp_path, safe_serialization=False)
    given = {key: part for key, part in make().components.items() if part is None or key == "vae"}

    def rank(comm: Comm) -> tuple[int, list[str]]:
        pipe = df.load(tmp_path, STREAMED, comm, use_safetensors=False, **given)
        pipe.set_progress_bar_config(disable=True)
        call(pipe)
        return sum(weight.nbytes for weight in pipe.transformer.parameters()), df.report(pipe).notes

    in_all = sum(weight.nbytes for weight in make().transformer.parameters())
    for held, notes in df.run_ranks(2, rank):
        assert "the transformer was read whole on every rank: use_safetensors=False" in notes
        assert held < in_all  # afterwards what is not its own is given up all the same


@pytest.mark.parametrize("config", [TENSOR, STREAMED])
def test_a_rank_that_would_not_hold_its_weights_is_refused_with_the_numbers(
    config: df.ParallelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is read. What holds a rank's part need not hold the whole."""
    monkeypatch.setenv("DISTRIFUSION_SHARED_MEMORY", "0")
    made = PIPELINES["HunyuanDiT"][0]()
    made.save_pretrained(tmp_path)
    mesh, sizes = Mesh.fit(config, 2), []
    for place in range(2):
        (reading,) = readings_of(tmp_path, config, mesh, None, {})
        sizes.append(reading.held_bytes(config, mesh, place))
    others = sum(p.numel() for key, part in made.components.items() if key == "vae" and part for p in part.parameters())
    needed = LIBRARIES + max(sizes) + 4 * others
    assert reading.num_bytes > max(sizes) + 4
    spy = Spy()
    monkeypatch.setattr(weights, "safe_open", spy)
    text = r"does not even hold .*: libraries 480.0 MiB \+ weights .* on rank [01], with .* of .* of the denoiser"
    given = {key: part for key, part in made.components.items() if part is None or key.startswith(("text_enc", "vae"))}
    for place in range(2):
        tight = df.ParallelConfig(**{**vars(config), "max_memory": needed})
        with pytest.raises(df.ConfigError, match=text):
            read(tmp_path, tight, place, 2, **given)
    assert not spy.names
    plenty = df.ParallelConfig(**{**vars(config), "max_memory": needed + (1 << 20)})
    read(tmp_path, plenty, 0, 2, **given)
    assert spy.names


def test_with_max_memory_steps_are_not_planned_and_the_report_says_so(tmp_path: Path) -> None:
    make, call = PIPELINES["PixArtSigma"]
    make().save_pretrained(tmp_path)
    given = {key: part for key, part in make().components.items() if part is None}
    config = df.ParallelConfig(**{**vars(STREAMED), "max_memory": "1GiB"})

    def rank(comm: Comm) -> list[str]:
        pipe = df.load(tmp_path, config, comm, **given)
        pipe.set_progress_bar_config(disable=True)
        call(pipe)
        return df.report(pipe).notes

    for notes in df.run_ranks(2, rank):
        assert "max_memory plans no steps of strategy='pipelined'" in notes
        assert any(note.startswith("memory per rank: 1.00 GiB given, ") for note in notes)
    df.run_ranks(1, lambda comm: call(df.parallelize(make(), config, comm)))  # one device: as ever
