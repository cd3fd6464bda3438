"""``Engine``: N supervised worker processes that together paint one picture at a time.

    with df.Engine("path-or-hub-id", config, nproc=4) as engine:
        result = engine.generate("snowy mountains at sunset", height=512, width=512, steps=30, seed=0)
        result.images[0].save("out.png")

What can be checked is checked here, before a process starts. A lost worker is `PeerLost`, and the next request gets a
fresh group.
"""

from __future__ import annotations

import pickle
import secrets
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import checkpoint
from .config import ParallelConfig
from .errors import ConfigError
from .geometry import Split
from .mesh import Mesh
from .metrics import Report
from .worker import OnStep, Painted, Request, Setup

if TYPE_CHECKING:
    import torch

    from .workers import Workers

DEVICES = ("cpu", "cuda", "xpu")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

_OURS = {
    "generator": "give seed=, from which every rank draws the same noise",
    "callback_on_step_end": "the steps run in other processes; give progress=, which is called here after each",
    "callback": "the steps run in other processes; give progress=, which is called here after each",
    "num_inference_steps": "it is steps= here",
}


@dataclass
class Result:
    """One answer of the engine.

    ``images`` is what the pipeline returned, a list of PIL images unless ``output_type`` asked for something else;
    ``report`` how rank 0 ran; ``seconds`` the whole call of the pipeline, text encoder and VAE included.
    """

    images: Any
    report: Report
    seed: int
    seconds: float


class Engine:
    """Worker processes that hold one pipeline, spread over all of them.

    Args:
        model: a diffusers pipeline's folder or a hub id; None: the bundled model.
        config: how a step is spread; None: ``ParallelConfig()``.
        nproc: number of workers. None: on a GPU all devices of this machine, or as many as the mesh can use; on the CPU
            the fewest that the mesh needs, which is one unless ``config`` says more.
        device: ``"cpu"``, ``"cuda"`` or ``"xpu"``; rank r takes the r-th device.
        dtype: of the weights: ``"bf16"``, ``"fp16"``, ``"fp32"`` or a torch.dtype. None: float32 on the CPU, the
            checkpoint's own elsewhere. Weights in the files' own dtype are mapped, not copied, on the CPU.
        timeout: seconds until a silent rank counts as lost; None: DISTRIFUSION_TIMEOUT, or 25.
        load: further keywords of ``from_pretrained``, such as ``{"variant": "fp16"}``.

    On the CPU each worker has the cores of the machine divided by ``nproc`` as threads, at least one, unless
    OMP_NUM_THREADS says otherwise.

    Raises:
        ConfigError: something that cannot be, found before a process starts.
        UnsupportedModel: the denoiser cannot be spread.
        DistrifusionError: the model does not load, or a worker did not come up.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        config: ParallelConfig | None = None,
        *,
        nproc: int | None = None,
        device: str = "cpu",
        dtype: str | torch.dtype | None = None,
        timeout: float | None = None,
        load: Mapping[str, Any] | None = None,
    ) -> None:
        self._closed = False
        self._workers: Workers | None = None
        self._lock = threading.Lock()
        self.config = config if config is not None else ParallelConfig()
        check_device(device)
        self.nproc = num_workers(self.config, nproc, device)
        """Number of workers: the world."""
        self.mesh = Mesh.fit(self.config, self.nproc)
        load = dict(load or {})
        without = [name for name, part in load.items() if part is None]
        hub = {name: load.pop(name) for name in checkpoint.HUB_KEYWORDS if name in load}
        self.checkpoint = checkpoint.find(model, variant=load.get("variant"), without=without, **hub)
        self._setup = Setup(
            path=str(self.checkpoint.path.absolute()),
            config=self.config,
            device=device,
            dtype=dtype_name(dtype, device, self.checkpoint),
            timeout=timeout,
            load=load,
        )
        self._workers = self._start()

    @property
    def pids(self) -> dict[int, int]:
        """Process of each rank; empty while there is no group."""
        return self._workers.pids if self._workers is not None and self._workers.usable else {}

    def generate(
        self,
        prompt: str | list[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        seed: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = None,
        progress: OnStep | None = None,
        **arguments: Any,
    ) -> Result:
        """One call of the pipeline, by all workers together.

        Args:
            prompt: what to paint.
            height: pixels; None: the model's own. ``width`` likewise.
            width: pixels.
            steps: denoising steps; None: the pipeline's own number.
            seed: of all noise; None: a new one, which the result tells.
            guidance_scale: strength of the guidance; None: the pipeline's own.
            negative_prompt: what not to paint.
            num_images_per_prompt: pictures in one batch; None: 1.
            progress: called here after each step with (steps done, steps in all, seconds of this one).
            **arguments: further keywords of the pipeline, anything that pickles.

        Raises:
            ConfigError: a value that cannot be, a size the VAE cannot take, or fewer latent rows than ranks. The engine
                stays usable.
            PeerLost: a worker died or fell silent. The next call is served by a fresh group.
        """
        self.check_size(height, width)
        given = {
            "prompt": prompt,
            "height": height,
            "width": width,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
            "num_images_per_prompt": num_images_per_prompt,
        }
        for name, advice in _OURS.items():
            if name in arguments:
                raise ConfigError(f"generate() takes no {name}: {advice}")
        request = make_request(seed, {**given, **arguments}, self.checkpoint.default_size)
        with self._lock:
            if self._closed:
                raise ConfigError("this engine is closed; open another")
            notes = []
            if self._workers is not None and self._workers.usable:
                loss = self._workers.loss()
                if loss is not None:
                    notes.append(f"{loss}; a fresh group serves")
                    self._workers.kill()
            if self._workers is None or not self._workers.usable:
                self._workers = self._start()
            painted: Painted = self._workers.paint(request, progress)
        painted.report.notes += notes
        return Result(painted.images, painted.report, request.seed, painted.seconds)

    def check_size(self, height: int | None, width: int | None) -> None:
        """Whether a picture of this size can be painted; None is the model's own.

        Raises:
            ConfigError: it cannot; says what would fit.
        """
        check_size(self.checkpoint, self.config, self.mesh, height, width)

    def close(self) -> None:
        """End the workers. May be called twice."""
        self._closed = True
        if self._workers is not None:
            self._workers.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None and self._workers is not None:
            self._workers.kill()  # they may be in mid-picture: do not wait for an answer
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):
            if self._workers is not None:
                self._workers.kill()

    def _start(self) -> Workers:
        from .workers import Workers  # torch's launcher: seconds that a refused argument need not cost

        return Workers(self.nproc, self._setup)


def check_device(device: str) -> None:
    """Whether ``device`` is a kind of device.

    Raises:
        ConfigError: it is not.
    """
    if device not in DEVICES:
        raise ConfigError(
            f"device={device!r} must be one of {', '.join(map(repr, DEVICES))}: the rank picks its number"
        )


def check_size(
    found: checkpoint.Checkpoint, config: ParallelConfig, mesh: Mesh, height: int | None, width: int | None
) -> None:
    """Whether a picture of this size (None: the model's own) can be spread over ``mesh``.

    Raises:
        ConfigError: a size the VAE cannot take, or fewer rows of latent than ranks; says what would fit.
    """
    size = found.latent_size(height, width)
    if size is not None:
        Split.even(size[0] if config.split == "rows" else size[1], mesh.size("patch"))


def num_workers(config: ParallelConfig, nproc: int | None, device: str) -> int:
    """The number of workers, see `Engine`.

    Raises:
        ConfigError: no whole number, or more than there are devices.
    """
    if nproc is not None and (isinstance(nproc, bool) or not isinstance(nproc, int) or nproc < 1):
        raise ConfigError(f"nproc={nproc!r} must be a whole number of at least 1")
    least = config.cfg * (config.patch or 1)
    if device == "cpu":
        return nproc if nproc is not None else least
    import torch

    num_devices: int = getattr(torch, device).device_count()
    wanted = nproc or (least if config.patch is not None else max(num_devices // least, 1) * least)
    if num_devices < wanted:
        raise ConfigError(
            f"{wanted} workers need as many {device} devices, and this machine has {num_devices}: take fewer, "
            "or device='cpu'"
        )
    return wanted


def dtype_name(dtype: str | torch.dtype | None, device: str, found: checkpoint.Checkpoint) -> str | None:
    """torch's name of ``dtype``, see `Engine`.

    Raises:
        ConfigError: an unknown name.
    """
    if dtype is None:
        return "float32" if device == "cpu" else found.dtype
    name = str(dtype).removeprefix("torch.")
    name = DTYPES.get(name, name)
    if name not in DTYPES.values():
        raise ConfigError(f"dtype={str(dtype)!r} must be one of {', '.join(map(repr, DTYPES))}")
    return name


def make_request(
    seed: int | None, arguments: Mapping[str, Any], default_size: tuple[int, int] | None = None
) -> Request:
    """The request with a seed for sure, and without the arguments that are None.

    Where only one of height and width is given, the other comes from ``default_size``: SD's pipelines would drop the
    given one.

    Raises:
        ConfigError: a seed or number of steps that cannot be, or an argument that cannot travel.
    """
    if seed is None:
        seed = secrets.randbits(32)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigError(f"seed={seed!r} must be a whole number from 0 to 2**63 - 1")
    for name in ("num_inference_steps", "num_images_per_prompt"):
        value = arguments.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name.replace('num_inference_', '')}={value!r} must be a whole number of at least 1")
    given = {name: value for name, value in arguments.items() if value is not None}
    if default_size is not None and ("height" in given) != ("width" in given):
        given = {"height": default_size[0], "width": default_size[1], **given}
    try:
        pickle.dumps(given)
    except Exception as error:  # pickle raises what the objects raise
        raise ConfigError(f"an argument cannot travel to the workers: {error}") from error
    return Request(seed, given)
