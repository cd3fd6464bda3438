"""Ranks that are threads over shared weights paint what one device paints, from text that is encoded once."""

from typing import Any

import numpy as np
import pytest

from distrifusion.checkpoint import find
from distrifusion.compare.paint import Studio, twin
from distrifusion.compare.plan import Plan, cases_for
from distrifusion.pipeline import report
from tiny_pipeline import save_tiny_pipeline

CASES = {case.strategy: case for case in cases_for(["sync", "displaced", "naive"], [3], [4], [0], ["corrected"])}
ALONE = CASES["sync"].reference
BOTH = (0, 1)


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")
    plan = Plan("tiny", find(str(folder)), ("a lake", "hills"), tuple(CASES.values()), batch=2)
    return Studio(plan)


def test_pictures_and_latents_have_their_shapes(studio: Studio) -> None:
    found = studio.alone(ALONE, BOTH)
    assert found.pictures.shape == (2, 32, 32, 3)
    assert found.latents.shape == (4, 2, 4, 16, 16)
    assert found.pictures.dtype == found.latents.dtype == np.float32
    assert 0 <= found.pictures.min() < found.pictures.max() <= 1


def test_sync_is_one_device_and_the_others_are_not(studio: Studio) -> None:
    alone = studio.alone(ALONE, BOTH)
    apart = {}
    for name, case in CASES.items():
        found = studio.spread(case, BOTH)
        assert found.patches == (6, 4, 6) or sum(found.patches) == 16
        apart[name] = np.sqrt(((found.pictures - alone.pictures) ** 2).mean())
    assert apart["sync"] < 1e-5  # 100 dB
    assert apart["displaced"] > 1e-4
    assert apart["naive"] > 1e-4


def test_every_way_to_have_stages_paints_a_picture_of_its_own(studio: Studio) -> None:
    settings = {"stage_ranks": [None, 2], "strides": [1, 2], "time_shifts": [False, True]}
    cases = cases_for(["pipelined"], [4], [4], [0], ["corrected"], **settings)  # type: ignore[arg-type]
    assert len(cases) == 6  # no stride where stages have two ranks
    alone, found = studio.alone(ALONE, BOTH).pictures, []
    for case in cases:
        painted = studio.spread(case, BOTH)
        assert painted.patches == ((8, 8) if case.patch else ())
        found.append(painted.pictures)
    for i, pictures in enumerate(found):
        assert np.isfinite(pictures).all()
        # Two stages and four, of random weights, are 2e-5 apart; rounding is a tenth of that.
        assert all(np.abs(pictures - other).max() > 1e-5 for other in (alone, *found[:i])), cases[i].title


def test_a_batch_paints_what_its_prompts_paint_one_by_one(studio: Studio) -> None:
    both, second = studio.alone(ALONE, BOTH), studio.alone(ALONE, (1,))
    assert np.allclose(both.pictures[1], second.pictures[0], atol=1e-4)
    assert not np.allclose(both.pictures[0], both.pictures[1], atol=1e-2)


def test_the_text_is_encoded_once_for_all_ranks_and_cases(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, calls = studio._pipeline.text_encoder, []
    original = encoder.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(encoder, "forward", counted)
    studio._pipeline.encode_prompt._known.clear()
    for case in CASES.values():
        studio.spread(case, BOTH)
    studio.alone(ALONE, BOTH)
    assert len(calls) == 2  # the prompts and the empty one


def test_a_twin_shares_the_weights_and_nothing_that_changes(studio: Studio) -> None:
    pipeline = studio._pipeline
    double = twin(pipeline)
    assert double.unet is not pipeline.unet
    assert double.scheduler is not pipeline.scheduler
    assert double.vae is pipeline.vae
    for one, other in zip(pipeline.unet.parameters(), double.unet.parameters(), strict=True):
        assert one is other


def test_a_failed_task_leaves_clean_ranks(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    before = studio.spread(CASES["naive"], (0,)).pictures
    twins = list(studio._twins)
    with monkeypatch.context() as patched:
        patched.setattr(studio, "_call", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            studio.spread(CASES["naive"], (0,))
    assert all(report(pipeline).strategy == "none" for pipeline in twins)
    assert np.array_equal(studio.spread(CASES["naive"], (0,)).pictures, before)
