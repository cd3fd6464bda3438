"""What only videos have: sizes that do not fit, tokens beside those of the video, times of tokens, two images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import distrifusion as df
import models
import transformers_video
from distrifusion.exchange import Absent
from distrifusion.geometry import Levels, Split
from distrifusion.layers import Frame
from distrifusion.layers.tokens import Tokens, own_tokens
from models import distance
from test_transformers import EXACT, first, on_ranks, one_device
from transformers_joint import JOINT
from transformers_tiny import Tiny, build, noise
from transformers_video import FRAMES, IMAGE, VIDEO, wan

SYNC = df.ParallelConfig(strategy="sync")
BY_FRAMES = df.ParallelConfig(strategy="sync", split="frames")

Change = Callable[[dict[str, Any]], dict[str, Any]]


def _cut_latents(*sides: slice) -> Change:
    """Fewer frames, rows or columns of latents: of ``hidden_states``' last dims."""
    return lambda arguments: {"hidden_states": arguments["hidden_states"][(..., *sides)]}


EVERYTHING = slice(None)
REFUSED: dict[str, tuple[str, Change, str]] = {
    "rows that do not fit": ("wan", _cut_latents(slice(7), EVERYTHING), "3 frames of 7 x 10 .* patches of 1 x 2 x 2"),
    "columns that do not fit": ("cogvideox-5b", _cut_latents(slice(9)), "3 frames of 14 x 9 .* patches of 1 x 2 x 2"),
    "frames that do not fit": (
        "hunyuan-video",
        _cut_latents(slice(5), EVERYTHING, EVERYTHING),
        "5 frames of 14 x 10 .* patches of 2 x 2 x 2",
    ),
    "no sizes": (
        "ltx",
        lambda arguments: {"num_frames": None, "height": None, "width": None, "video_coords": torch.zeros(1, 3, 105)},
        "asks for num_frames, height and width of its 105 tokens: num_frames=None",
    ),
    "tokens of conditions": (
        "ltx",
        lambda arguments: {"hidden_states": torch.cat([noise(1, 35, 4), arguments["hidden_states"]], 1)},
        "its 140 tokens: num_frames=3, height=7, width=5 are not",
    ),
    "too few times": ("wan-token-times", lambda arguments: {"timestep": torch.ones(1, 35)}, "35 tokens cannot hold"),
    "too few positions": (
        "cogvideox-5b",
        lambda arguments: {"image_rotary_emb": tuple(part[:35] for part in arguments["image_rotary_emb"])},
        "35 tokens cannot hold the 105 of the picture",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what: str) -> None:
    name, change, message = REFUSED[what]
    arguments = VIDEO[name].arguments(1, 7, 5)
    with pytest.raises((df.ConfigError, df.UnsupportedModel), match=message):
        on_ranks(name, 2, SYNC, {**arguments, **change(arguments)})


def _of_frames(monkeypatch: pytest.MonkeyPatch, name: str, batch: int) -> dict[str, Any]:
    """Five frames of tokens, but where positions are learned for three."""
    monkeypatch.setattr(transformers_video, "FRAMES", FRAMES if name == "cogvideox-5b-image" else 5)
    return VIDEO[name].arguments(batch, 7, 5)


@pytest.mark.parametrize("name", VIDEO)
@pytest.mark.parametrize(("world", "batch"), [(2, 1), (3, 2), (4, 2), (5, 1)])
def test_split_by_frames_equals_one_device(monkeypatch: pytest.MonkeyPatch, name: str, world: int, batch: int) -> None:
    """Five frames do not divide by any world but 5; the first frame, which some models treat apart, is of rank 0."""
    arguments = _of_frames(monkeypatch, name, batch)
    truth = one_device(name, arguments)
    if name == "cogvideox-5b-image" and world > 3:
        with pytest.raises(df.ConfigError, match=f"3 frames of tokens cannot be split over {world} ranks: the largest"):
            on_ranks(name, world, BY_FRAMES, arguments)
        return
    for (result,) in on_ranks(name, world, BY_FRAMES, arguments):
        assert result.shape == truth.shape
        assert distance(result, truth) <= EXACT


@pytest.mark.parametrize("name", VIDEO)
def test_split_by_frames_needs_the_other_frames(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    arguments = _of_frames(monkeypatch, name, 1)
    naive = df.ParallelConfig(strategy="naive", split="frames")
    assert distance(on_ranks(name, 2, naive, arguments)[0][0], one_device(name, arguments)) > 1000 * EXACT


@pytest.mark.parametrize("name", VIDEO)
def test_displaced_frames_with_a_held_input_equal_sync(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    arguments = _of_frames(monkeypatch, name, 2)
    truth = one_device(name, arguments)

    def rank(comm: Any, cfg: int) -> Any:
        config = df.ParallelConfig(strategy="displaced", warmup_steps=0, split="frames", cfg=cfg)
        model = df.parallelize(build(VIDEO[name]), config, comm)
        return [first(model(**arguments)) for _ in range(3)], df.report(model)

    for cfg, world in ((1, 3), (2, 4)):
        for results, report in df.run_ranks(world, lambda comm, cfg=cfg: rank(comm, cfg)):
            assert report.kinds == ["sync", "displaced", "displaced"]
            assert all(distance(result, truth) <= EXACT for result in results)
            assert max(report.messages[1:]) <= 8
            assert report.split == "frames"


@pytest.mark.parametrize("what", ["sd3", "sd15"])
def test_split_by_frames_is_refused_for_pictures(what: str) -> None:
    model = build(JOINT["sd3"]) if what == "sd3" else models.build("sd15")
    with pytest.raises(df.UnsupportedModel, match=r"split='frames' is for models of videos, not for .*: use 'rows'"):
        df.run_ranks(2, lambda comm: df.parallelize(model, BY_FRAMES, comm))


def test_patches_that_are_not_square_are_refused() -> None:
    def rank(comm: Any) -> Any:
        model = df.parallelize(build(Tiny(lambda: wan(patch_size=(1, 2, 1)), VIDEO["wan"].arguments)), SYNC, comm)
        return model(**VIDEO["wan"].arguments(1, 7, 5))

    with pytest.raises(df.UnsupportedModel, match="patches of 2 x 1 is not known: only square ones"):
        df.run_ranks(2, rank)


def test_a_map_of_another_size_is_refused() -> None:
    levels = Levels((Split((0, 4, 8)), Split((0, 2, 4))), (6, 3))
    frame = Frame(0, 2, levels, Absent(0), third=2)
    whole = noise(1, 5, 2, 4, 3)
    assert torch.equal(own_tokens(whole, Tokens(2, is_map=True), frame), whole[..., :2, :])
    with pytest.raises(df.UnsupportedModel, match=r"a map of \(2, 4, 2\) tokens is not one of \(2, 4, 3\)"):
        own_tokens(whole[..., :2], Tokens(2, is_map=True), frame)


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_one_time_for_all_tokens_may_be_a_column(name: str) -> None:
    arguments = {**VIDEO[name].arguments(2, 7, 5), "timestep": torch.tensor([[321.0], [123.0]])}
    for (result,) in on_ranks(name, 3, SYNC, arguments):
        assert distance(result, one_device(name, arguments)) <= EXACT


def test_coordinates_may_be_given_beside_the_sizes() -> None:
    arguments = {**VIDEO["ltx"].arguments(2, 7, 5), "video_coords": 100 * noise(2, 3, 105)}
    for (result,) in on_ranks("ltx", 3, SYNC, arguments):
        assert distance(result, one_device("ltx", arguments)) <= EXACT


def test_wan_between_two_images() -> None:
    """Two images for each video, one after the other in the batch."""
    seen = {"in_channels": 12, "image_dim": IMAGE[1], "added_kv_proj_dim": 24, "pos_embed_seq_len": 2 * IMAGE[0]}
    tiny = Tiny(lambda: wan(patch_size=(2, 2, 2), **seen), VIDEO["wan-image"].arguments)
    arguments = {**tiny.arguments(2, 7, 5), "encoder_hidden_states_image": noise(4, *IMAGE)}
    truth = first(build(tiny)(**arguments))

    def rank(comm: Any, config: df.ParallelConfig) -> Any:
        return first(df.parallelize(build(tiny), config, comm)(**arguments))

    for world, config in ((3, SYNC), (2, replace(SYNC, cfg=2)), (4, replace(SYNC, cfg=2))):
        for result in df.run_ranks(world, lambda comm, config=config: rank(comm, config)):
            assert distance(result, truth) <= EXACT
