"""What is compared: the product of the settings, each case once, and prompts that are there."""

from pathlib import Path

import pytest

import distrifusion as df
from distrifusion.checkpoint import find
from distrifusion.compare.plan import Case, Plan, as_facts, case_of, cases_for, fingerprint, read_prompts
from tiny_pipeline import save_tiny_pipeline


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")


def test_settings_multiply_the_cases_of_the_strategy_that_has_them_only() -> None:
    cases = cases_for(
        ["sync", "displaced", "naive"], [2, 4, 8], [25, 50], [0, 1, 2, 4], ["corrected", "stale", "separate", "sync"]
    )
    count = {name: sum(case.strategy == name for case in cases) for name in ("sync", "displaced", "naive")}
    assert count == {"sync": 3 * 2, "naive": 3 * 2, "displaced": 3 * 2 * 4 * 4}
    assert len({case.name for case in cases}) == len(cases) == len(set(cases))
    assert {case.reference for case in cases} == {Case(None, 25), Case(None, 50)}
    assert all(case.warmup_steps is None and case.group_norm is None for case in cases if case.strategy != "displaced")


def test_codecs_and_windows_multiply_what_sends_something() -> None:
    cases = cases_for(
        ["sync", "displaced", "naive"],
        [2],
        [25],
        [4],
        ["corrected"],
        codecs=[None, "int8", "1bit"],
        context_windows=[None, 0.3],
    )
    count = {name: sum(case.strategy == name for case in cases) for name in ("sync", "displaced", "naive")}
    assert count == {"sync": 6, "displaced": 6, "naive": 1}
    assert len({case.name for case in cases}) == len(cases)
    case = next(case for case in cases if (case.strategy, case.codec, case.context_window) == ("sync", "1bit", 0.3))
    assert case.name == "sync-2-ranks-25-steps-1bit-window-0.3"
    assert case.title == "sync on 2, 1bit, window 0.3"
    assert (case.config.codec, case.config.context_window) == ("1bit", 0.3)
    assert case_of(as_facts(case)) == case
    # As it was written before there were codecs.
    older = {name: value for name, value in as_facts(cases[0]).items() if name not in ("codec", "context_window")}
    assert case_of(older) == cases[0]


def test_what_is_asked_for_twice_is_done_once() -> None:
    assert len(cases_for(["sync", "sync"], [2, 2], [25, 25], [4], ["corrected"])) == 1


def test_a_case_says_all_of_itself_and_comes_back_from_json() -> None:
    (case,) = cases_for(["displaced"], [4], [25], [0], ["stale"], "cols", 2)
    assert case.name == "displaced-4-ranks-25-steps-warmup-0-stale-cols-cfg-2"
    assert case.title == "displaced on 4, warm-up 0, stale norm, cols, cfg 2"
    assert (case.config.warmup_steps, case.config.group_norm, case.config.cfg) == (0, "stale", 2)
    assert case_of({**as_facts(case), "means": {}}) == case


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strategies": ["best"]}, "strategy='best'"),
        ({"worlds": [0]}, "world=0"),
        ({"steps": [0]}, "steps=0"),
        ({"warmup_steps": [-1]}, "warmup_steps=-1"),
        ({"group_norms": ["odd"]}, "group_norm='odd'"),
        ({"strategies": ["sync"], "group_norms": ["odd"]}, "group_norm='odd'"),  # though sync has no such setting
        ({"split": "diagonal"}, "split='diagonal'"),
        ({"strategies": ["naive"], "codecs": ["int3"]}, "codec='int3'"),
        ({"strategies": ["naive"], "context_windows": [2.0]}, "context_window=2.0"),
        ({"shifts": ["silver"]}, "shift='silver'"),
        ({"overlaps": [-1]}, "overlap=-1"),
        ({"strategies": ["pipelined"], "patches": [0]}, "patches=0"),
        ({"strides": [3]}, "stride=3 must be 1 or 2"),
        ({"patches": [4], "time_shifts": [False, True]}, "time_shift=True does not go with patches=4"),
        ({"stage_ranks": [2], "strides": [1, 2]}, "stride=2 does not go with patch=2"),
    ],
)
def test_a_value_that_cannot_be_is_named(changes: dict[str, object], said: str) -> None:
    given = {"strategies": ["displaced"], "worlds": [2], "steps": [4], "warmup_steps": [4], "group_norms": ["stale"]}
    with pytest.raises(df.ConfigError, match=said):
        cases_for(**{**given, **changes})  # type: ignore[arg-type]


def test_only_shifted_is_multiplied_by_how_its_borders_move() -> None:
    cases = cases_for(["naive", "shifted"], [2], [4], [4], ["corrected"], shifts=["golden", 3], overlaps=[0, 2])
    assert [case.strategy for case in cases] == ["naive"] + ["shifted"] * 4
    assert {(case.config.shift, case.config.overlap) for case in cases[1:]} == {
        ("golden", 0),
        ("golden", 2),
        (3, 0),
        (3, 2),
    }
    assert len({case.name for case in cases}) == len({case.title for case in cases}) == 5
    assert [case_of(as_facts(case)) for case in cases] == list(cases)


def test_only_pipelined_is_multiplied_by_patches() -> None:
    cases = cases_for(["sync", "pipelined"], [2], [4], [1], ["corrected"], patches=[None, 2, 4])
    assert [case.config.patches for case in cases] == [None, None, 2, 4]
    assert cases[-1].name == "pipelined-2-ranks-4-steps-warmup-1-patches-4"
    assert len({case.title for case in cases}) == 4
    assert [case_of(as_facts(case)) for case in cases] == list(cases)


def test_stages_are_multiplied_by_what_goes_together() -> None:
    staged = {"patches": [None, 2], "stage_ranks": [None, 2], "strides": [1, 2], "time_shifts": [False, True]}
    cases = cases_for(["sync", "pipelined"], [4], [5], [1], ["corrected"], **staged)  # type: ignore[arg-type]
    plain, *late = [case.name.removeprefix("pipelined-4-ranks-5-steps-warmup-1") for case in cases[1:]]
    assert (plain, late) == (
        "",
        ["-time-shift", "-stride-2", "-stride-2-time-shift", "-patch-2", "-patch-2-time-shift", "-patches-2"],
    )
    configs = [case.config for case in cases[1:]]
    assert [(config.patch, config.stride, config.time_shift, config.patches) for config in configs] == [
        *((None, 1, False, None), (None, 1, True, None), (None, 2, False, None), (None, 2, True, None)),
        *((2, 1, False, None), (2, 1, True, None), (None, 1, False, 2)),
    ]
    assert len({case.title for case in cases}) == len(cases) == 8
    assert [case_of(as_facts(case)) for case in cases] == list(cases)


def test_prompts_come_from_a_file_the_options_or_along(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# a comment\n\n a lake \nhills\n")
    assert read_prompts(file, None, False, None) == ("a lake", "hills")
    assert read_prompts(file, None, False, 1) == ("a lake",)
    assert read_prompts(None, ["x", "y"], False, None) == ("x", "y")
    along = read_prompts(None, None, True, None)
    assert len(along) == len(set(along)) >= 50


def test_no_prompt_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# only a comment\n\n")
    for arguments, said in (
        ((file, None, True, None), "holds no prompt"),
        ((tmp_path / "nowhere", None, True, None), "cannot be read as text"),
        ((None, [" "], True, None), "holds no word"),
        ((None, None, False, None), "are for the bundled model"),
        ((file, ["x"], True, None), "give one of them"),
        ((None, ["x"], True, 0), "limit=0"),
    ):
        with pytest.raises(df.ConfigError, match=said):
            read_prompts(*arguments)  # type: ignore[arg-type]


def plan_for(tiny: Path, **changes: object) -> Plan:
    cases = cases_for(["sync"], [2], [2], [4], ["corrected"])
    return Plan(**{"model": "t", "checkpoint": find(str(tiny)), "prompts": ("x",), "cases": cases, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cases": cases_for(["sync"], [17], [2], [4], ["stale"])}, "16 rows of latent cannot be split over 17 ranks"),
        ({"cases": cases_for(["sync"], [3], [2], [4], ["stale"], cfg=2)}, "a world of 3 does not fit cfg=2"),
        ({"height": 31}, "height=31"),
        ({"batch": 0}, "batch=0"),
        ({"seed": -1}, "seed=-1"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    ],
)
def test_a_plan_that_cannot_be_painted_is_refused(tiny: Path, changes: dict[str, object], said: str) -> None:
    plan_for(tiny).check()
    with pytest.raises(df.ConfigError, match=said):
        plan_for(tiny, **changes).check()


def test_the_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(b"one")
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    (folder / "weights").write_bytes(b"two")
    changed = fingerprint(folder)
    (folder / "weights").rename(folder / "other")
    assert len({before, changed, fingerprint(folder)}) == 3


def test_settings_give_the_size_that_the_model_would_take(tiny: Path) -> None:
    settings = plan_for(tiny, width=64).settings()
    assert (settings["height"], settings["width"], settings["prompts"]) == (32, 64, ["x"])
