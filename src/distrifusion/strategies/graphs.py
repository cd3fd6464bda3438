"""Steps that are recorded once and played from then on: CUDA graphs of what the device does between two messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ..comm import Comm
from ..comm.cut import CutComm
from ..comm.slots import Slots
from ..comm.tape import RECORDERS, Recorder, Tape
from ..config import ParallelConfig
from ..errors import ConfigError, DistrifusionError, UnsupportedModel
from ..layers import Frame
from ..models import Call


def cut_comm(config: ParallelConfig, patches: Comm) -> CutComm | None:
    """The ranks that share a picture, for steps that are recorded; None where none are.

    Raises:
        ConfigError: ranks on a device whose work cannot be recorded.
    """
    if not config.cuda_graphs or patches.world == 1:
        return None
    if patches.device.type not in RECORDERS:
        raise ConfigError(f"cuda_graphs=True needs ranks on CUDA devices, not on {patches.device.type!r}: leave it out")
    return CutComm(patches)


class _Inputs:
    """Arguments of the model in memory of their own, so that each step's lie where the first one's lay."""

    def __init__(self, leaves: list[Any], spec: Any) -> None:
        self.spec = spec
        self.leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._signature = list(map(_kind, leaves))
        self._marks = [_mark(leaf) for leaf in leaves]
        self._held = list(leaves)  # so that no other tensor comes to lie where one of these did

    def fits(self, leaves: list[Any], spec: Any) -> bool:
        """Whether these arguments differ in values of tensors only."""
        return bool(self.spec == spec) and self._signature == list(map(_kind, leaves))

    def fill(self, leaves: list[Any]) -> None:
        """Take the values of a step; tensors that are as they were are not copied."""
        for i, (own, leaf) in enumerate(zip(self.leaves, leaves, strict=True)):
            if isinstance(leaf, Tensor) and (leaf.is_inference() or self._marks[i] != _mark(leaf)):
                own.copy_(leaf)
                self._marks[i], self._held[i] = _mark(leaf), leaf

    @property
    def arguments(self) -> dict[str, Any]:
        """What to call the model with."""
        found: dict[str, Any] = tree_unflatten(self.leaves, self.spec)
        return found


@dataclass
class _Recorded:
    tape: Tape
    result: Any  # tensors that are overwritten by the next playing
    ragged: Any  # see Frame
    due: Any  # see Slots


class Graphs:
    """The steps of one branch of a picture, on one rank.

    A step of a kind runs as it is the first time, which warms libraries up and opens routes, is recorded the second
    time, and played from then on. Other shapes, or other arguments that are no tensors, are another kind.

    Args:
        comm: through which the step's policy talks.
        name: of the model's class, for errors.
    """

    def __init__(self, comm: CutComm, name: str) -> None:
        self._comm, self._name = comm, name
        # Memory for all kinds: they are never played at once, and what one leaves to another is held by name.
        self._recorder: Recorder = RECORDERS[comm.device.type](comm.device)
        self._inputs: list[_Inputs] = []
        self._kinds: dict[tuple[str, int], _Recorded | None] = {}

    def run(
        self,
        kind: str,
        model: Callable[..., Any],
        call: Call,
        frame: Frame,
        slots: Slots | None,
    ) -> Any:
        """What ``model(**call.arguments)`` gives, in memory of its own.

        Args:
            kind: of the step; steps of a kind do the same, but for values.
            model: of diffusers, with layers that ask ``frame``.
            call: tensors, numbers, and nested lists and dicts of them.
            frame: of this step.
            slots: of this branch, where there are any.

        Raises:
            UnsupportedModel: the model looks at values on the host, or else cannot be recorded.
        """
        # What a step leaves behind is written to in whatever mode the caller's next step runs.
        with torch.inference_mode(False), torch.no_grad():
            inputs = self._filled(call)
            key = kind, self._inputs.index(inputs)
            if key not in self._kinds:
                self._kinds[key] = None
                return model(**inputs.arguments)
            recorded = self._kinds[key]
            if recorded is None:
                recorded = self._kinds[key] = self._record(model, inputs, frame, slots)
            else:
                recorded.tape.play()
                frame.ragged = recorded.ragged
                if slots is not None:
                    slots.due = recorded.due
            return tree_map_only(Tensor, Tensor.clone, recorded.result)

    def _filled(self, call: Call) -> _Inputs:
        if isinstance(call.time, int | float):  # another one in each step: as the tensor that models make of it
            dtype = torch.float64 if isinstance(call.time, float) else torch.int64
            call = call.at(torch.tensor(call.time, dtype=dtype))
        leaves, spec = tree_flatten(call.arguments)
        leaves = [leaf.to(self._comm.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for inputs in self._inputs:
            if inputs.fits(leaves, spec):
                inputs.fill(leaves)
                return inputs
        self._inputs.append(_Inputs(leaves, spec))
        return self._inputs[-1]

    def _record(self, model: Callable[..., Any], inputs: _Inputs, frame: Frame, slots: Slots | None) -> _Recorded:
        tape = Tape(self._recorder)
        try:
            with self._comm.on(tape):
                result = tape.record(lambda: model(**inputs.arguments))
        except DistrifusionError:
            raise
        except RuntimeError as failure:  # torch's, of a capture that something has made invalid
            why = (str(failure).splitlines() or [type(failure).__name__])[0]
            raise UnsupportedModel(
                f"cuda_graphs=True: {self._name} cannot be recorded ({why}); leave it out"
            ) from failure
        return _Recorded(tape, result, frame.ragged, slots.due if slots is not None else None)


def _mark(leaf: Any) -> Any:
    """Equal for one tensor that was not written to; inference tensors do not count writes."""
    if not isinstance(leaf, Tensor) or leaf.is_inference():
        return None
    return leaf.data_ptr(), leaf.shape, leaf.stride(), leaf._version


def _kind(leaf: Any) -> Any:
    """What has to be equal in all steps that are played."""
    return (leaf.shape, leaf.dtype, leaf.stride()) if isinstance(leaf, Tensor) else (type(leaf), leaf)
