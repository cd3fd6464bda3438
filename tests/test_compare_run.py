"""The whole command on a tiny model: what it writes, that it goes on where it was, and that each error is one line."""

import json
import pickle
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrifusion import cli
from distrifusion.checkpoint import find
from distrifusion.compare import paint, run
from distrifusion.compare.plan import Case, Plan, cases_for
from tiny_pipeline import save_tiny_pipeline

pytest.importorskip("skimage", reason="PSNR and SSIM are scikit-image's")

BASIC = ["--prompt", "a lake", "--prompt", "hills", "--prompt", "sea", "--steps", "3", "--warmup-steps", "0"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """Counts (case, prompt) that are painted in this process, and leaves out the metrics that load networks."""
    count: Counter[tuple[str, int]] = Counter()
    for name in ("alone", "spread"):
        monkeypatch.setattr(paint.Studio, name, counting(getattr(paint.Studio, name), count))
    monkeypatch.setattr(run, "metrics", lambda: [metric for metric in METRICS if metric.name in ("psnr", "ssim")])
    monkeypatch.setattr(run.frechet, "missing", lambda: "not in this test")
    return count


METRICS = run.metrics()


def counting(original: Any, count: Counter[tuple[str, int]]) -> Any:
    def counted(self: Any, case: Case, indices: Any) -> Any:
        count.update((case.name, index) for index in indices)
        return original(self, case, indices)

    return counted


def compare(tiny: Path, output: Path, *arguments: str) -> int:
    return cli.run(["compare", "--model", str(tiny), "-o", str(output), "--jobs", "1", *arguments])


def test_one_command_writes_report_numbers_and_pictures(
    tiny: Path, tmp_path: Path, painted: Counter[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert compare(tiny, out, *BASIC, "--world", "2", "--world", "3") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "displaced on 3" in said.out
    assert said.out.endswith(f"wrote {out}/report.html\nwrote {out}/metrics.json\nwrote {out}/pictures\n")
    found = json.loads((out / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert len(found["cases"]) == 6
    for case in found["cases"]:
        assert len(case["drift"]) == 3
        assert sum(case["patches"]) == 16
        assert case["num_pictures"] == len(case["results"]) == 3
        assert len(list((out / case["pictures"]).glob("*.png"))) == 3
        is_exact = case["strategy"] == "sync"
        assert (case["psnr_least"] >= 80) == is_exact
        assert (case["drift"][-1] < 1e-4) == is_exact
        assert case["means"]["seam"] is not None
        if is_exact:
            assert case["means"]["seam_relative"] == pytest.approx(1.0, abs=1e-3)
    assert set(painted.values()) == {1}  # the one-device pictures too
    assert len(painted) == 7 * 3
    assert list(tmp_path.iterdir()) == [out]
    assert (out / "report.html").stat().st_size < 1_000_000


def test_a_run_that_was_cut_off_goes_on_where_it_was(
    tiny: Path,
    tmp_path: Path,
    painted: Counter[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, keep = tmp_path / "out", run.Store.put_result

    def interrupted(self: Any, case: Case, index: int, *rest: Any) -> None:
        if (case.strategy, index) == ("naive", 1):
            raise KeyboardInterrupt
        keep(self, case, index, *rest)

    arguments = (*BASIC, "--world", "2", "--strategy", "sync", "--strategy", "naive", "--batch", "1")
    monkeypatch.setattr(run.Store, "put_result", interrupted)
    assert compare(tiny, out, *arguments) == 130
    assert capsys.readouterr().err == (
        f"what is done is kept in {tmp_path}/.out.part: the same command goes on from there\ninterrupted\n"
    )
    assert not out.exists()
    assert compare(tiny, out, *arguments, "--seed", "5") == 2  # others would not belong to what is there
    assert "holds results of seed 0, not 5" in capsys.readouterr().err
    before = dict(painted)
    monkeypatch.setattr(run.Store, "put_result", keep)
    painted.clear()
    assert compare(tiny, out, *arguments) == 0
    assert painted.keys() & before.keys() == {("naive-2-ranks-3-steps", 1)}  # which was painted and not kept
    found = json.loads((out / "metrics.json").read_text())
    assert [[result["index"] for result in case["results"]] for case in found["cases"]] == [[0, 1, 2]] * 2
    assert list(tmp_path.iterdir()) == [out]

    assert compare(tiny, out, *arguments) == 2
    assert "is there and not empty" in capsys.readouterr().err
    painted.clear()
    assert compare(tiny, out, *BASIC, "--world", "3", "--strategy", "sync", "--add") == 0
    assert {name for name, _ in painted} == {"one-device-3-steps", "sync-3-ranks-3-steps"}
    assert len(json.loads((out / "metrics.json").read_text())["cases"]) == 3
    assert compare(tiny, out, *BASIC, "--world", "2", "--strategy", "sync", "--limit", "1", "--force") == 0
    assert len(json.loads((out / "metrics.json").read_text())["cases"]) == 1


def test_pictures_that_are_no_numbers_are_an_error(
    tiny: Path,
    tmp_path: Path,
    painted: Counter[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(self: Any, *_: Any) -> paint.Painting:
        return paint.Painting(np.full((1, 32, 32, 3), np.nan, np.float32), np.zeros((3, 1, 4, 16, 16), np.float32))

    monkeypatch.setattr(paint.Studio, "alone", broken)
    assert compare(tiny, tmp_path / "out", "--prompt", "x", "--world", "2", "--steps", "3") == 1
    assert "one device paints values that are no numbers (prompt 0)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--prompts", "empty.txt"], "prompts 'empty.txt' holds no prompt"),
        (["--prompts", "nowhere.txt"], "prompts 'nowhere.txt' cannot be read as text"),
        ([], "the prompts that come along are for the bundled model"),
        (["--prompt", "x", "--world", "17"], "16 rows of latent cannot be split over 17 ranks"),
        (["--prompt", "x", "--world", "0"], "world=0 must be"),
        (["--prompt", "x", "--strategy", "best"], "strategy='best' must be one of"),
        (["--prompt", "x", "--time-shift"], "--time-shift is of strategy='pipelined': give --strategy pipelined too"),
        (["--prompt", "x", "--strategy", "pipelined", "--patch", "3"], "a world of 2 does not fit cfg=1 x pipe=any"),
        (["--prompt", "x", "--group-norm", "odd"], "group_norm='odd' must be one of"),
        (["--prompt", "x", "--cfg", "2", "--world", "3"], "a world of 3 does not fit cfg=2"),
        (["--prompt", "x", "--height", "31"], "height=31 must be a multiple of 8"),
        (["--prompt", "x", "--jobs", "0"], "jobs=0 must be"),
        (["--prompt", "x", "--device", "tpu"], "device='tpu' must be one of"),
        (["--prompt", "x", "-o", "nowhere/out"], "output 'nowhere/out': there is no folder 'nowhere'"),
        (["--prompt", "x", "-o", "empty.txt"], "output 'empty.txt' is a file"),
        (["--prompt", "x", "-o", "full"], "output 'full' is there, not empty and no comparison"),
        (["--prompt", "x", "-o", "full", "--force"], "output 'full' is there, not empty and no comparison"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "Studio", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "work").touch()
    assert cli.run(["compare", "--model", str(tiny), "-o", "out", *arguments]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith(f"error: {line}")
    assert {path.name for path in tmp_path.iterdir()} == {"empty.txt", "full"}
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["work"]


def test_help_and_bad_input_need_no_torch() -> None:
    code = (
        "import sys; from distrifusion.cli import run; assert run(['compare', '--help']) == 0; "
        "assert run(['compare', '-o', '/nowhere/out', '--strategy', 'best']) == 2; "
        "assert not {'torch', 'diffusers', 'transformers', 'skimage'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert "--group-norm" in done.stdout


def test_workers_can_be_sent_their_work(tiny: Path, tmp_path: Path) -> None:
    cases = cases_for(["displaced"], [2], [3], [0], ["stale"])
    plan = Plan("tiny", find(str(tiny)), ("x",), cases, batch=2)
    make = pickle.loads(pickle.dumps(partial(run.Desk, plan, tmp_path, ["psnr"])))
    desk, tasks = make(), [run.Task(cases[0].reference, (0,)), run.Task(cases[0], (0,))]
    assert [pickle.loads(pickle.dumps(desk(task))) for task in tasks] == tasks
    assert run.Store(tmp_path).result(cases[0], 0)
