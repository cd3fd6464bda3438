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
    return mean, (m2 + counts * deviations * deviations).sum(0) / total


def correct(own: Tensor, own_before: Tensor, before: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """DistriFusion's corrected asynchronous group norm (arXiv 2402.19481, section 4): mean and variance, each ``[K]``.

    The global moments of the step before (``before``, all patches), moved by the change of the own patch since then:
    M[x^k] = mean_j E_j[x^k]' + (E_i[x^k] - E_i[x^k]'), var = M[x^2] - M[x]^2, and the patch's own variance where that
    is negative. All moments are taken about the patch's present mean c, which leaves the formula unchanged (both sums
    of weights are 1) and avoids its cancellation.
    """
    mean_all, var_all = combine(before)
    count, mean, m2 = _fields(own)
    count_before, mean_before, m2_before = _fields(own_before)
    var = m2 / count.clamp(min=1)
    var_before = m2_before / count_before.clamp(min=1)
    first = mean_all - mean_before  # M[x] - c
    second = var_all + (mean_all - mean) ** 2 + var - var_before - (mean_before - mean) ** 2  # M[(x - c)^2]
    corrected = second - first * first
    return mean + first, torch.where(corrected < 0, var, corrected)


def _fields(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    num_groups = packed.shape[-1] // 2
    return packed[..., :1], packed[..., 1 : 1 + num_groups], packed[..., 1 + num_groups :]
