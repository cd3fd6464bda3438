"""A VAE on one rank: its encoder and decoder read the whole picture, run on own rows, and gather what they made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..comm import Comm
from ..config import ParallelConfig
from ..errors import ConfigError, UnsupportedModel
from ..exchange import Absent, Fresh
from ..layers import Attached, Frame, FrameHolder, Layer
from ..mesh import Mesh
from ..metrics import Report, Tally
from ..models.table import bind
from ..planner.memory import Budget, Fit
from ..products import fast_products
from .agreement import agree_on_input
from .bands import Bands, run_half, whole
from .budget import half_fit

if TYPE_CHECKING:
    from ..models.vae import Half


class ParallelVAE:
    """Takes over the ``forward`` of encoder and decoder until ``detach``.

    What the VAE does around them stays its own: ``encode`` and ``decode``, slices of a batch, tiles, the frames of a
    video one after the other, the quantising 1 x 1 convolutions on latents. All ranks share the rows of each call,
    whatever the mesh: nothing here depends on a branch of guidance. Always exact: every value is of this call.

    With tiling on, every rank computes all tiles as the user asked for them, and nothing travels.

    Args:
        halves: encoder and decoder, of one VAE.
        config: the split dim; the rest is about denoising.
        comm: all ranks.
        budget: the memory of a rank; None: no matter how much.
        timesteps: see `ParallelDenoiser`; another object is another picture.
        products: see `ParallelDenoiser`.

    Raises:
        ConfigError: the world does not fit the configuration.
        UnsupportedModel: a module that is not known, or that another library has taken over.
    """

    def __init__(
        self,
        halves: tuple[Half, ...],
        config: ParallelConfig,
        comm: Comm,
        timesteps: Callable[[], Any] = lambda: None,
        budget: Budget | None = None,
        products: bool = False,
    ) -> None:
        self._config, self._comm = config, comm
        self._mesh = Mesh.fit(config, comm.world)
        self._timesteps = timesteps
        self._mark: Any = None
        self.budget = budget
        self.topology = config.topology
        self.tally: dict[str, Tally] = {}  # of the present picture, by kind of call
        self.model: Any = halves[0].vae
        self._halves = [_ParallelHalf(half, config, comm, self._record, budget, products) for half in halves]
        self._attached = Attached()
        self._attach()

    @property
    def models(self) -> list[nn.Module]:
        """The VAE."""
        return [self.model]

    @property
    def place(self) -> tuple[int, int]:
        """Rank and world."""
        return self._comm.rank, self._comm.world

    @property
    def report(self) -> Report:
        """What ran, where there is no denoiser to report it with."""
        return Report(self._config.strategy, str(self._mesh), self._config.split, vae=dict(self.tally))

    def reset(self) -> None:
        """Count anew."""
        self.tally = {}

    def detach(self) -> None:
        """Give encoder and decoder their own forward back.

        Raises:
            ConfigError: another library has wrapped one of them since; nothing is undone then.
        """
        lost = [module for half in self._halves for module in half.lost()]
        if lost:
            raise ConfigError(
                f"{type(lost[0]).__name__} was wrapped by another library (offload, casting or cache hooks) after "
                "df.parallelize; take that off before df.restore"
            )
        self._detach()

    def _attach(self) -> None:
        self._attached.follow(self._halves)
        self.model.__deepcopy__ = self._copied

    def _detach(self) -> None:
        self._attached.detach()
        self.model.__dict__.pop("__deepcopy__", None)

    def _copied(self, memo: dict[int, Any]) -> Any:
        """A copy is a plain VAE: it may work where no other rank does."""
        marks = [name for name, value in vars(self.model).items() if value is self]
        self.detach()
        for name in marks:
            delattr(self.model, name)
        try:
            return copy.deepcopy(self.model, memo)
        finally:
            self._attach()
            for name in marks:
                setattr(self.model, name, self)

    def _record(self, kind: str, seconds: float, messages: int, num_bytes: int) -> None:
        """A picture is encoded before it is decoded: what follows a decode, and is no decode of it, is another's."""
        mark = self._timesteps()
        if "decode" in self.tally and (kind == "encode" or mark is not self._mark):
            self.tally = {}
        self._mark = mark
        self.tally[kind] = self.tally.get(kind, Tally()).and_one(seconds, messages, num_bytes)


class _ParallelHalf(Layer):
    """Encoder or decoder: whole picture in, whole picture out, the work in between by rows."""

    def __init__(
        self,
        half: Half,
        config: ParallelConfig,
        comm: Comm,
        record: Callable[[str, float, int, int], None],
        budget: Budget | None,
        products: bool,
    ) -> None:
        super().__init__(half.module, f"{half.kind}r", FrameHolder())
        self._half, self._comm, self._record = half, comm, record
        self._dim = 3 if config.split == "cols" else 2  # rows where a video's denoiser is split by frames
        self._rings = config.rings
        self._layers = Attached()
        self._left_out: Any = None  # the room for a past that the last call was not given
        self._products = products
        self._budget, self._fits = budget, dict[Any, tuple[Bands | None, Fit]]()  # by what is to fit
        self._forward = torch.compiler.disable(self._run)  # type: ignore[no-untyped-call]

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        forward: Callable[..., Any] = self._forward
        return forward

    def attach(self) -> None:
        """See Layer; with the layers below."""
        self._layers.follow(self._half.layers(self._holder))
        try:
            super().attach()
        except UnsupportedModel:
            self._layers.detach()
            raise

    def detach(self) -> None:
        """See Layer; with the layers below."""
        self._layers.detach()
        super().detach()

    def lost(self) -> list[nn.Module]:
        """Modules that another library has taken over since."""
        return ([] if self.is_attached else [self.module]) + self._layers.lost()

    def _run(self, *args: Any, **kwargs: Any) -> Tensor:
        arguments = self._without_past(bind(type(self.module).forward, self.module, args, kwargs))
        sample = next(iter(arguments.values()))  # [B, C, (frames,) H, W]
        started, counted = perf_counter(), self._comm.meter.totals()
        with torch.no_grad(), fast_products(sample, self.module) if self._products else nullcontext():
            try:
                whole = self._whole(sample, arguments)
            finally:
                self._holder.frame = None
        messages, num_bytes = self._comm.meter.totals()
        self._record(self._half.kind, perf_counter() - started, messages - counted[0], num_bytes - counted[1])
        if torch.is_grad_enabled():
            whole = _NoGradient.apply(whole, sample, next(self.module.parameters()))  # type: ignore[no-untyped-call]
        return whole

    def _without_past(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """See `Half.without_past`. A VAE makes a new list for each picture, so that frames one by one are noticed."""
        past = arguments.get("feat_cache")
        if past is not None and past is self._left_out:
            raise UnsupportedModel(
                f"{type(self._half.vae).__name__} was given the frames of a video as tensors of their own: {self.key} "
                f"took the first one for a picture; call {self._half.kind} with all frames"
            )
        found = self._half.without_past(arguments)
        self._left_out = past if found is not arguments else None
        return found

    def _whole(self, sample: Tensor, arguments: dict[str, Any]) -> Tensor:
        half, comm = self._half, self._comm
        if half.is_tiled and any(self._rings):
            raise UnsupportedModel(
                f"{type(half.vae).__name__} in tiles does not know of ends that meet; call disable_tiling()"
            )
        self._layers.follow(half.layers(self._holder))  # adapters and processors come and go
        bands = None if half.is_tiled else self._planned(sample, arguments)
        agree_on_input(comm, half.kind, sample, {"tiling": half.is_tiled, "bands": bands})
        if half.is_tiled:  # one patch, whatever the world
            frame = Frame(0, self._dim, half.levels(sample, 1, self._dim), Absent(0))
        else:
            frame = Frame(comm.rank, self._dim, half.levels(sample, comm.world, self._dim, self._rings), Fresh(comm))
        self._holder.frame = frame
        frame.exchange.begin()
        own = run_half(half, self._holder, frame, arguments, bands)
        frame.exchange.finish()
        split = frame.levels.splits[half.level_out(frame.levels)]
        return own if half.is_tiled else whole(own, split, own.ndim - 4 + self._dim, comm)

    def _planned(self, sample: Tensor, arguments: dict[str, Any]) -> Bands | None:
        """In how many bands the call fits into the budget.

        Raises:
            ConfigError: in none.
        """
        if self._budget is None:
            return None
        past = arguments.get("feat_cache") or ()
        kept = tuple(each.shape[2] if isinstance(each, Tensor) else each for each in past)  # frames
        num_calls = self._half.num_calls(arguments) if past else 1
        key = sample.shape, sample.dtype, self._budget.room, kept, num_calls
        if key not in self._fits:
            levels = self._half.levels(sample, self._comm.world, self._dim, self._rings)
            self._fits[key] = half_fit(self._half, self._holder, levels, self._dim, arguments, self._budget)
        bands, fit = self._fits[key]
        self._budget.accept(fit)
        return bands


class _NoGradient(torch.autograd.Function):
    """The identity; asking for a gradient through it is refused, where else it would be missing without a word."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, *inputs: Tensor) -> Tensor:
        """``whole``, which requires a gradient where one of ``inputs`` does, as on one device."""
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """See the class."""
        raise UnsupportedModel("a VAE gives no gradients while it is parallel; call df.restore on it first")
