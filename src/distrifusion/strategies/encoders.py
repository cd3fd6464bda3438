"""Text encoders that run on one rank, which tells the others; on request that rank alone holds them in memory."""

from __future__ import annotations

import hashlib
import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from ..comm import Comm
from ..errors import ConfigError, DistrifusionError
from .agreement import agree
from .freed import Freed
from .taken import TakenForward


class SharedEncoder:
    """Takes over ``module.forward`` until ``detach``: rank ``owner`` runs it, all ranks get what it gives.

    Calls that go on from an earlier one (``past_key_values``, as ``generate`` makes them) run on every rank, since a
    cache does not travel; nor does the cache that a language model gives by default.

    Args:
        module: the encoder, in the same state on every rank.
        name: what to call it in messages, such as ``text_encoder_2``.
        comm: all ranks.
        owner: the rank that runs it.
        freed: the other ranks give up its matrices until ``detach``. Vectors stay: pipelines that skip CLIP layers
            apply its last norm themselves.
    """

    def __init__(self, module: nn.Module, name: str, comm: Comm, owner: int, *, freed: bool = False) -> None:
        self._name = name
        self._comm = comm
        self._owner = owner
        self._taken = TakenForward(module)
        self._taken.take(self._forward)
        # On their device, in their dtype: pipelines ask for both.
        self._freed = Freed(
            [weight for weight in module.parameters() if weight.dim() > 1] if freed else [], comm, owner
        )

    def detach(self) -> None:
        """Give the module its own forward back. Collective where its memory was freed: the owner sends it again.

        Raises:
            ConfigError: another library has wrapped the module since; nothing is undone then.
        """
        if not self._taken.is_ours:
            raise ConfigError(f"the forward of {self._name} was replaced since df.parallelize; take that back first")
        self._freed.give_back()
        self._taken.give_back()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None:
            if self._freed:
                raise ConfigError(
                    f"{self._name} is asked to go on from a cache, which text_encoders='freed' cannot do: "
                    "use text_encoders='once'"
                )
            return self._taken.own(*args, **kwargs)
        agree(self._comm, {f"input of {self._name} (the prompt)": _digest((args, kwargs))})
        if self._comm.rank == self._owner:
            return self._tell(args, kwargs)
        frame, facts = self._comm.broadcast_object(None, self._owner)
        if facts is None:
            raise DistrifusionError(f"{self._name} failed on rank {self._owner}: {frame}")
        received = [torch.empty(shape, dtype=dtype, device=self._comm.device) for shape, dtype in facts]
        for tensor in received:
            self._comm.broadcast(tensor, self._owner)
        return _put_together(frame, received)

    def _tell(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            made = self._taken.own(*args, **kwargs)
            frame, tensors = _taken_apart(made)
        except Exception as error:
            self._comm.broadcast_object((f"{type(error).__name__}: {error}", None), self._owner)
            raise
        self._comm.broadcast_object((frame, [(tensor.shape, tensor.dtype) for tensor in tensors]), self._owner)
        for tensor in tensors:
            self._comm.broadcast(tensor.detach().contiguous(), self._owner)
        return made


def _taken_apart(made: Any) -> tuple[bytes, list[Tensor]]:
    """The frame of an encoder's output, pickled without its tensors, and the tensors, each once."""
    tensors: dict[int, Tensor] = {}

    class Frame(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, Tensor):
                tensors.setdefault(id(value), value)
                return list(tensors).index(id(value))
            return "cache" if hasattr(value, "get_seq_length") else None  # transformers' Cache: nobody goes on from it

    file = io.BytesIO()
    Frame(file).dump(made)
    return file.getvalue(), list(tensors.values())


def _put_together(frame: bytes, tensors: list[Tensor]) -> Any:
    class Whole(pickle.Unpickler):
        def persistent_load(self, key: Any) -> Any:
            return None if key == "cache" else tensors[key]

    return Whole(io.BytesIO(frame)).load()


def _digest(arguments: Any) -> str:
    """A short name for the tokens of a call: equal on ranks that were given the same prompt."""
    found = hashlib.sha256()
    for tensor in _taken_apart(arguments)[1]:
        if not tensor.is_floating_point():
            found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]
