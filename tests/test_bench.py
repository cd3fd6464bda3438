"""The benchmark measures what it says: cases, ratios, counts; and refuses what it cannot measure."""

import json

import pytest

import distrifusion as df
from distrifusion.bench.measure import Case, Plan, cases_for, measure, summary
from distrifusion.bench.workload import SHAPES, check_name, load
from distrifusion.cli import run


def test_cases_put_the_bare_model_first_and_one_rank_once() -> None:
    names = [(case.name, case.world) for case in cases_for(["sync", "displaced"], [1, 2], 4)]
    assert names == [("bare model", 1), ("bare model, 4 threads", 1), ("sync", 1), ("sync", 2), ("displaced", 2)]


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


def test_mini_shape_has_33_million_parameters() -> None:
    assert sum(p.numel() for p in load("sdxl-mini", 8, 8).model.parameters()) == pytest.approx(33e6, rel=0.01)


def test_measures_every_case_and_counts_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    # Smaller than any real shape: what is tested is the bookkeeping.
    tiny = {**SHAPES["sdxl-mini"], "block_out_channels": (32, 32, 32), "attention_head_dim": 1}
    monkeypatch.setitem(SHAPES, "tiny", tiny)
    plan = Plan("tiny", 16, 16, 1, cases_for(["sync", "displaced", "naive"], [1, 2, 3], 1), rounds=2, steps=2)
    found = summary(plan, df.run_ranks(3, lambda comm: measure(plan, comm))[0])
    rows = {(row["case"], row["world"]): row for row in found["cases"]}
    assert len(rows) == 1 + 1 + 3 + 3
    assert rows["bare model", 1]["speedup"] == 1.0
    for world in (2, 3):
        assert rows["naive", world]["messages_per_step"] == 1
        assert 1 < rows["displaced", world]["messages_per_step"] <= 8 < rows["sync", world]["messages_per_step"]
        assert rows["displaced", world]["bytes_per_step"] >= rows["sync", world]["bytes_per_step"] > 0
    for row in rows.values():
        assert row["seconds_per_step"] > 0
        assert row["share_of_linear"] == pytest.approx(row["speedup"] / row["world"], abs=2e-3)
    assert json.loads(json.dumps(found))["bench"]["model"] == "tiny"


def test_timing_is_the_median_and_the_quartiles() -> None:
    from distrifusion.bench.measure import Timing

    timing = Timing(Case("sync", 2), seconds=[1.0, 2.0, 3.0, 4.0, 100.0])
    assert timing.pace == 3.0
    assert timing.spread == pytest.approx((52.0 - 1.5) / 2 / 3.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--model", "nope"],
            "model 'nope' is neither a folder with a unet nor one of the shapes sdxl, sdxl-mini, sd15",
        ),
        (["--strategy", "fast"], "strategy='fast' must be one of 'sync', 'displaced', 'naive'"),
        (["--codec", "int3"], "codec='int3' must be one of 'fp16'"),
        (["--context-window", "2"], "context_window=2.0 must be None or a number from 0 to 1"),
        (["--world", "0"], "--world 0 must be at least 1"),
        (["--height", "100"], "--height 100 must be a multiple of 8"),
        (["--dtype", "int8"], "--dtype 'int8' must be one of float32, bfloat16, float16"),
        (["--device", "tpu"], "device='tpu' must be one of 'cpu', 'cuda', 'xpu'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", *arguments]) == 2
    out, err = capfd.readouterr()
    assert (out, len(err.strip().splitlines())) == ("", 1)
    assert said in err


def test_unknown_shape_is_refused_by_name() -> None:
    with pytest.raises(df.ConfigError, match="sdxxl"):
        check_name("sdxxl")
