"""``Engine``: N supervised worker processes that together paint one picture at a time.

    with df.Engine("path-or-hub-id", config, nproc=4) as engine:
        result = engine.generate("snowy mountains at sunset", height=512, width=512, steps=30, seed=0)
        result.images[0].save("out.png")

What can be checked is checked here, before a process starts. A lost worker is `PeerLost`, and the next request gets a
fresh group.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import checkpoint
from .choices import check_device, check_size, dtype_name, make_request, num_workers
from .config import ParallelConfig
from .errors import ConfigError
from .mesh import Mesh
from .metrics import Report
from .painter import OnStep, Painted, Setup

if TYPE_CHECKING:
    import torch

    from .workers import Workers

_OURS = {
    "generator": "give seed=, from which every rank draws the same noise",
    "callback_on_step_end": "the steps run in other processes; give progress=, which is called here after each",
    "callback": "the steps run in other processes; give progress=, which is called here after each",
    "num_inference_steps": "it is steps= here",
}


@dataclass
class Result:
    """One answer of the engine.

    ``images`` is what the pipeline returned, a list of PIL images unless ``output_type`` asked for something else, or
    the frames of videos in the form that the pipeline gives them;
    ``report`` how rank 0 ran; ``seconds`` the whole call of the pipeline, text encoder and VAE included.
    """

    images: Any
    report: Report
    seed: int
    seconds: float


class Engine:
    """Worker processes that hold one pipeline, spread over all of them.

    Under ``strategy="tensor"``, and ``"pipelined"`` with ``patches``, each reads its own weights of the denoiser only.

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
        check_device(device, cuda_graphs=self.config.cuda_graphs)
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
