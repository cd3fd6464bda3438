"""The output folder appears whole or not at all, and nothing that is somebody else's is lost."""

import json
from pathlib import Path

import numpy as np
import pytest

import distrifusion as df
from distrifusion.compare.output import Output
from distrifusion.compare.plan import Case, as_facts
from distrifusion.compare.store import Store

SETTINGS = {"model": "m", "prompts": ["x"]}
CASE, OTHER = Case("sync", 2, 2), Case("naive", 2, 2)


def fill(output: Output, *cases: Case) -> None:
    """What a run does between `open` and `finish`."""
    rows = []
    for case in cases:
        numbers = {"index": 0, "psnr": 30.0}
        output.store.put_result(case, 0, np.zeros((4, 4, 3), np.float32), numbers)
        rows.append({**as_facts(case), "results": [numbers]})
    (output.part / "metrics.json").write_text(json.dumps({"settings": SETTINGS, "cases": rows}))
    (output.part / "report.html").write_text("new")


def finished(path: Path) -> Path:
    output = Output(path)
    output.open(SETTINGS)
    fill(output, CASE)
    output.finish([CASE])
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_appears_whole_and_holds_what_a_reader_wants_only(tmp_path: Path) -> None:
    output = Output(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []  # so far it was a question
    output.open(SETTINGS)
    fill(output, CASE, OTHER)
    assert not (tmp_path / "out").exists()
    output.finish([CASE])  # the other one was of an earlier run
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert names(tmp_path / "out") == ["metrics.json", f"pictures/{CASE.name}/000.png", "report.html"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert names(finished(tmp_path / "out"))


def test_a_folder_that_is_there_is_refused_or_replaced(tmp_path: Path) -> None:
    path = finished(tmp_path / "out")
    (path / "old").touch()
    with pytest.raises(df.ConfigError, match=r"is there and not empty.*--force to replace it or --add"):
        Output(path)
    output = Output(path, force=True)
    output.open(SETTINGS)
    fill(output, CASE)
    assert (path / "old").exists()  # until the very end
    output.finish([CASE])
    assert "old" not in names(path)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_comparison_is_not_replaced_even_by_force(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(df.ConfigError, match="no comparison"):
        Output(tmp_path, force=True)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for path, said in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "no" / "out", "there is no folder"),
        (Path("/"), "names no folder"),
    ):
        with pytest.raises(df.ConfigError, match=said):
            Output(path)

    def refuse(self: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)  # a mode would not stop root
    with pytest.raises(df.ConfigError, match=r"cannot be written to \(Permission denied\)"):
        Output(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_that_was_cut_off_is_gone_on_with(tmp_path: Path) -> None:
    output = Output(tmp_path / "out")
    output.open(SETTINGS)
    output.store.put_result(CASE, 0, np.zeros((4, 4, 3), np.float32), {"psnr": 30.0})
    output.discard()
    again = Output(tmp_path / "out")
    again.open(SETTINGS)
    assert again.store.result(CASE, 0) == {"psnr": 30.0}
    again.discard()
    with pytest.raises(df.ConfigError, match="holds results of model 'm', not 'n'"):
        Output(tmp_path / "out").open({**SETTINGS, "model": "n"})
    anew = Output(tmp_path / "out", force=True)
    anew.open({**SETTINGS, "model": "n"})
    assert anew.store.result(CASE, 0) is None
    anew.discard()


def test_a_run_that_did_nothing_leaves_nothing(tmp_path: Path) -> None:
    output = Output(tmp_path / "out")
    output.open(SETTINGS)
    output.discard()
    assert list(tmp_path.iterdir()) == []


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    first = Output(tmp_path / "out")
    first.open(SETTINGS)
    second = Output(tmp_path / "out", force=True)
    with pytest.raises(df.ConfigError, match="is being written by another run"):
        second.open(SETTINGS)
    second.discard()
    fill(first, CASE)
    first.finish([CASE])
    assert "report.html" in names(tmp_path / "out")


def test_cases_are_added_to_a_finished_folder(tmp_path: Path) -> None:
    path = finished(tmp_path / "out")
    with pytest.raises(df.ConfigError, match=r"holds no metrics\.json"):
        Output(tmp_path / "other", add=True)
    with pytest.raises(df.ConfigError, match="give one of them"):
        Output(path, add=True, force=True)
    with pytest.raises(df.ConfigError, match="results of prompts others"):
        Output(path, add=True).open({**SETTINGS, "prompts": ["y"]})
    output = Output(path, add=True)
    output.open(SETTINGS)
    assert output.cases() == [CASE]
    assert output.store.result(CASE, 0) == {"index": 0, "psnr": 30.0}
    fill(output, CASE, OTHER)
    output.finish([CASE, OTHER])
    assert {name.split("/")[1] for name in names(path) if name.startswith("pictures")} == {CASE.name, OTHER.name}


def test_references_are_kept_in_full_precision(tmp_path: Path) -> None:
    store, rng = Store(tmp_path), np.random.default_rng(0)
    picture, latents = rng.random((4, 6, 3)).astype(np.float32), rng.random((2, 4, 2, 3)).astype(np.float32)
    assert not store.has_reference(CASE.reference, 3)
    store.put_reference(CASE.reference, 3, picture, latents)
    found = store.reference(CASE.reference, 3)
    assert np.array_equal(found[0], picture)
    assert np.array_equal(found[1], latents)
    assert store.picture_path(CASE.reference, 3).is_file()
