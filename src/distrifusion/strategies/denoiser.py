"""One model on one rank: its forward cuts the call to the patch, runs the model, and gathers the prediction."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import nn

from ..boundary import Staged
from ..comm import Comm
from ..config import ParallelConfig
from ..errors import ConfigError, UnsupportedModel
from ..geometry import Levels
from ..layers import Attached, Frame, FrameHolder
from ..mesh import Mesh
from ..metrics import Report
from ..models import Call, Table, stage_layers
from . import strategy_for
from .agreement import check_call, check_latents, probe
from .balance import Balance
from .base import State
from .compiling import Compiling
from .guidance import Guidance, Halves
from .pairs import Pairs, Ran
from .pictures import Pictures

T = TypeVar("T")


class ParallelDenoiser:
    """Takes over ``model.forward`` until ``detach``; the model object, its weights and its hooks stay what they are.

    Args:
        table: what the model is made of.
        config: how to spread it; fits ``comm.world``.
        comm: all ranks.
        timesteps: asked at each call for an object that is another one in each picture, such as the scheduler's
            timesteps.
        guidance: the split of the batch, where models share one; None: one of its own.
        balance: the rows of each rank, which it has in common with its feeders; None: one of its own.
        feeders: models that run before this one in each step and leave their outputs to it in patches, such as
            ControlNets. They are reported, reset and detached with it.
        notes: what the report is to say beside the numbers.
        wrapper: see `Compiling`.

    Raises:
        ConfigError: the world does not fit the configuration.
        UnsupportedModel: a module that is not known, or an option that the model cannot have.
    """

    def __init__(
        self,
        table: Table,
        config: ParallelConfig,
        comm: Comm,
        timesteps: Callable[[], Any] = lambda: None,
        *,
        guidance: Guidance | None = None,
        balance: Balance | None = None,
        feeders: Sequence[ParallelDenoiser] = (),
        notes: Sequence[str] = (),
        wrapper: Any = None,
    ) -> None:
        if config.context_window is not None and not table.has_window:
            raise UnsupportedModel(
                f"context_window={config.context_window} is known for U-Nets only, not for {type(table.model).__name__}"
            )
        self._table = table
        self._config = config
        self._comm = comm
        self._mesh = Mesh.fit(config, comm.world)
        self._guidance = guidance if guidance is not None else Guidance(self._mesh, comm)
        self._balance = balance if balance is not None else Balance(config, self._mesh, comm)
        self._feeders = tuple(feeders)
        self._notes = list(notes)
        self._cost = Cost()  # of a feeder, until it is asked for
        self._strategy = strategy_for(config, self._guidance.patches)
        self._holder = FrameHolder()
        self._layers = Attached()
        self._pictures = Pictures(self._strategy, timesteps)
        self._dim = 2 if config.split == "rows" else 3
        self._is_spread = self._mesh.world > self._mesh.size("cfg")
        has_halves = self._mesh.size("cfg") > 1 and not self._feeders
        branch = self._guidance.branch if has_halves else None
        start = self._strategy.start
        self._pairs = Pairs(branch, self._run, self._skip, self._deliver, start, self._pictures.place, self._guarded)
        self._leaving: State | None = None  # of the call whose last words go behind its prediction
        self._kind = "sync"  # how fresh the last call was
        self._inner: Callable[..., Any] = table.model.forward
        self._compiling = Compiling(table.model, self._inner, wrapper)
        self.report = self._new_report()
        self._previous = table.model.__dict__.get("forward")
        self._attach_layers()

        @functools.wraps(self._inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        # Collectives and clocks are not for a compiler, which would make crumbs of what is between them. See Compiling.
        self._outer: Callable[..., Any] = torch.compiler.disable(forward)  # type: ignore[no-untyped-call]
        self._is_detached = False
        self.model.forward = self._outer

    @property
    def model(self) -> nn.Module:
        """The diffusers model."""
        return self._table.model

    @property
    def models(self) -> list[nn.Module]:
        """The model and those that feed it."""
        return [self.model, *(feeder.model for feeder in self._feeders)]

    def detach(self) -> None:
        """Give the model its own forward back, everywhere, and the feeders theirs.

        Raises:
            ConfigError: another library has wrapped one of them since; nothing is undone then.
        """
        parallels = (self, *self._feeders)
        for parallel in parallels:
            parallel._check_unwrapped()
        for parallel in parallels:
            parallel._detach()

    def _check_unwrapped(self) -> None:
        found = [self.model] if self.model.__dict__.get("forward") != self._outer else []
        found += self._layers.lost()
        if found and not self._is_detached:
            raise ConfigError(
                f"{type(found[0]).__name__} was wrapped by another library (offload, casting or cache hooks) after "
                "df.parallelize; take that off before df.restore"
            )

    def _detach(self) -> None:
        if self._is_detached:
            return
        self._is_detached = True
        self._pictures.forget()
        self._layers.detach()
        if self._previous is None:
            del self.model.forward
        else:
            self.model.forward = self._previous

    def reset(self) -> None:
        """Start a new picture at the next call."""
        for parallel in (self, *self._feeders):
            parallel._pictures.reset()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self._table.bind(args, kwargs)
        if torch.is_grad_enabled() and call.sample.requires_grad:
            raise UnsupportedModel(
                f"{type(self.model).__name__} gives no gradients to its latents while it is parallel"
            )
        return self._guarded(lambda: self._step(call))

    def _guarded(self, work: Callable[[], T]) -> T:
        """Do work that runs the model, and write down what it took."""
        started, counted = perf_counter(), self._comm.meter.totals()
        with torch.no_grad():
            try:
                result = work()
            except BaseException:
                self._pictures.abandon()
                self._leaving = None
                raise
            finally:
                self._holder.frame = None
        messages, num_bytes = self._comm.meter.totals()
        self._cost.add(Cost(0, perf_counter() - started, messages - counted[0], num_bytes - counted[1]))
        if self._table.gathers and self._cost.num_calls:
            cost = self.take_cost()
            self.report.step(self._kind, cost.seconds, cost.messages, cost.num_bytes)
            self.report.slot_bytes = sum(parallel._pictures.slot_bytes for parallel in (self, *self._feeders))
        return result

    def _step(self, call: Call) -> Any:
        fingerprint = self._table.fingerprint()
        conditioning = self._table.conditioning(call)
        state, is_new_picture = self._pictures.state(call, conditioning, fingerprint)
        if is_new_picture:
            self.report = self._new_report()
            if self._table.gathers:
                self._balance.start()
        if not state.is_checked:
            check_call(self._comm, call, self._config, conditioning)
            self._attach_layers()
            state.is_checked = True
        state.num_calls += 1
        if not self._table.gathers:
            return self._run(call, state).result
        place, num_branches = self._pictures.place(state)
        result = self._pairs.call(call, state)
        # Rows change between two steps, never in one: feeders run before this model, and the halves of `Pairs` meet.
        is_last, size = place == num_branches - 1, self._table.size(call)
        news = self._balance.end_call(state.num_calls, is_last, size, lambda weights: self._levels(call, weights))
        if news:
            self.report.notes.append(news)
        return result

    def _run(self, call: Call, state: State) -> Ran:
        """Run the model on this rank's patch and part of the batch."""
        num_patches = self._mesh.size("patch")
        levels = self._levels(call)
        if state.levels is not None and state.levels != levels:
            state.forget(self._strategy.start())
        state.levels = levels
        exchange = self._strategy.policy(state)
        patch, window = self._mesh.coordinate(self._comm.rank, "patch"), self._config.context_window
        num_frames, num_guests = self._table.num_frames(call), self._table.num_guests(call)
        frame = Frame(
            patch, self._dim, levels, exchange, num_frames, num_guests, context_window=window, memory=state.memory
        )
        fed = [feeder.take_cost() for feeder in self._feeders]
        own_call = self._own_batch(call)
        if num_patches > 1:
            own_call = self._table.localise(own_call, frame, fed=any(cost.num_calls for cost in fed))
        if self._is_spread:
            self._holder.frame = frame
        stages = exchange if isinstance(exchange, Staged) and self._is_spread else None
        forward = self._compiling.forward() if stages is None else functools.partial(stages.run, self._inner)
        with self._balance.measuring():
            exchange.begin()
            result = forward(**own_call.arguments)
            if num_patches > 1:
                result = self._table.finish(result, frame)
            own = self._table.fold(result[0], own_call, frame) if self._table.gathers else call.sample
        if not exchange.finish():
            self._pictures.forget()  # the model left out seams: the next step cannot build on this one
        state.step += 1
        if self._table.gathers:
            self._leaving = state
        else:
            state.depart()
        for cost in fed:
            self._cost.add(cost)
        self._cost.num_calls += 1
        self._kind = exchange.kind if self._is_spread else "sync"
        if stages is None:
            self.report.patches = levels.splits[0].sizes
            self.report.balance = self._balance.origin(self._table.size(call))
        else:  # one rank has the whole prediction
            self.report.stages, self.report.balance = stages.names, str(self._config.balance or "even")
            levels = replace(levels, splits=(stages.output_split(levels.splits[0].size), *levels.splits[1:]))
        return Ran(result, own, levels)

    def _skip(self, before: Ran, call: Call) -> Ran:
        """See `Pairs`."""
        return before if self._mesh.size("pipe") > 1 else replace(before, levels=self._levels(call))

    def _levels(self, call: Call, weights: tuple[float, ...] | None = None) -> Levels:
        """The rows of all ranks at every level, by ``weights``; None: by the present ones."""
        size = self._table.size(call)
        return self._table.levels(*size, weights or self._balance.weights(size), self._dim)

    def _deliver(self, ran: Ran, call: Call, halves: Halves) -> Any:
        """Everyone's predictions, as the model returns them. See `Pairs`."""
        batch = call.sample.shape[0]
        gathering = self._guidance.gather(ran.own, probe(call.sample), batch, ran.levels, self._dim, halves)
        if self._leaving is not None:  # on a slow link the prediction would wait for what leaves before it
            self._leaving.depart()
            self._leaving = None
        whole, probes = gathering.wait()
        check_latents(probes)
        return self._table.unfold(whole, ran.result[0])

    def _own_batch(self, call: Call) -> Call:
        """The call for the part of the batch that is this rank's."""
        batch = call.sample.shape[0]
        share = self._guidance.share(batch)
        return call if len(share) == batch or self._table.needs_whole_batch(call) else call.for_batch(share)

    def take_cost(self) -> Cost:
        """What the calls since the last time have cost."""
        cost, self._cost = self._cost, Cost()
        return cost

    def _attach_layers(self) -> None:
        """Take over modules that are not yet ours, such as a LoRA's, and let go of those that have left the model."""
        if self._mesh.size("cfg") > 1 and not self._table.splits_guidance():
            raise ConfigError("cfg=2 does not work with PAG, whose branches must share a batch; use cfg=1")
        num_stages = self._mesh.size("pipe")
        if num_stages > 1:
            self._layers.follow(stage_layers(self.model, num_stages, self._holder))
        elif self._is_spread:
            self._layers.follow(self._table.layers(self._holder))

    def _new_report(self) -> Report:
        notes = [extra if self._is_spread else f"{extra} does nothing without patches" for extra in self._config.extras]
        notes += self._notes + ([self._compiling.note] if self._compiling.note else [])
        if self._mesh.size("pipe") > 1 and any(each._compiled_call_impl is not None for each in self.model.modules()):
            notes.append("torch.compile does nothing while pipelined")
        return Report(self._config.strategy, str(self._mesh), self._config.split, notes=notes)


@dataclass
class Cost:
    """Calls of a model, and what they took on this rank."""

    num_calls: int = 0
    seconds: float = 0.0
    messages: int = 0
    num_bytes: int = 0

    def add(self, other: Cost) -> None:
        """Add another's."""
        self.num_calls += other.num_calls
        self.seconds += other.seconds
        self.messages += other.messages
        self.num_bytes += other.num_bytes
