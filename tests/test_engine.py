"""The engine with real workers: pictures, errors that leave it usable, losses it survives, ends that leave nothing."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import distrifusion as df
from distrifusion import workers
from distrifusion.engine import Engine
from distrifusion.painter import Painter, Request, Setup
from distrifusion.worker import Failure
from tiny_pipeline import save_tiny_pipeline

SYNC = df.ParallelConfig(strategy="sync")
PICTURE: dict[str, Any] = {"height": 40, "width": 48, "steps": 3}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[Engine]:
    with Engine(tiny, SYNC, nproc=2) as engine:
        yield engine


def pixels(image: Any) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"still running: {[pid for pid in pids if is_running(pid)]}"
        time.sleep(0.05)


def at_step(step: int, act: Callable[[], object]) -> Callable[[int, int, float], None]:
    def progress(done: int, total: int, seconds: float) -> None:
        if done == step:
            act()

    return progress


def test_a_picture_is_that_of_one_device(engine: Engine, tiny: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = engine.generate(
        "a lake", **PICTURE, seed=3, guidance_scale=4.0, progress=lambda done, total, _: seen.append((done, total))
    )
    pipeline = StableDiffusionPipeline.from_pretrained(tiny)
    pipeline.set_progress_bar_config(disable=True)
    alone = pipeline(
        "a lake",
        height=40,
        width=48,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator("cpu").manual_seed(3),
    ).images[0]
    assert result.images[0].size == (48, 40)
    assert np.abs(pixels(result.images[0]) - pixels(alone)).max() <= 1
    assert seen == [(1, 3), (2, 3), (3, 3)]
    facts = result.report.as_dict()
    assert (facts["strategy"], facts["patches"], facts["steps"]) == ("sync", [10, 10], {"sync": 3})
    assert result.seed == 3
    assert result.seconds > sum(result.report.seconds)


def test_the_seed_decides(engine: Engine) -> None:
    first, again, other, batch = (
        engine.generate("x", **PICTURE, seed=seed, num_images_per_prompt=num).images
        for seed, num in ((5, 1), (5, 1), (6, 1), (5, 2))
    )
    assert np.array_equal(pixels(first[0]), pixels(again[0]))
    assert not np.array_equal(pixels(first[0]), pixels(other[0]))
    assert len(batch) == 2
    drawn = engine.generate("x", **PICTURE)
    repeated = engine.generate("x", **PICTURE, seed=drawn.seed)
    assert np.array_equal(pixels(drawn.images[0]), pixels(repeated.images[0]))


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"height": 63}, df.ConfigError, "height=63 must be a multiple of 8"),
        ({"seed": -1}, df.ConfigError, "seed=-1 must be"),
        ({"generator": 1}, df.ConfigError, "generate() takes no generator: give seed="),
        ({"callback_on_step_end": print}, df.ConfigError, "give progress="),
        ({"colour": "red"}, df.ConfigError, "StableDiffusionPipeline takes no argument 'colour'; it takes "),
        ({"prompt": 5}, ValueError, "`prompt` has to be of type `str` or `list` but is <class 'int'>"),
        ({"latents": "x"}, AttributeError, "'str' object has no attribute"),
    ],
)
def test_an_error_leaves_the_engine_usable(
    engine: Engine, arguments: dict[str, Any], kind: type[Exception], words: str
) -> None:
    before = engine.pids
    with pytest.raises(kind) as caught:
        engine.generate(**{"prompt": "x", **PICTURE, **arguments})
    assert type(caught.value) is kind
    assert words in str(caught.value)
    assert engine.generate("x", **PICTURE).images
    assert engine.pids == before


def test_a_killed_worker_is_named_and_the_next_picture_has_a_fresh_group(engine: Engine) -> None:
    before = engine.pids
    wanted = pixels(engine.generate("x", **PICTURE, seed=1).images[0])
    start = time.monotonic()
    with pytest.raises(df.PeerLost) as caught:
        engine.generate("x", **PICTURE, progress=at_step(1, lambda: os.kill(before[1], signal.SIGKILL)))
    assert time.monotonic() - start < 30
    assert str(caught.value).startswith(f"rank 1 (pid {before[1]}) was lost: killed by signal 9 (SIGKILL)")
    wait_until_gone(list(before.values()), 5)
    assert engine.pids == {}
    result = engine.generate("x", **PICTURE, seed=1)
    assert np.array_equal(pixels(result.images[0]), wanted)
    assert result.report.notes == []
    assert not set(engine.pids.values()) & set(before.values())

    idle = engine.pids
    os.kill(idle[0], signal.SIGKILL)
    wait_until_gone(list(idle.values()), 5)
    result = engine.generate("x", **PICTURE, seed=1)
    assert np.array_equal(pixels(result.images[0]), wanted)
    assert result.report.notes == [
        f"rank 0 (pid {idle[0]}) was lost: killed by signal 9 (SIGKILL) while idle; a fresh group serves"
    ]


def test_an_interrupt_ends_the_workers(engine: Engine) -> None:
    before = list(engine.pids.values())

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate("x", **PICTURE, progress=at_step(1, interrupt))
    wait_until_gone(before, 5)


def test_a_silent_worker_is_lost_too(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "GRACE", 1.0)
    with Engine(tiny, nproc=2, timeout=3) as engine:
        pids = engine.pids
        with pytest.raises(df.PeerLost, match=rf"rank 1 \(pid {pids[1]}\) was lost: it fell silent"):
            engine.generate("x", **PICTURE, progress=at_step(1, lambda: os.kill(pids[1], signal.SIGSTOP)))
        wait_until_gone(list(pids.values()), 5)
    with pytest.raises(df.ConfigError, match="this engine is closed"):
        engine.generate("x")


ORPHAN = """
import sys, time, distrifusion as df
engine = df.Engine(sys.argv[1])
print(*engine.pids.values(), flush=True)
print(engine._workers._group._folder, flush=True)
engine.generate("x", steps=900, height=64, width=64, progress=lambda *step: print(flush=True))
"""


def test_workers_do_not_outlive_a_killed_parent(tiny: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN, str(tiny)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        logs = Path(parent.stdout.readline().strip())
        parent.stdout.readline()  # it is in the middle of a picture
        assert pids
        assert all(map(is_running, pids))
        assert logs.is_dir()
        parent.kill()
    wait_until_gone(pids, 10)
    assert not logs.exists()


def test_what_does_not_load_is_one_line_and_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny, tmp_path / "broken")
    (broken / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "block_out_channels": [7]}')
    with pytest.raises(df.DistrifusionError) as caught:
        Engine(broken, nproc=1)
    assert str(caught.value).startswith(f"{broken} does not load: ValueError: ")
    assert "\n" not in str(caught.value)
    assert "Traceback" in str(caught.value.__cause__)


def mapped_files() -> list[tuple[int, int, str]]:
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        first, last = (int(part, 16) for part in fields[0].split("-"))
        found.append((first, last, fields[5] if len(fields) == 6 else ""))
    return found


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_weights_are_mapped_and_not_copied(tiny: Path) -> None:
    painter = Painter(Setup(str(tiny), df.ParallelConfig()))
    mappings = mapped_files()
    for name in ("unet", "vae", "text_encoder"):
        for weight in getattr(painter.pipeline, name).parameters():
            where = next(file for first, last, file in mappings if first <= weight.data_ptr() < last)
            assert where.endswith(".safetensors"), f"{name}: a weight of shape {tuple(weight.shape)} is in {where!r}"


def test_one_rank_alone_reports_its_steps(tiny: Path) -> None:
    painter = Painter(Setup(str(tiny), df.ParallelConfig()))
    painter.join(None)
    painted = painter.paint(Request(0, {"prompt": "x", "num_inference_steps": 2, "height": 32, "width": 32}))
    assert painted.report.as_dict()["steps"] == {"alone": 2}
    assert painted.report.as_dict()["bytes_per_step"] == 0


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (df.UnsupportedModel("no table"), df.UnsupportedModel, "no table"),
        (KeyError("unet"), KeyError, "'unet'"),
        (subprocess.SubprocessError("odd"), df.DistrifusionError, "SubprocessError: odd"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), df.DistrifusionError, "UnicodeDecodeError: 'utf-8' codec"),
    ],
)
def test_exceptions_travel(error: Exception, kind: type[Exception], text: str) -> None:
    arrived = pickle.loads(pickle.dumps(Failure.of(error))).exception()
    assert type(arrived) is kind
    assert str(arrived).startswith(text)
    assert type(error).__name__ in str(arrived.__cause__)
