"""One denoiser on one rank: its forward cuts the call to the patch, runs the model, and gathers the prediction."""

from __future__ import annotations

import functools
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ..comm import Comm
from ..config import ParallelConfig
from ..errors import ConfigError, DistrifusionError
from ..layers import Frame, FrameHolder, Layer
from ..mesh import Mesh
from ..metrics import Report
from ..models import Call, Table
from . import strategy_for
from .agreement import check_call, check_latents, probe
from .guidance import Guidance
from .pictures import Pictures


class ParallelDenoiser:
    """Takes over ``model.forward`` until ``detach``; the model object, its weights and its hooks stay what they are.

    Args:
        table: what the model is made of.
        config: how to spread it; fits ``comm.world``.
        comm: all ranks.
        timesteps: asked at each call for an object that is another one in each picture, such as the scheduler's timesteps.

    Raises:
        ConfigError: the world does not fit the configuration.
        UnsupportedModel: a module that is not known.
    """

    def __init__(
        self, table: Table, config: ParallelConfig, comm: Comm, timesteps: Callable[[], Any] = lambda: None
    ) -> None:
        self._table = table
        self._config = config
        self._comm = comm
        self._mesh = Mesh.fit(config, comm.world)
        self._guidance = Guidance(self._mesh, comm)
        self._strategy = strategy_for(config, self._guidance.patches)
        self._holder = FrameHolder()
        self._layers: dict[int, Layer] = {}  # by id of their module
        self._fingerprint: Any = None
        self._pictures = Pictures(self._strategy, timesteps)
        self.report = self._new_report()
        self._inner: Callable[..., Any] = table.model.forward
        self._previous = table.model.__dict__.get("forward")
        self._attach_layers()

        @functools.wraps(self._inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        self.model.forward = forward  # type: ignore[method-assign]

    @property
    def model(self) -> nn.Module:
        """The diffusers model."""
        return self._table.model

    def detach(self) -> None:
        """Give the model its own forward back, everywhere."""
        self._pictures.forget()
        for layer in self._layers.values():
            layer.detach()
        self._layers.clear()
        if self._previous is None:
            del self.model.forward
        else:
            self.model.forward = self._previous

    def reset(self) -> None:
        """Start a new picture at the next call."""
        self._pictures.forget()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            call = self._table.bind(args, kwargs)
            try:
                return self._step(call)
            except BaseException:
                self._pictures.abandon()
                raise
            finally:
                self._holder.frame = None

    def _step(self, call: Call) -> Any:
        sample = call.sample
        started = perf_counter()
        counted = self._comm.meter.totals()
        fingerprint = self._table.fingerprint()
        state, is_new_picture = self._pictures.state(call, self._table.conditioning(call), fingerprint)
        if is_new_picture:
            self.report = self._new_report()
        if state.step == 0:
            check_call(self._comm, call, self._config)
            self._attach_layers()
        dim = 2 if self._config.split == "rows" else 3
        num_patches = self._mesh.size("patch")
        levels = self._table.levels(sample.shape[2], sample.shape[3], num_patches, dim)
        exchange = self._strategy.policy(state)
        frame = Frame(self._mesh.coordinate(self._comm.rank, "patch"), dim, levels, exchange)
        batch, share = sample.shape[0], self._guidance.share(sample.shape[0])
        own_call = call if len(share) == batch else call.for_batch(share)
        if num_patches > 1:
            own_call = self._table.localise(own_call, frame)
            self._holder.frame = frame
        exchange.begin()
        result = self._inner(**own_call.arguments)
        prediction = result[0]
        whole, probes = self._guidance.gather(prediction, probe(sample), batch, levels, dim)
        check_latents(probes)
        if not exchange.finish():
            self._pictures.forget()  # the model left out seams: the next step cannot build on this one
        state.step += 1
        self._note(exchange.kind if num_patches > 1 else "sync", started, counted, levels.splits[0].sizes)
        return (whole, *result[1:]) if isinstance(result, tuple) else type(result)(whole)

    def _attach_layers(self) -> None:
        """Take over the modules that are not yet ours, such as a LoRA's, and let go of those that have left the model."""
        if self._mesh.size("cfg") > 1 and not self._table.splits_guidance():
            raise ConfigError("cfg=2 does not work with PAG, whose branches must share a batch; use cfg=1")
        if self._mesh.size("patch") == 1:
            return
        wanted = {id(layer.module): layer for layer in self._table.layers(self._holder)}
        for known in [known for known in self._layers if known not in wanted]:
            self._layers.pop(known).detach()
        for known, layer in wanted.items():
            if known not in self._layers:
                try:
                    layer.attach()
                except DistrifusionError:
                    for attached in self._layers.values():
                        attached.detach()
                    self._layers.clear()
                    raise
                self._layers[known] = layer

    def _new_report(self) -> Report:
        return Report(self._config.strategy, str(self._mesh), self._config.split)

    def _note(self, kind: str, started: float, counted: tuple[int, int], patches: tuple[int, ...]) -> None:
        messages, num_bytes = self._comm.meter.totals()
        self.report.patches = patches
        self.report.step(kind, perf_counter() - started, messages - counted[0], num_bytes - counted[1])
