"""Moments against float64: exact over uneven patches, no cancellation, and the paper's correction term by term."""

import pytest
import torch
from torch import Tensor

from distrifusion import moments
from distrifusion.moments import CARRY, MOST, SWERVE, Ahead, Shares, carry, combine, correct, measure


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def truth(groups: Tensor) -> tuple[Tensor, Tensor]:
    groups = groups.double()
    return groups.mean(1), groups.var(1, unbiased=False)


def close(value: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    return bool(((value.double() - wanted).abs() <= tolerance * wanted.abs().clamp(min=1.0)).all())


def test_the_layout_is_count_means_variances() -> None:
    packed = measure(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
    assert packed.tolist() == [2.0, 2.0, 5.0, 1.0, 0.0]
    assert packed.dtype == torch.float32


def test_a_large_patch_is_measured_in_chunks_of_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = noise(7, 50) * torch.arange(1.0, 8.0)[:, None] + 3
    at_once = measure(groups)
    for chunk in (1, 100, 120, 10_000):
        monkeypatch.setattr(moments, "CHUNK", chunk)
        assert torch.equal(measure(groups), at_once)


@pytest.mark.parametrize("cuts", [(12,), (5, 7), (1, 10, 1), (0, 12), (3, 0, 9), (4, 4, 4)])
@pytest.mark.parametrize("shift", [0.0, -7.0, 1e3])
def test_uneven_and_empty_patches_combine_exactly(cuts: tuple[int, ...], shift: float) -> None:
    groups = 2 * noise(3, 12) + shift
    mean, var = combine([measure(part) for part in groups.split(list(cuts), dim=1)])
    wanted_mean, wanted_var = truth(groups)
    assert close(mean, wanted_mean)
    assert close(var, wanted_var, 1e-4 if shift == 1e3 else 1e-5)  # float32 means of 1e3 are 6e-5 apart


def test_patches_that_differ_much_combine_exactly() -> None:
    parts = [noise(2, 5), noise(2, 9, seed=1) * 1e-3 + 40, noise(2, 2, seed=2) * 30 - 500]
    mean, var = combine([measure(part) for part in parts])
    wanted_mean, wanted_var = truth(torch.cat(parts, 1))
    assert ((mean.double() - wanted_mean).abs() <= 1e-5 * wanted_mean.abs()).all()
    assert ((var.double() - wanted_var).abs() <= 1e-5 * wanted_var).all()


def test_the_variance_is_biased_as_in_torch() -> None:
    _, var = combine([measure(torch.tensor([[0.0, 2.0]]))])
    assert var.tolist() == [1.0]


def test_a_large_mean_does_not_swallow_the_variance() -> None:
    groups = noise(2, 4096) + 1e3
    mean, var = combine([measure(groups[:, :1000]), measure(groups[:, 1000:])])
    wanted_mean, wanted_var = truth(groups)
    assert ((mean.double() - wanted_mean).abs() / wanted_mean <= 1e-6).all()
    assert ((var.double() - wanted_var).abs() / wanted_var <= 1e-4).all()
    naive = (groups * groups).mean(1) - groups.mean(1) ** 2
    assert ((naive.double() - wanted_var).abs() / wanted_var).max() > 1e-3  # what this guards against


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_measured_in_float32(dtype: torch.dtype) -> None:
    groups = (300 * noise(2, 64)).to(dtype)  # squares overflow float16
    packed = measure(groups)
    assert packed.dtype == torch.float32
    mean, var = combine([packed])
    wanted_mean, wanted_var = truth(groups)
    assert ((mean.double() - wanted_mean).abs() <= 1e-4).all()
    assert ((var.double() - wanted_var).abs() / wanted_var <= 1e-5).all()


def paper(now: Tensor, before: Tensor, before_all: Tensor) -> tuple[Tensor, Tensor]:
    """DistriFusion, section 4, in float64 by raw moments, as written there."""
    now, before, before_all = now.double(), before.double(), before_all.double()
    first = before_all.mean(1) + now.mean(1) - before.mean(1)
    second = (before_all**2).mean(1) + (now**2).mean(1) - (before**2).mean(1)
    var = second - first**2
    return first, torch.where(var < 0, now.var(1, unbiased=False), var)


def ahead_of(own: list[Tensor], others: list[list[Tensor]]) -> list[Ahead]:
    each, peers = torch.stack(own), torch.stack([torch.stack(part) for part in others])
    return Ahead.all_of(each, peers, Shares.of(each, peers))


def corrected(now: Tensor, before: Tensor, peers: list[Tensor]) -> tuple[Tensor, Tensor]:
    own, others = measure(before), [measure(part) for part in peers]
    return correct(measure(now), ahead_of([own], [others])[0])


@pytest.mark.parametrize("shift", [0.0, 5.0])
@pytest.mark.parametrize("drift", [0.0, 0.1, 1.0])
def test_the_correction_is_the_papers(drift: float, shift: float) -> None:
    before = noise(3, 40) + shift
    now = before + drift * noise(3, 40, seed=1)
    peers = [noise(3, 40, seed=2) * 1.5 + shift, torch.empty(3, 0), noise(3, 20, seed=3) - 0.5]
    mean, var = corrected(now, before, peers)
    wanted_mean, wanted_var = paper(now, before, torch.cat([before, *peers], 1))
    assert close(mean, wanted_mean)
    assert close(var, wanted_var)


def test_held_input_is_corrected_to_the_exact_moments() -> None:
    own, peers = noise(3, 30), [noise(3, 50, seed=1) + 2]
    mean, var = corrected(own, own, peers)
    wanted_mean, wanted_var = truth(torch.cat([own, *peers], 1))
    assert close(mean, wanted_mean)
    assert close(var, wanted_var)


def test_a_negative_variance_falls_back_to_the_own() -> None:
    before = noise(1, 50) * 3
    now, peers = noise(1, 50, seed=1) * 0.1, [noise(1, 50, seed=2) * 0.1]
    # The own patch was wide and has become narrow, but its weight in the old sum is only a half.
    mean, var = corrected(now, before, peers)
    wanted_mean, wanted_var = paper(now, before, torch.cat([before, *peers], 1))
    raw = (torch.cat([before, *peers], 1) ** 2).mean() + (now**2).mean() - (before**2).mean() - wanted_mean**2
    assert raw.item() < 0  # the case in hand
    assert close(mean, wanted_mean)
    assert close(var, wanted_var)
    assert var.item() == pytest.approx(now.var(unbiased=False).item(), rel=1e-5)


def test_a_variance_below_the_own_patchs_part_falls_back_to_the_own() -> None:
    # The peer is of one colour, so the old sum is half of the own variance; that has since become nearly as small.
    colours, peers = torch.linspace(-1, 1, 50)[None], [torch.zeros(1, 50)]
    before, now = colours, colours * 0.71
    raw = (torch.cat([before, *peers], 1) ** 2).mean() + (now**2).mean() - (before**2).mean()
    own = now.var(unbiased=False).item()
    assert 0 < raw.item() < 0.1 * own  # positive, and less than the half that the own patch is of the picture
    mean, var = corrected(now, before, peers)
    assert mean.item() == pytest.approx(0, abs=1e-6)
    assert var.item() == pytest.approx(own, rel=1e-5)


def test_a_variance_that_is_the_own_patchs_part_stays() -> None:
    own, peers = noise(3, 30), [torch.zeros(3, 60)]
    own -= own.mean(1, keepdim=True)
    _, var = corrected(own, own, peers)
    assert close(var, truth(torch.cat([own, *peers], 1))[1])


def test_several_norms_at_a_time_are_as_each_by_itself() -> None:
    before = [noise(3, 10 * i, seed=i) + i for i in (1, 2, 3)]
    peers = [[measure(noise(3, 4 * i, seed=10 * i + j) - j) for j in (0, 1)] for i in (1, 2, 3)]
    now = [measure(part * 0.9) for part in before]
    together = ahead_of([measure(part) for part in before], peers)
    for part, own, others, ahead in zip(now, before, peers, together, strict=True):
        assert torch.equal(correct(part, ahead), correct(part, ahead_of([measure(own)], [others])[0]))


def test_an_empty_patch_is_corrected_to_the_peers_moments() -> None:
    nothing, peers = torch.empty(2, 0), [noise(2, 30), noise(2, 10, seed=1) + 4]
    mean, var = corrected(nothing, nothing, peers)
    wanted_mean, wanted_var = truth(torch.cat(peers, 1))
    assert close(mean, wanted_mean)
    assert close(var, wanted_var)


def test_carried_moments_of_a_held_input_are_exact() -> None:
    own, peers = measure(noise(3, 30)), [measure(noise(3, 50, seed=1) + 2), measure(noise(3, 7, seed=2) * 3)]
    wanted = truth(torch.cat([noise(3, 30), noise(3, 50, seed=1) + 2, noise(3, 7, seed=2) * 3], 1))
    trail = own
    for _ in range(3):
        (mean, var), trail = carry(own, peers, trail)
        assert close(mean, wanted[0])
        assert close(var, wanted[1])


def scaled(x: Tensor, factor: float, shift: float) -> Tensor:
    centre = x.mean(1, keepdim=True)
    return (x - centre) * factor + centre + shift


@pytest.mark.parametrize(("factor", "shift"), [(0.7, 0.0), (1.3, 0.5), (0.9, -2.0)])
def test_carried_moments_first_move_the_peers_as_the_own_patch_moved(factor: float, shift: float) -> None:
    before, peers = noise(3, 40), [noise(3, 40, seed=1) * 1.5 + 1, noise(3, 20, seed=2) - 0.5]
    now = scaled(before, factor, shift)
    moved = [scaled(peer, factor**CARRY, CARRY * shift) for peer in peers]
    (mean, var), trail = carry(measure(now), [measure(part) for part in peers], measure(before))
    wanted_mean, wanted_var = truth(torch.cat([now, *moved], 1))
    assert close(mean, wanted_mean)
    assert close(var, wanted_var, 1e-4)  # SMALL beside variances of 1e-3
    assert all(torch.equal(*pair) for pair in zip(trail, map(measure, (now, before, *peers)), strict=True))


def test_carried_moments_go_on_as_they_went_and_swerve_with_the_own_patch() -> None:
    """Peers that kept their pace, and did half of what the own patch did beside its own, are known exactly."""
    own, peers = noise(3, 40), [noise(3, 40, seed=1) * 1.5 + 1, noise(3, 20, seed=2) - 0.5]
    owns = [own, scaled(own, 0.9, 0.1), scaled(own, 0.9 * 0.8, 0.1 + 0.5)]  # the last: 0.4 more, and 0.8 / 0.9 as wide
    paces = (0.95, -0.2), (1.1, 0.3)
    befores = [scaled(peer, *pace) for peer, pace in zip(peers, paces, strict=True)]
    nows = [
        scaled(peer, pace[0] ** 2 * (0.8 / 0.9) ** SWERVE, 2 * pace[1] + SWERVE * 0.4)
        for peer, pace in zip(peers, paces, strict=True)
    ]
    _, trail = carry(measure(owns[1]), [measure(peer) for peer in peers], measure(owns[0]))
    (mean, var), _ = carry(measure(owns[2]), [measure(peer) for peer in befores], trail)
    wanted_mean, wanted_var = truth(torch.cat([owns[2], *nows], 1))
    assert close(mean, wanted_mean)
    assert close(var, wanted_var, 1e-4)


def test_carried_moments_stay_a_variance_where_the_paper_falls_back() -> None:
    before, now, peers = noise(1, 50) * 3, noise(1, 50, seed=1) * 0.1, [measure(noise(1, 50, seed=2) * 0.1)]
    (_, var), _ = carry(measure(now), peers, measure(before))
    assert 0 < var.item() < 0.1
    flat = measure(torch.zeros(1, 50))
    (mean, var), _ = carry(flat, peers, flat)
    wanted_mean, wanted_var = truth(torch.cat([torch.zeros(1, 50), noise(1, 50, seed=2) * 0.1], 1))
    assert close(mean, wanted_mean)
    assert close(var, wanted_var)


def test_carried_variances_grow_to_twice_at_most() -> None:
    """A patch that was of one colour, and is not, says nothing of how others grow."""
    flat, now = torch.zeros(1, 50), noise(1, 50)
    (_, var), _ = carry(measure(now), [measure(noise(1, 50, seed=2))], measure(flat))
    wanted = truth(torch.cat([now, scaled(noise(1, 50, seed=2), MOST**0.5, 0.0)], 1))[1]
    assert abs(var.item() / wanted.item() - 1) < 0.05  # the peer's mean moves a little too
