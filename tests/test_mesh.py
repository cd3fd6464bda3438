"""Coordinates and peers on the named axes."""

import pytest

from distrifusion import ConfigError, ParallelConfig
from distrifusion.mesh import AXES, Mesh


@pytest.mark.parametrize(
    ("cfg", "patch", "world", "sizes"),
    [
        (1, None, 1, (1, 1, 1)),
        (1, None, 7, (1, 1, 7)),
        (2, None, 2, (2, 1, 1)),
        (2, None, 6, (2, 1, 3)),
        (2, 3, 6, (2, 1, 3)),
        (1, 5, 5, (1, 1, 5)),
    ],
)
def test_patch_takes_what_cfg_leaves(cfg: int, patch: int | None, world: int, sizes: tuple[int, ...]) -> None:
    mesh = Mesh.fit(ParallelConfig(cfg=cfg, patch=patch), world)
    assert mesh.sizes == sizes
    assert mesh.world == world
    assert [mesh.size(axis) for axis in AXES] == [*sizes, 1]


@pytest.mark.parametrize(
    ("cfg", "patch", "world", "message"),
    [
        (2, None, 3, r"a world of 3 does not fit cfg=2 x patch=any: start a multiple of 2 ranks"),
        (2, None, 1, r"a world of 1 does not fit cfg=2 x patch=any"),
        (1, 4, 3, r"a world of 3 does not fit cfg=1 x patch=4: start 4 ranks"),
        (2, 2, 8, r"a world of 8 does not fit cfg=2 x patch=2: start 4 ranks"),
        (2, 3, 1, r"a world of 1 does not fit cfg=2 x patch=3: start 6 ranks"),
    ],
)
def test_a_world_that_is_not_the_product_is_named(cfg: int, patch: int | None, world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mesh.fit(ParallelConfig(cfg=cfg, patch=patch), world)


@pytest.mark.parametrize(("cfg", "world", "num"), [(1, 2, 2), (1, 1, 1), (2, 4, 2), (2, 2, 1)])
def test_a_balance_has_a_weight_for_each_rank_along_the_picture(cfg: int, world: int, num: int) -> None:
    message = rf"balance=2,1,1 has 3 weights for {num} ranks along the picture: give one for each"
    with pytest.raises(ConfigError, match=message):
        Mesh.fit(ParallelConfig(cfg=cfg, balance=(2, 1, 1)), world)
    assert Mesh.fit(ParallelConfig(cfg=cfg, balance=(2, 1, 1)), 3 * cfg).sizes == (cfg, 1, 3)


def test_the_ranks_of_a_patch_group_are_consecutive() -> None:
    mesh = Mesh((2, 1, 3))
    assert mesh.groups("patch") == [[0, 1, 2], [3, 4, 5]]
    assert mesh.groups("cfg") == [[0, 3], [1, 4], [2, 5]]
    assert [(mesh.coordinate(rank, "cfg"), mesh.coordinate(rank, "patch")) for rank in range(6)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
    ]
    assert str(mesh) == "cfg 2 x patch 3"


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 5), (2, 1, 1), (2, 1, 4), (2, 3, 1), (2, 3, 2)])
def test_groups_of_each_axis_cover_the_world_once(sizes: tuple[int, ...]) -> None:
    mesh = Mesh(sizes)
    for axis in AXES:
        groups = mesh.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world))
        for group in groups:
            assert [mesh.coordinate(rank, axis) for rank in group] == list(range(mesh.size(axis)))


@pytest.mark.parametrize(
    ("cfg", "pipe", "world", "sizes"), [(1, None, 5, (1, 5, 1)), (2, None, 6, (2, 3, 1)), (2, 2, 4, (2, 2, 1))]
)
def test_stages_take_what_cfg_leaves(cfg: int, pipe: int | None, world: int, sizes: tuple[int, ...]) -> None:
    assert Mesh.fit(ParallelConfig(strategy="pipelined", cfg=cfg, pipe=pipe), world).sizes == sizes
    in_patches = ParallelConfig(strategy="pipelined", cfg=cfg, pipe=pipe, patch=2)
    assert Mesh.fit(in_patches, 2 * world).sizes == (*sizes[:2], 2)


def test_a_world_that_does_not_fit_the_stages_is_named() -> None:
    with pytest.raises(ConfigError, match=r"a world of 4 does not fit cfg=1 x pipe=3: start 3 ranks"):
        Mesh.fit(ParallelConfig(strategy="pipelined", pipe=3), 4)
    with pytest.raises(ConfigError, match=r"a world of 3 does not fit cfg=2 x pipe=any: start a multiple of 2 ranks"):
        Mesh.fit(ParallelConfig(strategy="pipelined", cfg=2), 3)


def test_the_ranks_of_a_branch_are_consecutive() -> None:
    mesh = Mesh((2, 3, 1))
    assert mesh.branches() == [[0, 1, 2], [3, 4, 5]]
    assert mesh.groups("pipe") == [[0, 1, 2], [3, 4, 5]]
    assert Mesh((2, 2, 2)).branches() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert Mesh((2, 2, 2)).groups("pipe") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert str(mesh) == "cfg 2 x pipe 3 x patch 1"


def test_slices_take_what_cfg_leaves() -> None:
    mesh = Mesh.fit(ParallelConfig(strategy="tensor", cfg=2), 6)
    assert [mesh.size(axis) for axis in AXES] == [2, 1, 1, 3]
    assert mesh.branches() == mesh.groups("tensor") == [[0, 1, 2], [3, 4, 5]]
    assert mesh.groups("cfg") == [[0, 3], [1, 4], [2, 5]]
    assert str(mesh) == "cfg 2 x patch 1 x tensor 3"
    with pytest.raises(ConfigError, match=r"a world of 3 does not fit cfg=2 x tensor=any: start a multiple of 2 ranks"):
        Mesh.fit(ParallelConfig(strategy="tensor", cfg=2), 3)
