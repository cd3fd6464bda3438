"""The benchmark measures what it says: cases, sizes, ratios, counts, memory; and refuses what it cannot measure."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import distrifusion as df
from distrifusion import joined
from distrifusion.bench import command, memory, plot, start
from distrifusion.bench.measure import Bench
from distrifusion.bench.memory import PeakMemory
from distrifusion.bench.plan import Case, Plan, cases_for, parse_sizes
from distrifusion.bench.shapes import SHAPES, VAES, check_name
from distrifusion.bench.start import measure
from distrifusion.bench.summary import summary, table
from distrifusion.bench.timing import Timing
from distrifusion.bench.workload import load
from distrifusion.cli import run
from distrifusion.comm import Comm
from distrifusion.products import SWITCH, Products

DISTRIFUSION = ["-m", "distrifusion", "bench"]
SHORT = ["--size", "64", "--rounds", "1", "--steps", "1"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """A shape smaller than any real one: what is tested is the bookkeeping."""
    shape = {**SHAPES["sdxl-mini"], "block_out_channels": (32, 32, 32), "attention_head_dim": 1}
    monkeypatch.setitem(SHAPES, "tiny", shape)
    return "tiny"


def found_of(plan: Plan) -> dict[str, Any]:
    found = df.run_ranks(plan.world, lambda comm: measure(plan, comm))
    assert found[1:] == [None] * (plan.world - 1)  # rank 0 alone speaks
    assert found[0] is not None
    return found[0].summary


def test_cases_put_the_bare_model_first_and_one_rank_once() -> None:
    names = [(case.name, case.world) for case in cases_for(["sync", "displaced"], [1, 2], 4)]
    assert names == [("bare model", 1), ("bare model, 4 threads", 1), ("sync", 1), ("sync", 2), ("displaced", 2)]


def test_what_the_machine_gives_is_told_by_a_step_on_each_rank(tiny: str) -> None:
    cases = cases_for(["sync"], [1, 2, 3], 1, at_once=True)
    assert [(case.name, case.world) for case in cases if case.strategy is None] == [
        ("bare model", 1),
        ("bare model, at once", 2),
        ("bare model, at once", 3),
    ]
    plan = Plan(tiny, ((64, 64),), 1, cases, rounds=1, steps=1)
    for row in found_of(plan)["cases"]:
        assert (row["messages_per_step"] > 0) == (row["case"] == "sync" and row["world"] > 1)
        assert len(row["peak_memory_per_rank"]) == row["world"]
    timings = [Timing(case, (64, 64), [4.0 if case.is_at_once else 3.0], [1.0], [0.0]) for case in cases]
    ratios = [(row["speedup"], row["share_of_linear"]) for row in summary(plan, timings, "gloo", "torch")["cases"]]
    assert ratios == [(1, 1), (1, 1), (1.5, 0.75), (1, 0.5), (2.25, 0.75), (1, 0.333)]  # two or three steps in 4 s


@pytest.mark.parametrize(("said", "whose"), [("0", "torch"), ("1", "oneDNN")])
def test_what_the_products_give_is_told_by_the_bare_model_with_them(
    tiny: str, monkeypatch: pytest.MonkeyPatch, said: str, whose: str
) -> None:
    given = []
    monkeypatch.setenv(SWITCH, said)
    monkeypatch.setattr(Products, "__enter__", lambda mode: given.append(mode) or TorchFunctionMode.__enter__(mode))
    cases = cases_for(["sync"], [1], 1, products=True)
    assert [case.name for case in cases] == ["bare model", "bare model, ranks' products", "sync"]
    found = df.run_ranks(1, lambda comm: measure(Plan(tiny, ((64, 64),), 1, cases, rounds=2, steps=1), comm))[0]
    assert found is not None
    assert found.summary["products"] == whose
    assert len(given) == (2 if said == "1" else 0)  # once in each turn of the one case


@pytest.mark.parametrize(
    ("name", "millions", "output"),
    [
        ("sdxl-mini", 33, (1, 4, 8, 6)),
        ("flux-mini", 50, (1, 12, 64)),
        ("pixart-mini", 50, (1, 8, 8, 6)),
        ("vae-mini", 3.1, (1, 3, 64, 48)),
    ],
)
def test_mini_shapes_have_the_said_size_and_run(name: str, millions: float, output: tuple[int, ...]) -> None:
    work = load(name, 16, 16).resized(8, 6)
    assert sum(p.numel() for p in work.model.parameters()) == pytest.approx(1e6 * millions, rel=0.07)  # "about 50"
    with torch.no_grad():
        assert work.run(work.sample(0)).sample.shape == output


def test_codecs_multiply_the_cases_that_send_something() -> None:
    cases = cases_for(["sync", "naive"], [1, 2], 1, [None, "int8"], 0.5)
    names = [(case.name, case.world) for case in cases]
    assert names == [
        ("bare model", 1),
        ("sync", 1),
        ("sync window 0.5", 2),
        ("sync int8 window 0.5", 2),
        ("naive", 2),
    ]
    assert (cases[3].config.codec, cases[3].config.context_window) == ("int8", 0.5)


def test_patches_multiply_the_cases_in_stages() -> None:
    cases = cases_for(["sync", "pipelined"], [2, 4], 1, balance="measured", patches=[None, 4], blocks="freed")
    names = [case.name for case in cases if case.strategy == "pipelined"]
    assert names == ["pipelined balance measured", "pipelined 4 patches blocks freed"] * 2
    assert len(cases) == 1 + 2 * 3
    config = cases[-1].config
    assert (config.patches, config.blocks, config.balance, cases[-1].num_untimed) == (4, "freed", None, 2)


def test_stages_of_several_ranks_and_strides_multiply_the_cases_in_stages_as_far_as_they_go_together() -> None:
    cases = cases_for(["sync", "pipelined"], [4], 1, patches=[None, 4], stage_ranks=[None, 2], strides=[1, 2])
    staged = [case for case in cases if case.strategy == "pipelined"]
    assert [case.name for case in staged] == [
        "pipelined",
        "pipelined stride 2",
        "pipelined patch 2",
        "pipelined 4 patches",
    ]
    found = [(case.config.patch, case.config.stride, case.config.patches) for case in staged]
    assert found == [(None, 1, None), (None, 2, None), (2, 1, None), (None, 1, 4)]
    assert [case.num_untimed for case in staged] == [2, 3, 2, 2]
    assert len(cases) == 1 + 1 + 4


@pytest.mark.parametrize("ranks", ["patch", "stride"])
def test_steps_that_are_computed_at_once_are_timed_as_one(tiny: str, ranks: str) -> None:
    staged = Case("pipelined", 4, patch=2) if ranks == "patch" else Case("pipelined", 3, stride=2)
    plan = Plan(tiny, ((128, 128),), 1, (Case(None), staged), rounds=1, steps=2)
    plan = Plan.from_dict(json.loads(json.dumps(plan.as_dict())))
    timing = df.run_ranks(staged.world, lambda comm: Bench(plan, comm).measure())[0][1]
    assert len(timing.seconds) == len(timing.cpu_seconds) == len(timing.waited) == 2
    assert min(timing.seconds) > 0.2 * max(timing.seconds)  # a step that computes nothing takes far less
    row = found_of(plan)["cases"][1]
    assert (row["patch"], row["stride"], row["world"]) == (staged.patch, staged.stride, staged.world)
    assert row["messages_per_step"] == timing.messages > 0


def test_graphs_are_measured_beside_steps_that_run() -> None:
    cases = cases_for(["sync", "pipelined"], [1, 2], 1, [None, "int8"], cuda_graphs=True)
    assert [case.name for case in cases] == ["bare model", "sync", "sync", "sync int8", "pipelined", "sync graphs"]
    assert (cases[-1].config.cuda_graphs, cases[-1].num_untimed - cases[2].num_untimed) == (True, 1)


def test_compiled_cases_stand_beside_those_that_run() -> None:
    cases = cases_for(["sync", "pipelined", "tensor"], [1, 2], 2, at_once=True, compiled=True)
    assert [(case.name, case.world) for case in cases if case.compiled] == [
        ("bare model, compiled", 1),
        ("sync compiled", 2),
        ("tensor compiled", 2),
    ]
    timings = [Timing(case, (64, 64), [2.0 if case.compiled else 3.0], [1.0], [0.0]) for case in cases]
    rows = summary(Plan("sdxl-mini", ((64, 64),), 1, cases), timings, "gloo", "torch")["cases"]
    assert [row["speedup"] for row in rows if row["compiled"]] == [1.5] * 3  # over the bare model that is not


@pytest.mark.parametrize("name", ["tiny", "pixart-mini"])
def test_blocks_are_compiled_for_their_cases_alone(tiny: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[nn.Module] = []

    def compiled(block: nn.Module) -> None:
        block._compiled_call_impl = lambda *args, **kwargs: ran.append(block) or block._call_impl(*args, **kwargs)

    monkeypatch.setattr(nn.Module, "compile", compiled)
    plan = Plan(name, ((64, 64),), 1, cases_for(["sync"], [1], 1, compiled=True), rounds=1, steps=1)

    def rank(comm: Comm) -> Any:
        bench = Bench(plan, comm)
        bench.measure()
        return bench._work[64, 64]

    (work,) = df.run_ranks(1, rank)
    num_blocks = 3 + 1 + 3 if name == "tiny" else len(work.model.transformer_blocks)
    num_steps = 3  # the compiled bare model's, with those that are not timed
    assert len(ran) == num_steps * num_blocks
    assert {id(block) for block in ran} == {id(block) for block in work.blocks}
    assert not any(module._compiled_call_impl for module in work.model.modules())


def test_a_balance_is_asked_of_every_case_of_several_ranks(tiny: str) -> None:
    cases = cases_for(["displaced", "naive"], [1, 2], 1, balance="measured")
    names = ["bare model", "displaced", "displaced balance measured", "naive balance measured"]
    assert [case.name for case in cases] == names
    # Of the two steps more before the timed ones, the second is measured, so that the timed ones are displaced still.
    assert [case.num_untimed for case in cases] == [2, 2, 4, 4]
    plan = Plan(tiny, ((128, 128),), 1, (Case(None), cases[2], Case("sync", 2, balance="3,1")), rounds=1, steps=1)
    rows = found_of(Plan.from_dict(json.loads(json.dumps(plan.as_dict()))))["cases"]
    assert rows[1]["messages_per_step"] <= 8 < rows[2]["messages_per_step"]


def test_a_vae_is_measured_by_its_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ranks that are threads draw their weights at the same time: without this convolution they decode the same values.
    shape = {**VAES["vae-mini"], "block_out_channels": (32,) * 4, "use_post_quant_conv": False}
    monkeypatch.setitem(VAES, "tiny", shape)
    rows = found_of(Plan("tiny", ((64, 64),), 1, cases_for(["sync"], [1, 2], 1), rounds=1, steps=1))["cases"]
    bare, alone, two = rows
    assert (bare["messages_per_step"], alone["messages_per_step"]) == (0, 0)
    decoder = load("tiny", 8, 8).model.decoder
    wide = [m for m in decoder.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    norms = [m for m in decoder.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert two["messages_per_step"] == len(wide) - 1 + len(norms) + 2  # K and V, and the picture
    assert two["bytes_per_step"] > 3 * 32 * 64 * 4


def test_measures_every_case_and_counts_what_is_sent(tiny: str) -> None:
    plan = Plan(tiny, ((128, 128),), 1, cases_for(["sync", "displaced", "naive"], [1, 2, 3], 1), rounds=2, steps=2)
    found = found_of(plan)
    rows = {(row["case"], row["world"]): row for row in found["cases"]}
    assert len(rows) == 1 + 1 + 3 + 3
    assert rows["bare model", 1]["speedup"] == 1.0
    for world in (2, 3):
        assert rows["naive", world]["messages_per_step"] == 1
        assert 1 < rows["displaced", world]["messages_per_step"] <= 8 < rows["sync", world]["messages_per_step"]
        assert rows["displaced", world]["bytes_per_step"] >= rows["sync", world]["bytes_per_step"] > 0
    for row in rows.values():
        assert row["seconds_per_step"] > 0
        assert 0 <= row["slot_bytes"] <= 2 * row["bytes_per_step"]
        assert (row["slot_bytes"] > 0) == (row["strategy"] == "displaced" and row["world"] > 1)
        assert row["share_of_linear"] == pytest.approx(row["speedup"] / row["world"], abs=2e-3)
        assert len(row["peak_memory_per_rank"]) == row["world"]
    assert json.loads(json.dumps(found))["bench"]["model"] == "tiny"
    assert found["wire"] == "threads"


def test_every_size_has_a_baseline_of_its_own(tiny: str) -> None:
    plan = Plan(tiny, ((64, 64), (128, 64)), 2, cases_for(["sync"], [2], 2), rounds=1, steps=2)
    found = found_of(plan)
    by_size = {size: [row for row in found["cases"] if (row["height"], row["width"]) == size] for size in plan.sizes}
    assert [row["case"] for row in found["cases"]] == ["bare model", "bare model, 2 threads", "sync"] * 2
    for rows in by_size.values():
        bare, threaded, sync = rows
        assert (bare["speedup"], threaded["speedup_over_threads"]) == (1.0, 1.0)
        # Ratios have three decimals, which is little of a small one.
        assert sync["speedup"] == pytest.approx(bare["seconds_per_step"] / sync["seconds_per_step"], rel=0.02, abs=6e-4)
        over_threads = threaded["seconds_per_step"] / sync["seconds_per_step"]
        assert sync["speedup_over_threads"] == pytest.approx(over_threads, rel=0.02, abs=6e-4)
    # Twice the rows: all that travels between two ranks of rows is halos, as before, and K and V, twice as many.
    small, large = (rows[2]["bytes_per_step"] for rows in by_size.values())
    assert small < large < 2 * small
    assert [list(size) for size in found["bench"]["sizes"]] == [[64, 64], [128, 64]]


def test_a_resized_workload_is_the_one_that_would_be_loaded() -> None:
    resized, loaded = load("sdxl-mini", 8, 8, 2).resized(16, 24), load("sdxl-mini", 16, 24, 2)
    assert resized.sample_shape == loaded.sample_shape == (2, 4, 16, 24)
    assert torch.equal(resized.sample(3), loaded.sample(3))
    words, wanted = resized.arguments["added_cond_kwargs"], loaded.arguments["added_cond_kwargs"]
    assert words["time_ids"].tolist() == wanted["time_ids"].tolist() == [[128.0, 192.0, 0.0, 0.0, 128.0, 192.0]] * 2
    assert torch.equal(words["text_embeds"], wanted["text_embeds"])


def test_the_table_shows_every_row_and_says_what_is_not_known() -> None:
    from rich.console import Console

    plan = Plan("sdxl-mini", ((1024, 768), (64, 64)), 1, (Case(None), Case("sync", 2)))
    bare = Timing(plan.cases[0], (1024, 768), [2.0], [2.0], [0.0], peaks=[3 << 30])
    sync = Timing(plan.cases[1], (1024, 768), [1.0], [2.0], [0.1], 103, 1 << 20, peaks=[2 << 30, None])
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table(summary(plan, [bare, sync], "gloo", "torch")))
    lines = capture.get().splitlines()
    assert "sdxl-mini, 1024 x 768, 64 x 64 px, batch 1, float32, cpu over gloo" in lines[0]
    (row,) = [line for line in lines if "sync" in line]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        *("sync", "1024 x 768", "2", "1.000", "0.0%", "2.00", "-", "100%", "2.000", "0.100", "103", "1.0 MiB"),
        *("0 B", "-"),
    ]
    assert "3.00 GiB" in capture.get()


def test_timing_is_the_median_and_the_quartiles() -> None:
    timing = Timing(Case("sync", 2), (64, 64), seconds=[1.0, 2.0, 3.0, 4.0, 100.0])
    assert timing.pace == 3.0
    assert timing.spread == pytest.approx((52.0 - 1.5) / 2 / 3.0)


@pytest.mark.skipif(PeakMemory(torch.device("cpu")).read() is None, reason="this system does not count peaks anew")
def test_peak_memory_is_that_of_the_case_and_not_of_one_before() -> None:
    size = 256 << 20
    first = PeakMemory(torch.device("cpu"))
    block = torch.ones(size, dtype=torch.uint8)
    before = first.read()
    del block
    second = PeakMemory(torch.device("cpu"))
    small = second.read()
    assert before is not None
    assert small is not None
    assert before - small == pytest.approx(size, rel=0.2)  # what else the process gives back is far less
    torch.ones(size // 2, dtype=torch.uint8)
    assert second.read() - small == pytest.approx(size // 2, rel=0.2)  # type: ignore[operator]


def test_where_nobody_counts_memory_it_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: str) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no" / "clear_refs")
    assert PeakMemory(torch.device("cpu")).read() is None
    plan = Plan(tiny, ((64, 64),), 1, (Case(None), Case("sync", 2)), rounds=2, steps=1)
    peaks = [timing.peaks for timing in df.run_ranks(2, lambda comm: Bench(plan, comm).measure())[0]]
    assert peaks == [[None], [None, None]]


def test_sizes() -> None:
    assert parse_sizes([], None, None) == ((1024, 1024),)
    assert parse_sizes([], 512, None) == ((512, 1024),)
    assert parse_sizes(["768x1024", "512", "512X512"], None, None) == ((768, 1024), (512, 512))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--model", "nope"],
            "model 'nope' is neither a folder with a unet or transformer nor one of the shapes sdxl, sdxl-mini, sd15",
        ),
        (["--strategy", "fast"], "strategy='fast' must be one of 'sync', 'displaced', 'naive'"),
        (["--codec", "int3"], "codec='int3' must be one of 'fp16'"),
        (["--context-window", "2"], "context_window=2.0 must be None or a number from 0 to 1"),
        (["--balance", "2;1"], "balance='2;1' must be None, 'measured', or a positive number for each rank"),
        (["--balance", "2,1", "--world", "3"], "balance=2,1 has 2 weights for 3 ranks along the picture"),
        (["--patches", "two"], "patches='two' must be a whole number of at least 1"),
        (["--patches", "4"], "--patches 4 stream through transformers, and 'sdxl-mini' is none: take flux-mini, pix"),
        (["--patch", "2"], "--patch is of strategy='pipelined': give --strategy pipelined too, or leave it out"),
        (["--strategy", "pipelined", "--patch", "0"], "patch=0 must be a whole number of at least 1"),
        (
            ["--strategy", "pipelined", "--patch", "2", "--world", "3"],
            "a world of 3 does not fit cfg=1 x pipe=any x pa",
        ),
        (["--strategy", "pipelined", "--stride", "3"], "stride=3 must be 1 or 2"),
        (["--strategy", "pipelined", "--stride", "2", "--patch", "2"], "stride=2 does not go with patch=2"),
        (["--model", "vae-mini", "--stride", "2"], "--stride is about stages of a denoiser, and 'vae-mini' is a VAE's"),
        (["--blocks", "freed"], "blocks='freed' goes with strategy='pipelined' and patches only"),
        (["--model", "vae-mini", "--compile"], "--compile is about denoisers, and 'vae-mini' is a VAE's decode"),
        (["--world", "1", "--at-once"], "--at-once is about several ranks, and the only --world is 1: name another"),
        (["--world", "0"], "--world 0 must be at least 1"),
        (["--height", "100"], "--height 100 must be a multiple of 8"),
        (["--size", "512", "--size", "512x100"], "--width 100 must be a multiple of 8"),
        (["--size", "512x"], "--size '512x' must be pixels as HEIGHTxWIDTH, such as 768x1024, or one number"),
        (["--size", "1x2x3"], "--size '1x2x3' must be pixels as HEIGHTxWIDTH"),
        (["--size", "512", "--height", "512"], "--size names height and width: leave out --height and --width"),
        (["--size", "16x64", "--world", "3"], "2 rows of latent cannot be split over 3 ranks"),
        (["--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--dtype", "int8"], "--dtype 'int8' must be one of float32, bfloat16, float16"),
        (["--cuda-graphs"], "cuda_graphs=True needs device='cuda', not 'cpu'"),
        (["--device", "tpu"], "device='tpu' must be one of 'cpu', 'cuda', 'xpu'"),
        (["--plot", "picture.pdf"], "--plot 'picture.pdf' must end in .png"),
        (["--trace", "nowhere/trace.json"], "--trace 'nowhere/trace.json': there is no folder 'nowhere'"),
        (["--trace", "folder.json"], "--trace 'folder.json' is a folder: name a file"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    said: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    assert run(["bench", *arguments]) == 2
    out, err = capfd.readouterr()
    assert (out, len(err.strip().splitlines())) == ("", 1)
    assert said in err


def test_without_matplotlib_a_plot_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    assert run(["bench", "--plot", str(tmp_path / "x.png")]) == 2
    assert capfd.readouterr().err == (
        "error: --plot needs matplotlib, which is not installed: pip install 'distrifusion[plot]'\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_plot_is_a_picture_with_a_panel_for_each_size(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    sizes = ((512, 512), (1024, 1024))
    widths = []
    for shown in (sizes[:1], sizes):
        plan = Plan(
            "sdxl-mini",
            shown,
            1,
            cases_for(["sync", "displaced"], [1, 2, 4], 4, at_once=True, compiled=True, products=True),
        )
        timings = [
            Timing(case, size, [1.0 / max(case.world, case.threads)], [1.0], [0.0])
            for size in shown
            for case in plan.cases
        ]
        path = tmp_path / f"{len(shown)}.png"
        plot.draw(json.loads(json.dumps(summary(plan, timings, "gloo", "torch"))), path)
        with Image.open(path) as image:
            image.verify()
            widths.append(image.size[0])
    assert widths[1] > 1.5 * widths[0]


def test_alone_the_command_starts_its_ranks_and_writes_the_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    words = [*DISTRIFUSION, *SHORT, "--world", "2", "--strategy", "displaced", "--json", "--trace", str(trace)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    rows = json.loads(done.stdout)["cases"]
    assert [(row["strategy"], row["world"]) for row in rows if row["strategy"]] == [("displaced", 2)]
    ranks = json.loads(trace.read_text())["otherData"]["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert list(tmp_path.iterdir()) == [trace]


@pytest.mark.parametrize("name", [SWITCH, "DISTRIFUSION_SHARED_MEMORY"])
def test_a_bad_variable_is_refused_before_ranks_start(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "yes")
    with pytest.raises(df.ConfigError, match=f"{name}='yes' must be 0"):
        start.run(Plan("sdxl-mini", ((64, 64),), 1, (Case(None),)))


def of_torchrun(monkeypatch: pytest.MonkeyPatch, **given: Any) -> list[Any]:
    """What `command._joined` gives, or raises, on two ranks; test_cli.py starts torchrun itself."""
    mine = threading.local()
    monkeypatch.setattr(joined, "connect", lambda *_: mine.comm)
    monkeypatch.setattr(joined, "SPEAK", 0.0)
    lists: dict[str, Any] = {
        name: [] for name in ("worlds", "strategies", "codecs", "patches", "stage_ranks", "strides")
    }
    unset = dict.fromkeys(("context_window", "balance", "blocks", "height", "width", "plot", "trace"))
    unset |= dict.fromkeys(("cuda_graphs", "at_once", "compiled", "products"), False)
    short: dict[str, Any] = {"sizes": ["64"], "batch": 1, "rounds": 1, "steps": 1, "dtype": "float32", "device": "cpu"}
    order = command.Order(**{**lists, **unset, **short, **given})

    def rank(comm: Comm) -> Any:
        mine.comm = comm
        try:
            return command._joined(order, quiet=True)
        except (df.ConfigError, SystemExit) as failure:
            return failure

    return df.run_ranks(2, rank)


def test_under_torchrun_the_given_ranks_join(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = of_torchrun(monkeypatch, model=tiny, strategies=["sync"])
    assert second is None  # rank 0 alone speaks
    assert [row["world"] for row in first.summary["cases"] if row["strategy"]] == [1, 2]


def test_a_world_that_torchrun_has_not_started_is_refused_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = of_torchrun(monkeypatch, model="sdxl-mini", worlds=[3])
    assert str(first) == "--world 3 where torchrun has started 2 ranks: start more"
    assert isinstance(second, SystemExit)


def test_unknown_shape_is_refused_by_name() -> None:
    with pytest.raises(df.ConfigError, match="sdxxl"):
        check_name("sdxxl")
