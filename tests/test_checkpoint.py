"""What is refused before a process starts, and in which words."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distrifusion import ConfigError, ParallelConfig
from distrifusion import engine as engine_module
from distrifusion.checkpoint import find
from distrifusion.choices import check_size, dtype_name, make_request, num_workers
from distrifusion.engine import Engine
from distrifusion.mesh import Mesh
from tiny_pipeline import save_tiny_pipeline


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "broken"))


def test_a_folder_tells_its_sizes_and_dtype(tiny: Path) -> None:
    found = find(tiny)
    assert found.path == tiny
    assert (found.pipeline, found.sizes.factor, found.default_size) == ("StableDiffusionPipeline", 2, (32, 32))
    assert found.dtype == "float32"
    assert found.latent_size(64, None) == (32, 16)


def test_it_is_told_without_torch(tiny: Path) -> None:
    code = (
        f"import sys; from distrifusion.checkpoint import find; find({str(tiny)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nowhere", "model 'nowhere' is neither a folder with a model_index.json nor a hub id such as 'org/name'"),
        ("./no/where", "model './no/where' is neither"),
        (Path("org/name"), "model 'org/name' is neither"),
        (".", "model '.' is a folder without a model_index.json"),
        (__file__, "is a single file: convert it once"),
    ],
)
def test_a_model_that_is_none(model: str | Path, words: str) -> None:
    with pytest.raises(ConfigError, match=r".*") as caught:
        find(model)
    assert words in str(caught.value)


def test_what_the_hub_answers_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DiffusionPipeline

    def download(model: str, **_: object) -> str:
        raise OSError(f"no such\n  repository: {model}")

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    with pytest.raises(ConfigError) as caught:
        find("org/name")
    assert str(caught.value) == (
        "model 'org/name' is no folder here, and the hub did not give it: no such repository: org/name"
    )


def test_what_the_hub_gives_is_inspected(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    from diffusers import DiffusionPipeline

    asked: dict[str, object] = {}
    monkeypatch.setattr(DiffusionPipeline, "download", lambda model, **hub: asked.update(hub, model=model) or str(tiny))
    assert find("org/name", variant=None, revision="v2").path == tiny
    assert asked == {"model": "org/name", "variant": None, "revision": "v2"}


def test_weights_cut_short(broken: Path) -> None:
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ConfigError) as caught:
        find(broken)
    name = f"unet/diffusion_pytorch_model.safetensors of model {str(broken)!r}"
    assert str(caught.value) == f"{name} is corrupt: {len(whole) - 100} bytes where its header says {len(whole)}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cut off in its header (0 bytes)"),
        (b"\xff" * 64, "it is no safetensors file, or cut off in its header (64 bytes)"),
        ((8).to_bytes(8, "little") + b"not json", "its header is not that of a safetensors file"),
        ((8).to_bytes(8, "little") + b'{"a": 1}', "its header is not that of a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer, not the weights"),
    ],
)
def test_weights_that_are_none(broken: Path, content: bytes, words: str) -> None:
    (broken / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        find(broken)
    assert words in str(caught.value)
    assert str(caught.value).startswith("vae/diffusion_pytorch_model.safetensors of model ")


def test_only_the_weights_that_will_be_loaded_are_looked_at(broken: Path) -> None:
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    other = weights.with_name("diffusion_pytorch_model.fp16.safetensors")
    other.write_bytes(b"")
    assert find(broken).dtype == "float32"
    with pytest.raises(ConfigError, match=r"fp16\.safetensors of model .* is corrupt"):
        find(broken, variant="fp16")


def test_a_missing_component(broken: Path) -> None:
    shutil.rmtree(broken / "text_encoder")
    with pytest.raises(ConfigError, match=r"is incomplete: its model_index\.json names 'text_encoder'"):
        find(broken)
    assert find(broken, without=["text_encoder"]).sizes.factor == 2


@pytest.mark.parametrize(("text", "words"), [("{", "is not readable as JSON"), ("[]", "holds list where an object")])
def test_an_index_that_is_none(broken: Path, text: str, words: str) -> None:
    (broken / "model_index.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        find(broken)


def test_a_pipeline_without_an_image_vae_has_no_sizes(broken: Path) -> None:
    index = json.loads((broken / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderKLSomethingElse"]
    (broken / "model_index.json").write_text(json.dumps(index))
    assert find(broken).latent_size(63, 17) is None


@pytest.mark.parametrize(
    ("height", "width", "words"),
    [
        (63, None, "height=63 must be a multiple of 8, or the VAE cannot take it: 56 or 64 fits"),
        (None, 4, "width=4 must be a multiple of 8, or the VAE cannot take it: 8 fits"),
        (0, None, "height=0 must be a whole number of pixels"),
        (None, 64.0, "width=64.0 must be a whole number of pixels"),
        (True, None, "height=True must be a whole number of pixels"),
        (8, None, "4 rows of latent cannot be split over 5 ranks: the largest world for this picture is 4"),
    ],
)
def test_a_size_that_cannot_be(tiny: Path, height: int | None, width: int | None, words: str) -> None:
    config = ParallelConfig()
    with pytest.raises(ConfigError) as caught:
        check_size(find(tiny), config, Mesh.fit(config, 5), height, width)
    assert words in str(caught.value)


def test_the_split_dim_counts(tiny: Path) -> None:
    cols = ParallelConfig(split="cols")
    check_size(find(tiny), cols, Mesh.fit(cols, 5), 8, 64)
    check_size(find(tiny), cols, Mesh.fit(cols, 16), None, None)
    with pytest.raises(ConfigError, match="16 rows of latent cannot be split over 17 ranks"):
        check_size(find(tiny), cols, Mesh.fit(cols, 17), None, None)


@pytest.mark.parametrize(
    ("config", "nproc", "expected"),
    [
        (ParallelConfig(), None, 1),
        (ParallelConfig(cfg=2), None, 2),
        (ParallelConfig(cfg=2, patch=3), None, 6),
        (ParallelConfig(), 5, 5),
        (ParallelConfig(balance=(2, 1, 1)), None, 3),
        (ParallelConfig(balance=(2, 1, 1), cfg=2), None, 6),
        (ParallelConfig(balance="measured"), None, 1),
        (ParallelConfig(strategy="pipelined", cfg=2, pipe=3, patch=2), None, 12),
    ],
)
def test_the_number_of_workers_on_the_cpu(config: ParallelConfig, nproc: int | None, expected: int) -> None:
    assert num_workers(config, nproc, "cpu") == expected


@pytest.mark.parametrize(
    ("config", "nproc", "devices", "expected"),
    [
        (ParallelConfig(), None, 3, 3),
        (ParallelConfig(cfg=2), None, 5, 4),
        (ParallelConfig(patch=2), None, 5, 2),
        (ParallelConfig(balance=(2, 1, 1)), None, 5, 3),
        (ParallelConfig(strategy="pipelined", pipe=2), None, 5, 2),
        (ParallelConfig(strategy="pipelined", patch=2), None, 7, 6),
        (ParallelConfig(), 2, 5, 2),
        (ParallelConfig(cfg=2), None, 1, "2 workers need as many cuda devices, and this machine has 1"),
        (ParallelConfig(), 4, 3, "4 workers need as many cuda devices, and this machine has 3"),
        (ParallelConfig(), None, 0, "1 workers need as many cuda devices, and this machine has 0"),
    ],
)
def test_the_number_of_workers_on_gpus(
    monkeypatch: pytest.MonkeyPatch, config: ParallelConfig, nproc: int | None, devices: int, expected: int | str
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    if isinstance(expected, int):
        assert num_workers(config, nproc, "cuda") == expected
    else:
        with pytest.raises(ConfigError) as caught:
            num_workers(config, nproc, "cuda")
        assert str(caught.value).startswith(expected)


def test_dtypes(tiny: Path) -> None:
    import torch

    found = find(tiny)
    assert dtype_name(None, "cpu", found) == "float32"
    assert dtype_name(None, "cuda", found) == "float32"
    assert [dtype_name(name, "cpu", found) for name in ("bf16", torch.float16, "fp32")] == [
        "bfloat16",
        "float16",
        "float32",
    ]
    with pytest.raises(ConfigError, match="dtype='fp8' must be one of 'bf16', 'fp16', 'fp32'"):
        dtype_name("fp8", "cpu", found)


def test_requests() -> None:
    assert make_request(3, {"prompt": "x", "height": None}).arguments == {"prompt": "x"}
    size = {"height": 8, "width": 64}
    assert make_request(0, {"height": 8, "width": None}, (32, 64)).arguments == size
    assert make_request(0, size, (32, 32)).arguments == size
    assert make_request(0, {}, (32, 32)).arguments == {}
    assert make_request(None, {}).seed != make_request(None, {}).seed
    for seed in (-1, 2**63, 1.0, True):
        with pytest.raises(ConfigError, match="must be a whole number from 0"):
            make_request(seed, {})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="steps=0 must be a whole number of at least 1"):
        make_request(0, {"num_inference_steps": 0})
    with pytest.raises(ConfigError, match="an argument cannot travel to the workers"):
        make_request(0, {"ip_adapter_image": lambda: None})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device": "tpu"}, "device='tpu' must be one of 'cpu', 'cuda', 'xpu'"),
        ({"device": "cuda:1"}, "device='cuda:1' must be one of"),
        ({"config": ParallelConfig(cuda_graphs=True)}, "cuda_graphs=True needs device='cuda', not 'cpu'"),
        ({"nproc": 0}, "nproc=0 must be a whole number of at least 1"),
        ({"nproc": 3, "config": ParallelConfig(cfg=2)}, "a world of 3 does not fit cfg=2"),
        ({"dtype": "int8"}, "dtype='int8' must be one of"),
        ({"model": "nowhere"}, "model 'nowhere' is neither"),
    ],
)
def test_the_engine_refuses_before_a_process_starts(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, arguments: dict[str, object], words: str
) -> None:
    monkeypatch.setattr(engine_module.Engine, "_start", lambda self: pytest.fail("a process was started"))
    with pytest.raises(ConfigError) as caught:
        Engine(**{"model": tiny, **arguments})  # type: ignore[arg-type]
    assert words in str(caught.value)
