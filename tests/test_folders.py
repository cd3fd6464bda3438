"""Transformers from a folder, as users have them: what is known before they load, painting, benchmark, comparison."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import distrifusion as df
from distrifusion import cli, commands
from distrifusion.bench.workload import load
from distrifusion.checkpoint import find
from distrifusion.choices import check_size
from distrifusion.compare.paint import Studio
from distrifusion.compare.plan import Plan, cases_for
from distrifusion.mesh import Mesh
from distrifusion.painter import Painter, Request, Setup
from models import distance
from pipelines import EXACT, NUMPY_WARNINGS
from tiny_folders import FOLDERS, save

pytestmark = [*NUMPY_WARNINGS, pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")]

SYNC = df.ParallelConfig(strategy="sync")
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("models")
    return lambda name: root / name if (root / name).exists() else save(name, root / name)


@pytest.mark.parametrize(
    ("name", "pipeline", "factor", "patch", "default"),
    [
        ("sd3", "StableDiffusion3Pipeline", 4, 2, (64, 64)),
        ("flux", "FluxPipeline", 4, 2, (512, 512)),
        ("qwen", "QwenImagePipeline", 8, 2, (1024, 1024)),
        ("pixart", "PixArtSigmaPipeline", None, 1, None),
        ("wan", "WanPipeline", None, 1, None),
    ],
)
def test_a_folder_tells_its_sizes(
    folder: Folder, name: str, pipeline: str, factor: int | None, patch: int, default: tuple[int, int] | None
) -> None:
    found = find(folder(name))
    assert (found.pipeline, found.denoiser, found.dtype) == (pipeline, "transformer", "float32")
    assert (found.sizes.factor, found.sizes.patch, found.default_size) == (factor, patch, default)
    assert found.sizes.is_video == (name == "wan")
    if default is not None:  # and its pipeline says so too
        pipe = FOLDERS[name]()
        assert pipe.default_sample_size * pipe.vae_scale_factor == default[0]


def test_a_size_that_cannot_be_is_refused_before_anything_is_loaded(folder: Folder) -> None:
    found = find(folder("flux"))
    check_size(found, SYNC, Mesh.fit(SYNC, 8), 64, 48)
    with pytest.raises(df.ConfigError, match="8 rows of tokens cannot be split over 9 ranks: the largest"):
        check_size(found, SYNC, Mesh.fit(SYNC, 9), 64, 48)
    with pytest.raises(df.ConfigError, match=r"height=60 must be a multiple of 8, so that a row .*: 56 or 64 fits"):
        check_size(found, SYNC, Mesh.fit(SYNC, 2), 60, 48)
    streamed = df.ParallelConfig(strategy="pipelined", patches=9)
    with pytest.raises(df.ConfigError, match="patches=9 are more than the 8 rows of tokens of this picture: patches=8"):
        check_size(found, streamed, Mesh.fit(streamed, 2), 64, 48)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "pixart": {"negative_prompt": "fog", "use_resolution_binning": False},
    "sd3": {"negative_prompt": "fog"},
    "flux": {"negative_prompt": "fog", "true_cfg_scale": 3.0},
    "qwen": {"negative_prompt": "fog", "true_cfg_scale": 3.0},
    "wan": {"negative_prompt": "fog", "num_frames": 5},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_ranks_paint_what_one_device_paints(folder: Folder, name: str) -> None:
    """From words to pixels."""
    setup = Setup(str(folder(name)), SYNC)
    words = {"prompt": "a hill", "height": 80, "width": 48, "num_inference_steps": 2, "output_type": "np"}
    request = Request(3, {**words, **ARGUMENTS[name]})

    def pixels(painter: Painter) -> torch.Tensor:
        return torch.from_numpy(np.asarray(painter.paint(request).images))

    truth = pixels(Painter(setup))
    assert truth.std() > 0.01
    painters = [Painter(setup) for _ in range(2)]

    def rank(comm: Any) -> torch.Tensor:
        painters[comm.rank].join(comm)
        return pixels(painters[comm.rank])

    for result in df.run_ranks(2, rank):
        assert distance(result, truth) <= EXACT


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("qwen", {"guidance_scale": 5.0}, "guidance_scale=5.0 does nothing in this QwenImagePipeline, whose transf"),
        ("qwen", {"true_cfg_scale": 3.0}, "true_cfg_scale=3.0 does nothing in QwenImagePipeline without a negative"),
        ("flux", {"negative_prompt": "fog"}, "a negative prompt does nothing in FluxPipeline with true_cfg_scale=1.0"),
        ("sd3", {"true_cfg_scale": 3.0}, "StableDiffusion3Pipeline takes no argument 'true_cfg_scale'; it takes"),
    ],
)
def test_guidance_that_would_do_nothing_is_refused(
    folder: Folder, name: str, arguments: dict[str, Any], words: str
) -> None:
    painter = Painter(Setup(str(folder(name)), SYNC))
    with pytest.raises(df.ConfigError) as caught:
        painter.paint(Request(0, {"prompt": "a hill", **arguments}))
    assert str(caught.value).startswith(words)


def test_a_model_without_guidance_takes_none(folder: Folder) -> None:
    """As the cards of distilled models say: guidance_scale=0."""
    painter = Painter(Setup(str(folder("qwen")), SYNC))
    size = {"height": 32, "width": 32, "num_inference_steps": 1}
    assert painter.paint(Request(0, {"prompt": "a hill", "guidance_scale": 0.0, **size})).images


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("wan", ["-o", "x.jpg"], "output 'x.jpg': WanPipeline makes videos, which are written as .gif, .png, .webp"),
        ("wan", ["--frames", "0"], "frames=0 must be"),
        ("wan", ["--fps", "0"], "fps=0 must be"),
        ("flux", ["--frames", "9"], "frames=9 is for models of videos, and FluxPipeline makes pictures"),
        ("flux", ["--split", "frames"], "split='frames' is for models of videos, and FluxPipeline makes pictures"),
        ("flux", ["--height", "60"], "height=60 must be a multiple of 8"),
        ("flux", ["--height", "64", "--nproc", "9"], "8 rows of tokens cannot be split over 9 ranks"),
    ],
)
def test_generate_refuses_before_workers_start(
    folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    arguments: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "Engine", lambda *_, **__: pytest.fail("workers were started"))
    assert cli.run(["generate", "x", "--model", str(folder(name)), *arguments]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n"), list(tmp_path.iterdir())) == ("", 1, [])
    assert said.err.startswith(f"error: {line}")


def test_guidance_that_is_not_named_is_the_pipelines_own(folder: Folder) -> None:
    order = commands.Order("x", None, SYNC, None, None, None, 2, None, None, 0, None, "cpu", Path("x.png"))
    given = order.arguments(find(folder("flux")))
    assert {name for name, value in given.items() if value is not None} == {"prompt", "num_inference_steps"}


def test_generate_writes_a_video_of_two_processes(folder: Folder, tmp_path: Path) -> None:
    file = tmp_path / "out.webp"
    words = ["generate", "a hill", "--model", str(folder("wan")), "--nproc", "2", "--strategy", "pipelined"]
    words += ["--patches", "2", "--max-memory", "4GiB", "--steps", "2"]  # all of them whole
    size = ["--frames", "5", "--height", "80", "--width", "48", "--fps", "8"]
    command = [sys.executable, "-m", "distrifusion", *words, *size, "--json", "-o", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (0, 2), done.stderr
    plan = r"memory per rank: 4\.00 GiB given, libraries 480\.0 MiB \+ weights .* on rank \d, with .* of the denoiser"
    assert re.match(plan, done.stderr)
    facts = json.loads(done.stdout)
    assert any(re.match(r".* KiB of .* KiB of the transformer's files read", note) for note in facts["notes"])
    assert (facts["frames"], facts["height"], facts["width"], facts["steps"]) == (5, 80, 48, {"sync": 4})
    with Image.open(file) as video:
        assert (video.n_frames, video.size) == (5, (48, 80))
        video.load()
        assert video.info["duration"] == 125
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_folder_is_a_workload_of_the_benchmark(folder: Folder, name: str, batch: int) -> None:
    work = load(str(folder(name)), 10, 6, batch)
    assert work.sample_shape[0] == batch
    resized = work.resized(12, 6)
    with torch.no_grad():
        assert work.run(work.sample(0))[0].isfinite().all()
        assert resized.run(resized.sample(0))[0].isfinite().all()
    assert resized.sample(0).numel() > work.sample(0).numel()


def test_a_pipeline_that_asks_for_more_than_a_prompt_is_no_workload(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    def __call__(self: Any, prompt: Any, image: Any) -> None: ...  # noqa: N807

    monkeypatch.setattr(diffusers.FluxPipeline, "__call__", __call__)
    with pytest.raises(df.UnsupportedModel, match=r"FluxPipeline asks for more than a prompt and a size: .*'image'"):
        load(str(folder("flux")), 8, 8)


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux"])
def test_a_comparison_paints_them(folder: Folder, name: str) -> None:
    """PixArt's pipeline tells its steps in the older way."""
    (case,) = cases_for(["sync"], [2], [2], [0], ["corrected"])
    size = {"height": 32, "width": 32} if name != "pixart" else {}
    plan = Plan(name, find(folder(name)), ("a hill",), (case,), guidance_scale=None, **size)
    studio = Studio(plan)
    alone, spread = studio.alone(case.reference, (0,)), studio.spread(case, (0,))
    assert len(alone.latents) == 2
    assert distance(torch.from_numpy(spread.pictures), torch.from_numpy(alone.pictures)) <= EXACT


def test_a_comparison_is_not_of_videos(folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "x", "--model", str(folder("wan")), "-o", str(tmp_path / "out")]
    assert cli.run(["compare", *words]) == 2
    assert capsys.readouterr().err == "error: WanPipeline makes videos, and a comparison measures pictures\n"
