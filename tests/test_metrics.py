"""The report: what ran, as a line and as JSON."""

import json

import pytest

from distrifusion.metrics import Report, Tally, human_bytes


def a_report() -> Report:
    report = Report("displaced", "cfg 1 x patch 2", patches=(8, 7))
    report.step("sync", 9.0, 65, 1000)
    report.step("sync", 8.0, 65, 1000)
    for seconds in (0.5, 0.2, 0.3):
        report.step("displaced", seconds, 5, 2048)
    return report


def test_json_gives_the_medians_of_the_prevailing_kind_of_step() -> None:
    facts = json.loads(json.dumps(a_report().as_dict()))
    assert facts == {
        "strategy": "displaced",
        "mesh": "cfg 1 x patch 2",
        "split": "rows",
        "patches": [8, 7],
        "balance": "even",
        "steps": {"sync": 2, "displaced": 3},
        "seconds_per_step": 0.3,
        "messages_per_step": 5,
        "bytes_per_step": 2048,
        "slot_bytes": 0,
        "vae": {},
        "notes": [],
    }


def test_the_line_says_the_same() -> None:
    report = a_report()
    report.notes.append("patches of 2 ranks are empty at level 3")
    assert report.line() == (
        "strategy displaced | mesh cfg 1 x patch 2 | rows per rank 8+7 | steps 2 sync + 3 displaced | 0.300 s/step | "
        "2.0 KiB and 5 messages sent per step and rank | patches of 2 ranks are empty at level 3"
    )


@pytest.mark.parametrize(
    ("balance", "text"),
    [
        ("even", "rows per rank 8+7 |"),
        ("measured", "rows per rank 8+7 (measured) |"),
        ("8,7", "rows per rank 8+7 (weights 8,7) |"),
    ],
)
def test_the_line_says_what_the_rows_follow(balance: str, text: str) -> None:
    report = a_report()
    report.balance = balance
    assert text in report.line()
    assert report.as_dict()["balance"] == balance


def test_the_line_says_how_much_memory_the_slots_take() -> None:
    report = a_report()
    report.slot_bytes = 4096
    assert report.line().endswith("2.0 KiB and 5 messages sent per step and rank | slots 4.0 KiB")
    assert report.as_dict()["slot_bytes"] == 4096


def test_a_vae_is_counted_apart() -> None:
    report = a_report()
    report.vae["decode"] = Tally().and_one(0.25, 5, 1000).and_one(0.5, 5, 48)
    assert report.as_dict()["vae"] == {"decode": {"calls": 2, "seconds": 0.75, "messages": 10, "bytes": 1048}}
    assert (report.as_dict()["messages_per_step"], report.as_dict()["bytes_per_step"]) == (5, 2048)
    assert report.line().endswith(
        "2.0 KiB and 5 messages sent per step and rank | decode 0.750 s, 1.0 KiB and 10 messages sent"
    )


def test_a_report_without_steps_is_still_a_line() -> None:
    report = Report("none", "cfg 1 x patch 1")
    assert report.as_dict()["seconds_per_step"] is None
    assert "steps none | - s/step" in report.line()


def test_a_copy_is_left_alone_by_later_steps() -> None:
    report = a_report()
    copy = report.copy()
    report.step("displaced", 1.0, 1, 1)
    report.notes.append("later")
    report.vae["decode"] = Tally(1)
    assert (len(copy.kinds), len(copy.seconds), copy.notes) == (5, 5, [])
    assert copy == a_report()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1.5 * 2**20, "1.5 MiB"),
        (3 * 2**30, "3.00 GiB"),
        (5000 * 2**30, "5000.00 GiB"),
    ],
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert human_bytes(count) == text


def test_stages_stand_where_patches_would() -> None:
    report = Report("pipelined", "cfg 1 x pipe 2 x patch 1", stages=(("a", "b"), ("c",)))
    assert "modules per rank 2+1" in report.line()
    assert json.loads(json.dumps(report.as_dict()))["stages"] == [["a", "b"], ["c"]]
