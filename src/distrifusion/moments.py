"""Statistics of group norm over several patches, in float32.

A patch's moments are one flat float32 tensor ``[1 + 2K]``, K = batch x groups: the number of elements behind each
mean, the K means, and the K sums of squared deviations from them (M2). Packed, they travel as one message; as (count,
mean, M2) they combine exactly over uneven patches (Chan, Golub, LeVeque 1979) and without the cancellation of E[x^2]
- E[x]^2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def measure(groups: Tensor) -> Tensor:
    """Moments ``[1 + 2K]`` of ``groups`` ``[K, elements]``, any float dtype; zeros for an empty patch."""
    num_groups, count = groups.shape
    if not count:
        return torch.zeros(1 + 2 * num_groups, dtype=torch.float32, device=groups.device)
    values = groups.float()
    mean = values.mean(dim=1)
    deviations = values - mean[:, None]
    return torch.cat([mean.new_full((1,), count), mean, torch.linalg.vecdot(deviations, deviations)])


def combine(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, each ``[K]``, of all elements behind ``parts``, each ``[1 + 2K]``."""
    counts, means, m2 = _fields(torch.stack(list(parts)))
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    deviations = means - mean
    return mean, torch.addcmul(m2, counts, deviations * deviations).sum(0) / total


def correct(own: Tensor, own_before: Tensor, before: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """DistriFusion's corrected asynchronous group norm (arXiv 2402.19481, section 4): mean and variance, each ``[K]``.

    The global moments of the step before (``before``, all patches), moved by the change of the own patch since then:
    M[x^k] = mean_j E_j[x^k]' + (E_i[x^k] - E_i[x^k]'), var = M[x^2] - M[x]^2, and the patch's own variance where that
    is negative. Written with means and variances the squares of the means cancel by hand, not in float32:
    var = var_i + (var' - var_i') + 2 (mean' - mean_i') (mean_i' - mean_i).
    """
    mean_all, var_all = combine(before)
    count, mean, m2 = _fields(own)
    count_before, mean_before, m2_before = _fields(own_before)
    var, var_before = m2 / count.clamp(min=1), m2_before / count_before.clamp(min=1)
    ahead = mean_all - mean_before  # of the whole picture over the own patch, in the step before
    corrected = torch.addcmul(var + (var_all - var_before), ahead, mean_before - mean, value=2)
    return mean + ahead, torch.where(corrected < 0, var, corrected)


CARRY = 0.75  # of the own change: that of other patches is alike, not equal
SMALL = 1e-6  # of variances, so that a patch of one colour has a ratio


def carry(own: Tensor, own_before: Tensor, others_before: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance, each ``[K]``, with the peers' moments carried along by the change of the own patch.

    From step to step all patches lose noise together: what happened to the own mean and deviation since the step
    before is likely to have happened to the others' (``others_before``, without the own). Their means move by `CARRY`
    of the own mean's change, their M2 by the ratio of the own variances to that power; then all combine as in a
    synchronous step. Always a variance, so nothing falls back; exact where the input is held. Not of the paper.
    """
    count, mean, m2 = _fields(own)
    count_before, mean_before, m2_before = _fields(own_before)
    var, var_before = m2 / count.clamp(min=1), m2_before / count_before.clamp(min=1)
    ratio = ((var + SMALL) / (var_before + SMALL)) ** CARRY
    change = CARRY * (mean - mean_before)
    carried = []
    for other in others_before:
        count_other, mean_other, m2_other = _fields(other)
        carried.append(torch.cat([count_other, mean_other + change, m2_other * ratio]))
    return combine([own, *carried])


def _fields(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    num_groups = packed.shape[-1] // 2
    return packed[..., :1], packed[..., 1 : 1 + num_groups], packed[..., 1 + num_groups :]
