"""LPIPS: true weights from arrays that are read without running a pickle's code, with or without torchvision."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from distrifusion.compare.perceptual import (
    LPIPS_ALEX,
    LPIPS_VGG,
    Lpips,
    Remembering,
    _alexnet,
    _torchvision,
    _vgg16,
    fill,
    read_weights,
)


def test_arrays_fill_convolutions_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"Conv_{i}": {"kernel": rng.random((3, 3, 2, 4)), "bias": rng.random(4)} for i in (10, 2)}
    path = tmp_path / "weights"
    path.write_bytes(pickle.dumps({"NetLinLayer_0": {"Conv_0": {}}, "AlexNet_0": arrays}))
    convolutions = [nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3)]
    fill(convolutions, read_weights(path))
    for module, name in zip(convolutions, ("Conv_2", "Conv_10"), strict=True):
        assert module.weight[3, 1, 0, 2].item() == pytest.approx(arrays[name]["kernel"][0, 2, 1, 3])
        assert np.allclose(module.bias.detach().numpy(), arrays[name]["bias"])


def test_a_pickle_of_anything_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(pickle.dumps({"AlexNet_0": print}))
    with pytest.raises(pickle.UnpicklingError, match="no place among arrays"):
        read_weights(path)


def test_the_layer_lists_are_where_lpips_cuts_them() -> None:
    convolutions = [
        [i for i, layer in enumerate(make()) if isinstance(layer, nn.Conv2d)] for make in (_alexnet, _vgg16)
    ]
    assert convolutions == [[0, 3, 6, 8, 10], [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]]
    picture = torch.zeros(1, 3, 64, 64)
    assert nn.Sequential(*_alexnet())(picture).shape == (1, 256, 1, 1)
    assert nn.Sequential(*_vgg16())(picture).shape == (1, 512, 2, 2)


def test_the_stand_in_for_torchvision_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])  # so that a real one is not found
    with _torchvision():
        import torchvision

        assert len(torchvision.models.alexnet(pretrained=False).features) == 13
    assert "torchvision" not in sys.modules


@pytest.mark.parametrize("metric", [LPIPS_ALEX, LPIPS_VGG], ids=["alex", "vgg"])
@pytest.mark.filterwarnings("ignore")  # of lpips about torchvision's and torch's old names
def test_equal_pictures_are_at_zero_and_more_noise_is_farther(metric: Lpips) -> None:
    if (reason := metric.missing()) is not None:
        pytest.skip(reason)
    compute, rng = metric.load(), np.random.default_rng(0)
    y, x = np.mgrid[0:64, 0:64] / 9.0
    one = (0.5 + 0.3 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=2)).astype(np.float32)
    noise = rng.standard_normal(one.shape)
    found = [compute((one + size * noise).astype(np.float32), one) for size in (0.0, 0.03, 0.2)]
    assert found[0] == 0.0
    assert found[1] is not None
    assert found[2] is not None
    assert 0.001 < found[1] < found[2]
    assert compute(one[:31], one[:31]) is None


class Features(nn.Module):
    """As lpips' networks: a tuple of tensors; 64 bytes of them."""

    asked = 0

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.asked += 1
        return image[:, :1] * 2, image[:, 1:2] * 3


def test_features_of_references_are_computed_once_and_the_oldest_forgotten() -> None:
    one, other, third = (torch.full((1, 2, 2, 4), float(value)) for value in range(3))
    network = Features()
    remembering = Remembering(network, limit=128)
    for image in (one, other, one.clone()):
        remembering.remember(image)
        assert all(torch.equal(*pair) for pair in zip(remembering(image), Features()(image), strict=True))
    assert network.asked == 2
    remembering.remember(third)  # other goes, which was used longest ago
    for image in (one, third):
        remembering(image)
    assert network.asked == 3
    remembering(other)
    assert network.asked == 4


def test_a_reference_larger_than_the_limit_is_kept_alone() -> None:
    network = Features()
    remembering = Remembering(network, limit=1)
    image = torch.zeros(1, 2, 2, 4)
    for _ in range(2):
        remembering.remember(image)
    assert network.asked == 1
    assert remembering(torch.ones(1, 2, 2, 4))[0].sum() == 16
