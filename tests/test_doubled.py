"""Interpolation and convolution as one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distrifusion.layers.doubled import summed


@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (2, 8, 1, 1), (3, 5, 7, 2)])
def test_summed_weights_make_all_kinds_of_pixels(shape):
    conv = nn.Conv2d(shape[1], 6, 3, padding=1, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    expected = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    phases = F.conv2d(x, summed(conv.weight), conv.bias.repeat(4), padding=1).unflatten(1, (2, 2, 6))
    height, width = shape[2:]
    for row in (0, 1):
        for col in (0, 1):
            part = phases[:, row, col, :, row : row + height, col : col + width]
            torch.testing.assert_close(part, expected[:, :, row::2, col::2])
