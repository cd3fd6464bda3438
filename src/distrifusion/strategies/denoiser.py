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
from ..footprint import weight_bytes
from ..layers import Attached, FrameHolder
from ..mesh import Mesh
from ..metrics import Report, human_bytes
from ..models import Call, Table, fused, sliced_layers, stage_layers
from ..planner.memory import Budget
from ..weights import part_of, whole_bytes
from . import strategy_for
from .agreement import check_call, check_latents, probe
from .balance import Balance
from .base import State
from .budget import Pretended, StepTrial, largest_patch, patch_layers
from .compiling import Compiling
from .condition import SharedCondition
from .cutting import Cutting, check_model
from .guidance import Guidance, Halves
from .holding import shares_model
from .independent import blended
from .pairs import Pairs, Ran
from .pictures import Pictures
from .rows import Rows, Sharing
from .streamed import Streamed
from .streaming import Streaming

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
        conditions: of models that run whole on every rank, which are attached and detached with it.
        notes: what the report is to say beside the numbers.
        wrapper: see `Compiling`.
        budget: the memory of a rank; None: no matter how much.

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
        conditions: Sequence[SharedCondition] = (),
        notes: Sequence[str] = (),
        wrapper: Any = None,
        budget: Budget | None = None,
    ) -> None:
        check_model(table, config)
        self._table = table
        self._config = config
        self._comm = comm
        self._mesh = Mesh.fit(config, comm.world)
        self._guidance = guidance if guidance is not None else Guidance(self._mesh, comm)
        self._balance = balance if balance is not None else Balance(config, self._mesh, comm)
        self._feeders = tuple(feeders)
        self._conditions = tuple(conditions)
        self._notes = list(notes)
        self.budget = budget
        self._cost = Cost()  # of a feeder, until it is asked for
        self._strategy = strategy_for(config, self._guidance.patches, comm)
        self._cutting = Cutting(table, config, self._mesh, comm.rank, self._balance, self._strategy)
        self._holder = FrameHolder()
        self._layers = Attached()
        self._streaming: Streaming | None = None
        self._streamed = self._strategy if isinstance(self._strategy, Streamed) else None
        if self._streamed is not None:
            assert config.patches is not None
            self._streaming = Streaming(
                self._streamed, table, config.patches, self._holder, self._cutting.dim, self._guidance
            )
        self._pictures = Pictures(self._strategy, timesteps)
        self._timesteps = timesteps
        self._is_spread = self._mesh.world > self._mesh.size("cfg")
        has_halves = self._mesh.size("cfg") > 1 and not self._feeders
        branch = self._guidance.branch if has_halves else None
        start = self._strategy.start
        self._pairs = Pairs(branch, self._run, self._skip, self._deliver, start, self._pictures.place, self._guarded)
        self._leaving: State | None = None  # of the call whose last words go behind its prediction
        self._kind = "sync"  # how fresh the last call was
        self._sharing: Sharing | None = None  # of the present picture
        self._num_predictions = 0  # in rows
        self._is_running = False
        self._inner: Callable[..., Any] = table.model.forward
        self._compiling = Compiling(table.model, self._inner, wrapper)
        self._previous = table.model.__dict__.get("forward")
        self._fused = fused(table.model)  # before there are slices
        self._num_bytes = whole_bytes([*table.model.parameters(), *table.model.buffers()])
        self._attach_layers()
        if self._streamed is not None:
            self._streamed.free()
        self.report = self._new_report()

        @functools.wraps(self._inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        # Collectives and clocks are not for a compiler, which would make crumbs of what is between them. See Compiling.
        self._outer: Callable[..., Any] = torch.compiler.disable(forward)  # type: ignore[no-untyped-call]
        self._is_detached = False
        self.model.forward = self._outer
        for condition in self._conditions:
            condition.attach()

    @property
    def _is_split(self) -> bool:
        """Whether the ranks share the model, and not the picture."""
        return shares_model(self._mesh)

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
        if self._mesh.size("tensor") > 1 and not self._is_detached and fused(self.model) != self._fused:
            raise ConfigError(
                f"a LoRA of {type(self.model).__name__} was fused, or unfused, after df.parallelize, in slices of the "
                "weights only; take that back before df.restore"
            )
        if self._mesh.size("tensor") > 1 and not self._is_detached:
            for files in {part.files for part in map(part_of, self.model.parameters()) if part is not None}:
                files.check()

    def _detach(self) -> None:
        if self._is_detached:
            return
        self._is_detached = True
        self._pictures.forget()
        if self._streamed is not None:
            self._streamed.give_back()
        for condition in self._conditions:
            condition.detach()
        self._layers.detach()
        if self._previous is None:
            del self.model.forward
        else:
            self.model.forward = self._previous

    def is_of(self, mark: Any) -> bool:
        """Whether the last call was of the picture with these timesteps."""
        return self._pictures.mark is mark

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
                self._is_running = True
                result = work()
            except BaseException:
                self._pictures.abandon()
                self._leaving = None
                raise
            finally:
                self._holder.frame, self._is_running = None, False
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
            self._sharing = self._new_sharing()
            if self._streaming is not None:
                self._streaming.start()
            if self._table.gathers:
                self._balance.start()
        if self._sharing is not None and self._is_last(call, state):
            self._sharing.is_over = True
        if not state.is_checked:
            check_call(self._comm, call, self._config, conditioning)
            self._attach_layers()
            if self.budget is not None and self._table.gathers and not self._is_split:
                self._fit(call, state, self.budget)
            state.is_checked = True
        state.num_calls += 1
        if not self._table.gathers:
            return self._run(call, state).result
        place, num_branches = self._pictures.place(state)
        result = self._pairs.call(call, state)
        # Rows change between two steps, never in one: feeders run before this model, and the halves of `Pairs` meet.
        is_last, size = place == num_branches - 1, self._table.size(call)
        news = self._balance.end_call(
            state.num_calls, is_last, size, lambda weights: self._cutting.levels(call, weights)
        )
        if news:
            self.report.notes.append(news)
        return result

    def _run(self, call: Call, state: State) -> Ran:
        """Run the model on this rank's patch and part of the batch."""
        if self._streaming is not None:
            return self._stream(self._streaming, call, state)
        num_patches, cutting = self._mesh.size("patch"), self._cutting
        picture = cutting.levels(call)
        if state.levels is not None and state.levels != picture:
            state.forget(self._strategy.start())
        state.levels = picture
        exchange = self._strategy.policy(state)
        fed = [feeder.take_cost() for feeder in self._feeders]
        is_fed = any(cost.num_calls for cost in fed)
        feeders = [feeder._cutting for feeder in self._feeders] if is_fed else []
        cutting.moved = cutting.moves(call, state, picture.splits[0], feeders)
        own_call = self._own_batch(cutting.with_plain_latents(call))
        frame = cutting.frame(call, picture, exchange, state.memory)
        if num_patches > 1:
            own_call = self._table.localise(own_call, frame, fed=is_fed)
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
        split = picture.splits[0]
        if stages is None:
            self.report.patches = split.sizes
            self.report.balance = self._balance.origin(self._table.size(call))
        else:  # one rank has the whole prediction
            self.report.stages, self.report.balance = stages.names, str(self._config.balance or "even")
            split = stages.output_split(split.size)
        if self._mesh.size("tensor") > 1:
            split, own = cutting.own_share(own)
        return Ran(result, own, split, cutting.moved)

    def _stream(self, streaming: Streaming, call: Call, state: State) -> Ran:
        """Run this rank's stage of the model, on its part of the batch."""
        is_last = self._is_last(call, state)
        flow = streaming.step(call, self._own_batch(call), state, self._inner, is_last=is_last)
        assert state.course is not None
        state.step += 1
        self._cost.num_calls += 1
        self._kind = flow.kind
        self.report.stages, self.report.patches = state.course.names(), flow.levels.splits[0].sizes
        if flow.note is not None and flow.note not in self.report.notes:
            self.report.notes.append(flow.note)
        return Ran(flow.result, flow.own, streaming.output_split(flow.levels.splits[0].size), coming=flow.coming)

    def _skip(self, before: Ran, call: Call, state: State) -> Ran:
        """See `Pairs`."""
        if self._is_split:
            return before
        split = self._cutting.levels(call).splits[0]
        moved = self._cutting.moves(call, state, split, [])
        return replace(before, own=self._cutting.nothing(before.own, moved), split=split, moved=moved)

    def _fit(self, call: Call, state: State, budget: Budget) -> None:
        """Find out how much a layer may work on at a time. Blocks.

        Raises:
            ConfigError: the model takes too much memory on some rank, however little that is; on every rank.
        """
        picture, fed = self._cutting.levels(call), any(feeder._cost.num_calls for feeder in self._feeders)
        self._cutting.moved = None
        frame = self._cutting.frame(call, picture, Pretended(), {})
        # What feeders have left is this rank's.
        frame.patch = self._cutting.place if fed else largest_patch(picture.splits[0])
        trial = StepTrial(self._table, self._holder, self._own_batch(call), frame, fed=fed)
        self._cutting.chunk, fit, words = trial.fit(budget, keeps=self._config.strategy == "displaced")
        peaks = self._comm.all_gather_object((fit.peak, words))
        budget.kept = max(words for _, words in peaks) * self._pictures.place(state)[1]
        budget.accept(replace(fit, peak=max(peak for peak, _ in peaks)))

    def _deliver(self, ran: Ran, call: Call, halves: Halves) -> Any:
        """Everyone's predictions, as the model returns them. See `Pairs`."""
        if ran.coming is not None:
            return ran.coming
        batch, own, split = call.sample.shape[0], ran.own, ran.split
        if ran.moved is not None:
            own, split = blended(own, ran.moved, self._guidance.patches, self._cutting.dim), ran.moved.split
        sharing = self._sharing
        if ran.moved is not None and sharing is not None and not sharing.is_over and _has_rows(ran.result[0]):
            if not isinstance(call.sample, Rows):  # else no latents are known twice
                known = probe(call.sample)
                sizes = [known.numel()] * self._comm.world
                check_latents(self._comm.all_gather(known.contiguous(), sizes, kind="control").wait())
            own = self._table.unfold(self._guidance.join_branches(own, batch, halves), ran.result[0])
            self._num_predictions += 1
            return Rows(own, split, self._cutting.dim - 4, sharing, self._num_predictions)
        known = probe(call.sample) if not isinstance(call.sample, Rows) else own.new_empty(0)
        gathering = self._guidance.gather(own, known, batch, split, self._cutting.dim, halves)
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
        if self._streamed is not None:
            self._layers.follow(self._streamed.layers(self.model, self._holder))
            return
        if num_stages > 1:
            self._layers.follow(stage_layers(self.model, num_stages, self._holder))
            return
        num_slices = self._mesh.size("tensor")
        if num_slices > 1:
            place = self._mesh.coordinate(self._comm.rank, "tensor")
            self._layers.follow(sliced_layers(self.model, place, num_slices, self._holder))
            return
        is_cut, has_budget = self._mesh.size("patch") > 1, self.budget is not None
        if is_cut or has_budget or any(self._config.rings):
            self._layers.follow(patch_layers(self._table, self._holder, is_cut=is_cut, has_budget=has_budget))

    def _new_sharing(self) -> Sharing | None:
        """How latents stay in rows between the steps of a picture whose last step will be known."""
        is_wanted = self._config.strategy == "shifted" and self._config.latents == "rows" and self._table.gathers
        if not is_wanted or self._mesh.size("patch") == 1 or self._timesteps() is None:
            return None
        self._guidance.open_branches()
        return Sharing(self._guidance.patches, self._aside)

    def _is_last(self, call: Call, state: State) -> bool:
        """Whether the scheduler has no timestep after this one. Asks no accelerator for a value."""
        all_times, time = self._timesteps(), call.arguments.get("timestep")
        if not isinstance(all_times, torch.Tensor) or state.step + 1 >= len(all_times):
            return True
        return isinstance(time, torch.Tensor) and time.data_ptr() == all_times[-1:].data_ptr()

    def _aside(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Send something for latents in rows, and write it down where no call of the model does."""
        if self._is_running:
            return work()
        counted = self._comm.meter.totals()
        result = work()
        messages, num_bytes = self._comm.meter.totals()
        self.report.add_to_last(messages - counted[0], num_bytes - counted[1])
        return result

    def _new_report(self) -> Report:
        notes = [
            extra if self._is_spread or extra.startswith("topology") else f"{extra} does nothing without patches"
            for extra in self._config.extras
        ]
        notes += self._notes + ([self._compiling.note] if self._compiling.note else [])
        if self._mesh.size("tensor") > 1 or (self._streamed is not None and self._config.blocks == "freed"):
            held, whole = human_bytes(weight_bytes(self.model)), human_bytes(self._num_bytes)
            notes.append(f"{held} of {whole} of weights on this rank")
        if self.budget is not None and self._is_split:
            notes.append(f"max_memory plans no steps of strategy={self._config.strategy!r}")
        if self._mesh.size("pipe") > 1 and any(each._compiled_call_impl is not None for each in self.model.modules()):
            notes.append("torch.compile does nothing while pipelined")
        return Report(self._config.strategy, str(self._mesh), self._config.split, notes=notes)


def _has_rows(result: Any) -> bool:
    """Whether a prediction is a map ``[B, C, H, W]`` or ``[B, C, frames, H, W]``, and not in tokens."""
    return isinstance(result, torch.Tensor) and result.ndim in (4, 5)


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
