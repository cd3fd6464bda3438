"""Statistics of group norm over several patches, in float32.

A patch's moments are one flat float32 tensor ``[1 + 2K]``, K = batch x groups: the number of elements behind each
mean, the K means, and the K biased variances. Packed, they travel as one message; they combine exactly over uneven
patches (Chan, Golub, LeVeque 1979) and without the cancellation of E[x^2] - E[x]^2. A model has dozens of norms with
few groups, so what counts here is the number of operations, not their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def measure(groups: Tensor) -> Tensor:
    """Moments ``[1 + 2K]`` of ``groups`` ``[K, elements]``, any float dtype; zeros for an empty patch."""
    num_groups, count = groups.shape
    if not count:
        return torch.zeros(1 + 2 * num_groups, dtype=torch.float32, device=groups.device)
    if groups.device.type == "cpu":
        step = max(CHUNK // count, 1)
        chunks = [groups] if step >= num_groups else torch.split(groups, step)
        parts = [part for chunk in chunks for part in _two_passes(chunk)]  # means and variances in turn
    else:
        var, mean = torch.var_mean(groups.float(), dim=1, correction=0)
        parts = [mean, var]
    return torch.cat([parts[0].new_full((1,), count), *parts[::2], *parts[1::2]])


CHUNK = 1 << 20  # elements whose deviations are held at a time, where the CPU computes: a picture's would double memory


def _two_passes(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances of ``groups``. torch's own var_mean is several times slower on a CPU."""
    values = groups.float()
    mean = values.mean(dim=1, keepdim=True)
    deviations = values - mean
    return mean.view(-1), deviations.square_().mean(dim=1)  # in place: half the memory to go through


def combine(parts: Sequence[Tensor]) -> Tensor:
    """Mean and biased variance ``[2, K]`` of all elements behind ``parts``, each ``[1 + 2K]``."""
    if len(parts) == 1:
        return _of(parts[0])
    packed = torch.stack(list(parts))
    num_groups = packed.shape[1] // 2
    counts, means, variances = torch.split(packed, [1, num_groups, num_groups], dim=1)  # [ranks, 1], [ranks, K] twice
    shares = counts / counts.sum()
    mean = (shares * means).sum(0)
    deviations = means - mean
    return torch.stack([mean, (shares * torch.addcmul(variances, deviations, deviations)).sum(0)])


class Shares(NamedTuple):
    """Of all elements, how many are behind each patch's moments: the same in every step of one layout."""

    others: Tensor  # [norms, ranks - 1, 1], in order of rank
    least: Tensor  # [norms, 1]: of the own patch, less what may be rounding. See `correct`

    @classmethod
    def of(cls, own: Tensor, others: Tensor) -> Shares:
        """Read off moments ``[norms, 1 + 2K]`` and ``[norms, ranks - 1, 1 + 2K]``."""
        counts = torch.cat([own[:, None, :1], others[..., :1]], 1)  # [norms, ranks, 1]
        shares = counts / counts.sum(1, keepdim=True)
        return cls(shares[:, 1:], ROUNDED * shares[:, 0])


class Ahead(NamedTuple):
    """What is known of a norm before the own patch of this step is. See `correct`."""

    mean: Tensor  # [K]: mean_i'
    move: Tensor  # [2K]: of the whole picture's mean, and of its variance, what the own patch does not tell
    twice: Tensor  # [K]: 2 sum_j s_j d_j
    least: Tensor  # [K]: of a variance, what the mean's change has no part in
    own_part: Tensor  # scalar: and how much the own variance of this step adds to it

    @classmethod
    def all_of(cls, own: Tensor, others: Tensor, shares: Shares) -> list[Ahead]:
        """For several norms at a time, from moments ``[norms, 1 + 2K]`` and ``[norms, ranks - 1, 1 + 2K]``."""
        was = own[:, 1:]  # [norms, 2K]
        apart = others[..., 1:] - was[:, None]
        weighted = shares.others * apart
        move = weighted.sum(1)
        between = (weighted.chunk(2, 2)[0] * apart.chunk(2, 2)[0]).sum(1)  # [norms, K]
        mean, var = move.chunk(2, 1)
        squares = mean * mean
        var.add_(between).sub_(squares)
        parts = was.chunk(2, 1)[0], move, 2 * mean, shares.least * squares, shares.least[:, 0]
        return [cls(*each) for each in zip(*(part.unbind() for part in parts), strict=True)]


def correct(own: Tensor, ahead: Ahead) -> Tensor:
    """DistriFusion's corrected asynchronous group norm (arXiv 2402.19481, section 4): mean and variance ``[2, K]``.

    The global moments of the step before, moved by the change of the own patch since then:
    M[x^k] = mean_j E_j[x^k]' + (E_i[x^k] - E_i[x^k]'), var = M[x^2] - M[x]^2, and the patch's own variance where that
    cannot be. Written with what others are ahead of the own patch, d_j = mean_j' - mean_i', the squares of the means
    cancel by hand, not in float32. With s_j, the shares of all elements: mean = mean_i + sum_j s_j d_j,
    var = var_i + sum_j s_j (var_j' - var_i' + d_j^2) - (sum_j s_j d_j)^2 + 2 (sum_j s_j d_j) (mean_i' - mean_i).
    The square takes away at most 1 - s_i of the sum of s_j d_j^2, so float32 holds what is left. But for the own
    moments of this step all of it is known when the words of the step before have come, for many norms at once.

    In the paper a variance cannot be negative. It cannot be below what the own patch alone adds to it either,
    n_i / n (var_i + (mean_i - mean)^2): divided by the root of less, the patch would be blown up.
    """
    now = own[1:]  # [2K]
    moved = now + ahead.move
    (now_mean, now_var), (_, var) = now.chunk(2), moved.chunk(2)
    var.addcmul_(ahead.twice, ahead.mean - now_mean)
    least = torch.addcmul(ahead.least, now_var, ahead.own_part)
    var.copy_(torch.where(var < least, now_var, var))
    return moved.view(2, -1)


ROUNDED = 0.99  # of the least variance: where the other patches are of one colour, sums in float32 may lie below it
CARRY = 0.75  # of the own change: that of other patches is alike, not equal
SWERVE = 0.5  # of what is new in the own change, where the last change of the others is known
MOST = 2.0  # times, that a variance is taken to grow or shrink in a step
SMALL = 1e-6  # of variances, so that a patch of one colour has a ratio


def carry(own: Tensor, others_before: Sequence[Tensor], trail: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[2, K]``, with the peers' moments carried on from the step before; and the next ``trail``.

    From step to step all patches lose noise together, each in its way. So another patch's mean is taken to move on as
    it moved last, and besides by `SWERVE` of what the own mean's change is more than its last one; logarithms of
    variances likewise. Then all combine as in a synchronous step. Where only one step before is known, the others move
    by `CARRY` of the own change. Always a variance, so nothing falls back; exact where the input is held. Not of the
    paper.

    Args:
        own: the own patch's moments ``[1 + 2K]`` of this step.
        others_before: the others', without the own, of the step before.
        trail: what was known in the step before: the own moments of it, ``[1 + 2K]``, or what this returned then.
    """
    others = torch.stack(list(others_before))  # [N - 1, 1 + 2K], new memory
    was = trail if trail.ndim == 1 else trail[0]
    following = torch.stack([own, was, *others])
    changes = _change(own, was)
    if trail.ndim == 1:
        mean, log = (CARRY * change for change in changes)
    else:
        last, others_last = _change(was, trail[1]), _change(others, trail[2:])
        mean, log = (on + SWERVE * (now - then) for on, now, then in zip(others_last, changes, last, strict=True))
    means, variances = _of(others).unbind(1)  # views
    means.add_(mean)
    variances.mul_(log.exp().clamp(1 / MOST, MOST))
    return combine([own, *others]), following


def _change(now: Tensor, was: Tensor) -> tuple[Tensor, Tensor]:
    """Of means, and of logarithms of variances, ``[..., K]`` from moments ``[..., 1 + 2K]``."""
    (mean, var), (mean_before, var_before) = _of(now).unbind(-2), _of(was).unbind(-2)
    return mean - mean_before, ((var + SMALL) / (var_before + SMALL)).log()


def _of(packed: Tensor) -> Tensor:
    """The means and variances ``[..., 2, K]`` in moments ``[..., 1 + 2K]``, shared."""
    return packed[..., 1:].view(*packed.shape[:-1], 2, -1)
