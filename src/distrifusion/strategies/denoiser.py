"""One model on one rank: its forward runs what is this rank's of a call, and gathers the prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from ..comm import Comm
from ..config import OF_STAGES, ParallelConfig
from ..errors import ConfigError, UnsupportedModel
from ..layers import Attached, FrameHolder
from ..mesh import Mesh
from ..metrics import Report
from ..models import Call, Table
from ..planner.memory import Budget
from ..products import fast_products
from . import strategy_for
from .agreement import check_call
from .balance import Balance
from .base import State
from .compiling import Compiling
from .condition import SharedCondition
from .cost import Cost, Counting
from .cutting import Cutting, check_model
from .delivery import Delivery
from .graphs import cut_comm
from .guidance import Guidance
from .holding import shares_model
from .pairs import Pairs, Ran
from .pictures import Pictures
from .taken import TakenForward
from .times import Times
from .ways import Setting, way_for

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
        products: whether all ranks take `fast_products`.

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
        products: bool = False,
    ) -> None:
        check_model(table, config)
        self._table, self._config, self._comm = table, config, comm
        self._mesh = mesh = Mesh.fit(config, comm.world)
        guidance = guidance if guidance is not None else Guidance(mesh, comm)
        self._balance = balance if balance is not None else Balance(config, mesh, comm)
        self._feeders, self._conditions, self._notes = tuple(feeders), tuple(conditions), tuple(notes)
        self.budget, self._products = budget, products
        cut = cut_comm(config, guidance.patches)
        strategy = strategy_for(config, cut or guidance.patches, comm)
        self._cutting = Cutting(table, config, mesh, comm.rank, self._balance, strategy)
        self._holder = FrameHolder()
        self._taken = TakenForward(table.model)
        self._compiling = Compiling(table.model, self._taken.own, wrapper)
        self._times = Times(timesteps)
        ranks, own = (mesh, comm, guidance, self._balance), (self._taken.own, self._compiling)
        setting = Setting(table, config, *ranks, self._cutting, self._holder, *own, self._times, cut)
        self._way = way_for(setting, strategy, budget)
        self._pictures = Pictures(strategy, timesteps)
        in_rows = strategy.name == "shifted" and config.latents == "rows" and mesh.size("patch") > 1 and table.gathers
        self._delivery = Delivery(table, comm, guidance, self._cutting, stays_in_rows=in_rows, aside=self._aside)
        branch = guidance.branch if mesh.size("cfg") > 1 and not self._feeders else None
        run, skip, deliver, place = self._run, self._way.skip, self._delivery, self._pictures.place
        self._pairs = Pairs(branch, run, skip, deliver, strategy.start, place, self._guarded)
        self._cost = Cost()  # of a feeder, until it is asked for
        self._is_running = False
        self._layers = Attached()
        self._attach_layers()
        self._way.attached()
        self.report = self._new_report()
        self._taken.take(self._forward)
        self._compiling.open()
        self._is_detached = False
        for condition in self._conditions:
            condition.attach()

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
        if self._is_detached:
            return
        found = [*([] if self._taken.is_ours else [self.model]), *self._layers.lost()]
        if found:
            raise ConfigError(
                f"{type(found[0]).__name__} was wrapped by another library (offload, casting or cache hooks) after "
                "df.parallelize; take that off before df.restore"
            )
        self._way.check()

    def _detach(self) -> None:
        if self._is_detached:
            return
        self._is_detached = True
        self._pictures.forget()
        self._way.give_back()
        for condition in self._conditions:
            condition.detach()
        self._layers.detach()
        self._compiling.close()
        self._taken.give_back()

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
        counting = Counting(self._comm)
        with torch.no_grad():
            try:
                self._is_running = True
                result = work()
            except BaseException:
                self._pictures.abandon()
                self._delivery.leaving = None
                raise
            finally:
                self._holder.frame, self._is_running = None, False
        self._cost.add(counting.cost())
        if self._table.gathers and self._cost.num_calls:
            cost = self.take_cost()
            self.report.step(self._way.kind, cost.seconds, cost.messages, cost.num_bytes)
            self.report.slot_bytes = sum(parallel._pictures.slot_bytes for parallel in (self, *self._feeders))
        return result

    def _step(self, call: Call) -> Any:
        fingerprint = self._table.fingerprint()
        conditioning = self._table.conditioning(call)
        state, is_new_picture = self._pictures.state(call, conditioning, fingerprint)
        if is_new_picture:
            self.report = self._new_report()
            self._delivery.start(has_end=self._pictures.mark is not None)
            self._way.start()
            if self._table.gathers:
                self._balance.start()
        if self._times.is_last(call, state):
            self._delivery.end()
        place, num_branches = self._pictures.place(state)
        if not state.is_checked:
            check_call(self._comm, call, self._config, conditioning)
            self._attach_layers()
            is_fed = any(feeder._cost.num_calls for feeder in self._feeders)
            self._way.prepare(call, state, num_branches=num_branches, is_fed=is_fed)
            state.is_checked = True
        state.num_calls += 1
        if not self._table.gathers:
            return self._run(call, state).result
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
        """Run the model on what is this rank's of the picture and the batch."""
        fed = [feeder.take_cost() for feeder in self._feeders]
        feeders = [feeder._cutting for feeder in self._feeders] if any(cost.num_calls for cost in fed) else []
        is_fast = self._products and not self._compiling.is_whole
        with fast_products(call.sample, self.model) if is_fast else nullcontext():
            ran = self._way.run(call, state, feeders, self.report)
        if not ran.is_complete:
            self._pictures.forget()  # the model left out seams: the next step cannot build on this one
        state.step += 1
        if not self._table.gathers:
            state.depart()
        elif ran.departs:
            self._delivery.leaving = state
        for cost in fed:
            self._cost.add(cost)
        self._cost.num_calls += 1
        return ran

    def take_cost(self) -> Cost:
        """What the calls since the last time have cost."""
        cost, self._cost = self._cost, Cost()
        return cost

    def _attach_layers(self) -> None:
        """Take over modules that are not yet ours, such as a LoRA's, and let go of those that have left the model."""
        if self._mesh.size("cfg") > 1 and not self._table.splits_guidance():
            raise ConfigError("cfg=2 does not work with PAG, whose branches must share a batch; use cfg=1")
        self._layers.follow(self._way.layers())

    def _aside(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Send something for latents in rows, and write it down where no call of the model does."""
        if self._is_running:
            return work()
        counting = Counting(self._comm)
        result = work()
        cost = counting.cost()
        self.report.add_to_last(cost.messages, cost.num_bytes)
        return result

    def _new_report(self) -> Report:
        notes = [self._about(extra) for extra in self._config.extras]
        notes += [*self._notes, *([self._compiling.note] if self._compiling.note else []), *self._way.notes()]
        if self.budget is not None and shares_model(self._mesh):
            notes.append(f"max_memory plans no steps of strategy={self._config.strategy!r}")
        return Report(self._config.strategy, str(self._mesh), self._config.split, notes=notes)

    def _about(self, extra: str) -> str:
        """What the report says of an extra of the configuration: itself, and whether it does nothing here."""
        name = extra.partition("=")[0]
        if name in OF_STAGES and self._mesh.size("pipe") == 1:
            return f"{extra} does nothing with one stage"
        is_alone = self._mesh.world == self._mesh.size("cfg")
        return f"{extra} does nothing without patches" if is_alone and name != "topology" else extra
