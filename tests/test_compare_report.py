"""The report: one file that fetches nothing, with other people's text escaped; curves and difference maps."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distrifusion.compare.curve import curves
from distrifusion.compare.report import GAIN, heat_map, write_report
from distrifusion.compare.summary import case_summary, columns, notes_of, table, text_of, value_of

CASES = {"sync": (140.0, 1.02, 1e-7), "naive": (20.0, 3.5, 0.2)}


def found_in(folder: Path) -> dict[str, object]:
    """What metrics.json holds of two cases on two ranks, with their pictures in ``folder``."""
    rows = []
    for place, (name, (psnr, seam, drift)) in enumerate(CASES.items()):
        for case in ("one", name):
            (folder / case).mkdir(exist_ok=True)
            picture = np.full((32, 48, 3), 100 + (10 * place if case != "one" else 0), np.uint8)
            Image.fromarray(picture).save(folder / case / "000.png")
        result = {"index": 0, "name": "000.png", "is_identical": False, "psnr": psnr, "ssim": 0.9, "seam": seam}
        result |= {"seam_reference": 1.0, "drift": [drift, 2 * drift]}
        summary = case_summary([result], ["psnr", "ssim"])
        row = {"name": name, "title": f"{name} on 2", "steps": 2, "world": 2, "split": "rows", "patches": [2, 2]}
        rows.append({**row, "pictures": name, "reference": "one", **summary, "results": [result]})
    settings = {"model": "m", "height": 32, "width": 48, "guidance_scale": 2.5, "seed": 7, "dtype": "float32"}
    found = {
        "distrifusion": "0",
        "settings": {**settings, "prompts": ["<script>alert('a lake')</script>"]},
        "metrics": {
            "psnr": {"title": "PSNR dB", "better": "higher"},
            "ssim": {"title": "SSIM", "better": "higher"},
        },
        "left_out": {"flip": "flip is not installed", "frechet": "it takes two pictures or more"},
        "cases": rows,
    }
    return {**found, "notes": notes_of(found)}


def test_is_one_file_that_fetches_nothing_and_escapes_prompts(tmp_path: Path) -> None:
    write_report(found_in(tmp_path), tmp_path, 6)
    html = (tmp_path / "report.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)", html)
    assert "http" not in html
    assert "url(" not in html
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    assert html.count("data:image/webp") == 1 + 2 * 2  # the reference, and a picture and a map for each case
    assert html.count('class="border rows" style="top: 50.000%"') == 2
    assert html.count("<polyline") == 2
    assert 'name="viewport"' in html
    assert "flip left out: flip is not installed" in html
    assert "seed 7" in html
    assert '<td class="best">140.00</td>' in html
    assert '<td class="best">20.00</td>' not in html


def test_no_picture_is_shown_where_none_is_asked_for(tmp_path: Path) -> None:
    write_report(found_in(tmp_path), tmp_path, 0)
    assert "data:image" not in (tmp_path / "report.html").read_text()


def test_difference_maps_are_black_where_equal_and_full_at_a_quarter() -> None:
    one = np.full((2, 2, 3), 0.5, np.float32)
    other = one.copy()
    other[0, 0, 1] += 1 / GAIN
    found = heat_map(other, one) * 255
    assert found[1, 1].tolist() == [0, 0, 4]
    assert found[0, 0].tolist() == pytest.approx([252, 255, 164])


def test_curves_fall_on_a_logarithmic_axis() -> None:
    found = curves([("a", [1e-6, 1e-4, 1e-2]), ("b", [0.0, 0.0, 0.0]), ("c", [])])
    assert found is not None
    assert [line.name for line in found.lines] == ["a", "b"]
    points = [[float(part) for part in point.split(",")] for point in found.lines[0].points.split()]
    assert points[0][0] == found.left
    assert points[-1][0] == found.right
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1], abs=0.2)
    assert [tick.text for tick in found.columns] == ["1", "2", "3"]
    assert all(found.top <= y <= found.bottom for _, y in points)
    assert curves([]) is None
    assert curves([("c", [])]) is None


def test_means_are_of_all_pictures_or_none() -> None:
    results = [
        {"is_identical": True, "psnr": 150.0, "ssim": 1.0, "seam": 2.0, "seam_reference": 1.0, "drift": [0.0, 2.0]},
        {"is_identical": False, "psnr": 30.0, "ssim": None, "seam": 4.0, "seam_reference": 3.0, "drift": [0.0, 4.0]},
    ]
    found = case_summary(results, ["psnr", "ssim"])
    assert found["means"] == {"psnr": 90.0, "ssim": None, "seam": 3.0, "seam_reference": 2.0, "seam_relative": 1.5}
    assert (found["psnr_least"], found["num_identical"], found["drift"]) == (30.0, 1, [0.0, 3.0])


def test_columns_without_a_number_are_not_shown(tmp_path: Path) -> None:
    found = found_in(tmp_path)
    shown = [key for key, _ in columns(found)]
    assert shown == ["psnr", "psnr_least", "ssim", "seam", "seam_relative", "drift_last"]
    row = found["cases"][1]  # type: ignore[index]
    assert [text_of(key, value_of(row, key)) for key in shown] == ["20.00", "20.00", "0.9000", "3.50", "3.50", "0.4"]
    assert len(table(found).columns) == 3 + len(shown)


def test_a_number_that_came_in_later_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    found = found_in(tmp_path)
    found["metrics"]["flip"] = {"title": "FLIP", "better": "lower"}  # type: ignore[index]
    assert any(note.startswith("flip is not known of pictures") for note in notes_of(found))
