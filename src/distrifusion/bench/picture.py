"""Steps that follow each other as in a picture: each is given what a scheduler made of the prediction before."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from .workload import Workload


class Picture(DiffusionPipeline):  # type: ignore[misc]
    """A pipeline without words and decoder, around the denoiser of ``work``, for ``num_steps`` steps.

    Patches that stream do so from step to step in a pipeline alone, whose scheduler steps on each of them when it has
    come; a bare denoiser hands whole predictions out. `step` is one step of it. The last one waits for all patches.
    """

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self._work: Any = None
        self._latents: Any = None
        self._times: Any = None

    @classmethod
    def of(cls, work: Workload, num_steps: int) -> Picture:
        """The picture of ``num_steps`` steps that begins with the first latents of ``work``."""
        made = cls(work.model, FlowMatchEulerDiscreteScheduler())
        made.scheduler.set_timesteps(num_steps)
        made._work, made._latents = work, work.sample(0)
        made._times = iter(made.scheduler.timesteps)
        return made

    def step(self) -> None:
        """Predict and step on."""
        time = next(self._times)
        prediction = self._work.run(self._latents, share=time / self.scheduler.timesteps[0])[0]
        if prediction.shape[1] != self._latents.shape[1]:  # the variance too, which pipelines leave out
            prediction = prediction.chunk(2, dim=1)[0]
        self._latents = self.scheduler.step(prediction, time, self._latents, return_dict=False)[0]
