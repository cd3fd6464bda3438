"""The command line: its flags, its words, its exit codes, and that a picture appears whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer
from PIL import Image

from distrifusion import ConfigError, DistrifusionError, ParallelConfig, RanksDisagree, cli, commands, joined, run_ranks
from distrifusion.comm import Comm
from distrifusion.painter import Setup
from tiny_pipeline import save_tiny_pipeline

DISTRIFUSION = [sys.executable, "-m", "distrifusion"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")


def order_for(output: Path, **changes: Any) -> commands.Order:
    settings: dict[str, Any] = {
        "prompt": "x",
        "model": None,
        "config": ParallelConfig(),
        "nproc": None,
        "height": None,
        "width": None,
        "steps": 2,
        "guidance_scale": 5.0,
        "negative_prompt": None,
        "seed": 0,
        "dtype": None,
        "device": "cpu",
        "output": output,
    }
    return commands.Order(**{**settings, **changes})


def test_commands_and_flags() -> None:
    group = typer.main.get_command(cli.app)
    flags = {
        name: sorted(option for parameter in command.params for option in parameter.opts)
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    assert flags == {
        "bench": [
            *("--at-once", "--balance", "--batch", "--blocks", "--codec", "--compile", "--context-window"),
            *(
                "--cuda-graphs",
                "--device",
                "--dtype",
                "--height",
                "--json",
                "--model",
                "--patch",
                "--patches",
                "--plot",
                "--products",
                "--rounds",
                "--size",
                "--steps",
                "--strategy",
                "--stride",
                "--trace",
                "--width",
                "--world",
            ),
        ],
        "generate": [
            *("--balance", "--blocks", "--cfg", "--codec", "--context-window", "--cuda-graphs", "--device", "--dtype"),
            *("--fps", "--frames"),
            *("--group-norm", "--guidance-scale", "--height", "--json", "--max-memory", "--model"),
            *("--negative-prompt", "--nproc", "--output", "--overlap", "--panorama", "--patch", "--patches"),
            *("--pipe", "--remember", "--seed", "--shift", "--split", "--steps", "--strategy", "--stride"),
            *("--text-encoders", "--tile", "--time-shift", "--true-cfg-scale", "--warmup-steps"),
            *("--width", "-o", "prompt"),
        ],
        "compare": [
            *("--add", "--batch", "--cfg", "--codec", "--context-window", "--device", "--dtype", "--folders"),
            *("--force", "--group-norm"),
            *("--guidance-scale", "--height", "--jobs", "--json", "--limit", "--model", "--no-remember", "--output"),
            *(
                "--overlap",
                "--patch",
                "--patches",
                "--prompt",
                "--prompts",
                "--seed",
                "--shift",
                "--show",
                "--split",
                "--steps",
                "--strategy",
                "--stride",
                "--time-shift",
                "--warmup-steps",
                "--width",
            ),
            *("--world", "-o"),
        ],
        "models": ["--json"],
    }


def test_help_and_version_need_no_torch() -> None:
    code = (
        "import sys; from distrifusion.cli import run; assert run(['generate', '--help']) == 0; "
        "assert run([]) == 0; assert run(['--version']) == 0; "
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert "--warmup-steps" in done.stdout
    assert "Paint a picture" in done.stdout
    assert done.stdout.splitlines()[-1] == "distrifusion 0.1.0"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--strategy", "best"], "strategy='best' must be one of 'sync', "),
        (["--strategy", "tensor", "--patch", "2"], "patch=2 does not go with strategy='tensor'"),
        (["--cfg", "3"], "cfg=3 must be 1 or 2"),
        (["--nproc", "3", "--cfg", "2"], "a world of 3 does not fit cfg=2"),
        (["--nproc", "0"], "nproc=0 must be"),
        (
            ["--strategy", "pipelined", "--pipe", "2", "--patch", "2", "--nproc", "3"],
            "a world of 3 does not fit cfg=1 x pipe=2 x patch=2: start 4 ranks",
        ),
        (["--stride", "2"], "stride=2 goes with strategy='pipelined' only, not with 'displaced'"),
        (["--time-shift"], "time_shift=True goes with strategy='pipelined' only, not with 'displaced'"),
        (["--balance", "2,0"], "balance='2,0' must be None, 'measured', or a positive number for each rank"),
        (["--balance", "2,1,1", "--nproc", "2"], "balance=2,1,1 has 3 weights for 2 ranks along the picture"),
        (["--balance", "measured", "--warmup-steps", "0"], "balance='measured' with warmup_steps=0 leaves no step to"),
        (["--model", "nowhere"], "model 'nowhere' is neither a folder with a model_index.json nor a hub id"),
        (["--height", "63"], "height=63 must be a multiple of 8, or the VAE cannot take it: 56 or 64 fits"),
        (["--height", "8", "--nproc", "5"], "4 rows of latent cannot be split over 5 ranks: the largest world"),
        (["--steps", "0"], "steps=0 must be"),
        (["--seed", "-1"], "seed=-1 must be"),
        (["--dtype", "fp8"], "dtype='fp8' must be one of 'bf16', 'fp16', 'fp32'"),
        (["--device", "tpu"], "device='tpu' must be one of"),
        (["-o", "picture.xyz"], "output 'picture.xyz': '.xyz' is no format of pictures"),
        (["-o", "picture"], "output 'picture': '' is no format of pictures"),
        (["-o", "nowhere/picture.png"], "output 'nowhere/picture.png': there is no folder 'nowhere'"),
        (["--bogus"], "No such option: --bogus"),
        (["--panorama", "--tile"], "--panorama and --tile are two ways for the ends to meet"),
        (["--shift", "far", "--strategy", "shifted"], "shift='far' must be one of 'patch', 'golden', 'random', or a"),
        (["--overlap", "2"], "overlap=2 does nothing under strategy='displaced'"),
        (["--steps", "many"], "Invalid value for '--steps'"),
    ],
)
def test_bad_input_is_one_line(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "Engine", lambda *_, **__: pytest.fail("workers were started"))
    assert cli.run(["generate", "x", "--model", str(tiny), *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: {line}")
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_and_no_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["paint"]) == 2
    assert capsys.readouterr().err == "error: No such command 'paint'.\n"
    assert cli.run(["generate"]) == 2
    assert capsys.readouterr().err.startswith("error: Missing argument")


def test_errors_that_are_not_ours_are_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(order: commands.Order) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(commands, "generate", fail)
    assert cli.run(["generate", "x"]) == 1
    assert capsys.readouterr().err == "error: RuntimeError: two lines\n"


def test_an_output_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="is a folder: name a file"):
        commands.check_output(tmp_path.joinpath("x.png").mkdir() or tmp_path / "x.png")

    def refuse(self: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(ConfigError, match=r"the folder .* cannot be written to \(Permission denied\)"):
        commands.check_output(tmp_path / "y.png")


def test_the_picture_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    from distrifusion.metrics import Report

    class HalfWritten:
        size = (8, 8)

        def save(self, path: Path) -> None:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    old = tmp_path / "x.png"
    old.write_bytes(b"old")
    with pytest.raises(Exception, match=r"could not be written: .*No space left"):
        commands._write(order_for(old), [HalfWritten()], Report("sync", "1"), 1.0, 1)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.png", b"old")]


def test_models_lists_what_is_supported(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert "UNet2DConditionModel" in {row["class"] for row in rows}
    assert all({"strategies", "features", "checked"} <= set(row) for row in rows)
    assert cli.run(["models"]) == 0
    assert "UNet2DConditionModel" in capsys.readouterr().out


def test_generate_paints_a_tile_on_two_processes_and_json_is_alone_on_stdout(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.png"
    words = ["generate", "<moss>", "--tile", "--model", str(tiny), "--nproc", "2", "--strategy", "sync", "--steps", "2"]
    done = subprocess.run(
        [*DISTRIFUSION, *words, "--height", "48", "--json", "-o", str(file)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert facts["file"] == str(file)
    assert (facts["height"], facts["width"], facts["seed"], facts["world"]) == (48, 32, 0, 2)
    assert (facts["strategy"], facts["patches"], facts["steps"]) == ("sync", [12, 12], {"sync": 2})
    assert facts["seconds"] > 2 * facts["seconds_per_step"] > 0
    assert facts["bytes_per_step"] > 0
    with Image.open(file) as image:
        assert image.size == (32, 48)
    assert "topology=torus" in facts["notes"]
    assert facts["page"] == str(tmp_path / "out.html")  # which repeats it
    assert "<title>&lt;moss&gt;</title>" in (tmp_path / "out.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.png"]


def test_a_panorama_is_wide_and_its_left_meets_its_right(monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[commands.Order] = []
    monkeypatch.setattr(commands, "generate", lambda order: orders.append(order))
    assert cli.run(["generate", "x", "--panorama"]) == 0
    assert cli.run(["generate", "x", "--panorama", "--width", "2048"]) == 0
    assert cli.run(["generate", "x"]) == 0
    assert [(order.height, order.width) for order in orders] == [(512, 1024), (512, 2048), (None, None)]
    assert [order.config.topology for order in orders] == ["ring-x", "ring-x", "plane"]
    assert [order.view for order in orders] == ["panorama", "panorama", None]


def test_ctrl_c_ends_all_with_one_line(tiny: Path, tmp_path: Path) -> None:
    words = ["generate", "x", "--model", str(tiny), "--steps", "900", "-o", str(tmp_path / "x.png")]
    with subprocess.Popen(
        [*DISTRIFUSION, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 60
        while not (workers := psutil.Process(process.pid).children()):
            assert process.poll() is None
            assert time.monotonic() < deadline, "no worker was started"
            time.sleep(0.1)
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (out, err) == ("", "interrupted\n")
    assert psutil.wait_procs(workers, timeout=5)[1] == []
    assert list(tmp_path.iterdir()) == []


def test_under_torchrun_the_given_ranks_join(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.png"
    words = ["-m", "distrifusion", "generate", "x", "--model", str(tiny), "--steps", "2", "--json", "-o", str(file)]
    done = subprocess.run([*TORCHRUN, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["world"], facts["patches"]) == (2, [8, 8])
    assert list(tmp_path.iterdir()) == [file]


def test_under_torchrun_ranks_that_disagree_are_told_so_once(tiny: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m distrifusion generate x --model {tiny} --seed $((RANK * 7)) -o {tmp_path}/out.png"
    done = subprocess.run(
        [*TORCHRUN, "--no-python", "bash", "-c", command], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert errors == ["error: seed differs: rank 0 has 0, rank 1 has 7"]
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_ranks_agree_or_all_hear_why_not() -> None:
    def ask(comm: Comm, said: dict[str, Any], broken: int | None) -> str:
        def check() -> Setup:
            if comm.rank == broken:
                raise ConfigError("no such model")
            return Setup(f"model of rank {comm.rank}", ParallelConfig())

        try:
            return joined.agree(comm, {name: value[comm.rank] for name, value in said.items()}, check).path
        except (ConfigError, RanksDisagree) as error:
            return f"{type(error).__name__}: {error}"

    same = {"prompt": ["x"] * 3, "seed": [1] * 3}
    assert run_ranks(3, lambda comm: ask(comm, same, None)) == [f"model of rank {rank}" for rank in range(3)]
    differing = {"prompt": ["x"] * 3, "height": [None, None, 64]}
    expected = "RanksDisagree: height differs: rank 0 has None, rank 2 has 64"
    assert run_ranks(3, lambda comm: ask(comm, differing, None)) == [expected] * 3
    assert run_ranks(3, lambda comm: ask(comm, same, 1)) == ["ConfigError: on rank 1: no such model"] * 3


class SlowPainter:
    """Loads at the pace of its rank, and not at all from "nothing"."""

    def __init__(self, setup: Setup, *_: int) -> None:
        rank, what = setup.path.split()
        time.sleep(0.3 * int(rank))
        if what == "nothing":
            raise DistrifusionError("nothing does not load")
        self.joined: Comm | None = None

    def join(self, comm: Comm) -> None:
        self.joined = comm


def load_each(paths: list[str]) -> list[Any]:
    def load(comm: Comm) -> Any:
        try:
            painter: Any = joined.load(comm, Setup(paths[comm.rank], ParallelConfig()))
        except DistrifusionError as error:
            return str(error)
        return painter.joined is comm

    # Much less than the slowest rank needs: a rank that loads is not silent.
    return run_ranks(len(paths), load, timeout=0.25)


def test_ranks_that_load_are_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "Painter", SlowPainter)
    monkeypatch.setattr(joined, "POLL", 0.01)
    assert load_each(["0 model", "1 model", "2 model"]) == [True] * 3


def test_what_does_not_load_on_one_rank_is_told_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "Painter", SlowPainter)
    monkeypatch.setattr(joined, "POLL", 0.01)
    assert load_each(["2 model", "1 nothing"]) == ["on rank 1: nothing does not load"] * 2
