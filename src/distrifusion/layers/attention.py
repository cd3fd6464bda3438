"""Attention of a patch to the whole picture: own queries, everyone's keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..comm import Pending
from ..errors import UnsupportedModel
from ..geometry import Nearby, Span, halo
from ..products import without_products
from .base import Frame, FrameHolder, Layer
from .merge import attend_own_first, can_merge

MaskToTokens = Callable[[Tensor, int, int, int], Tensor]
"""(mask [B, H, W], batch, tokens, channels) -> [B, tokens, channels]: IP-Adapter's way to a level's size."""


class PatchAttention(Layer):
    """A diffusers ``Attention`` over the image tokens ``[B, tokens, C]`` or ``[B, C, rows, W]`` of a patch, own in,
    own out.

    The processor that the user set runs as it is, on a view of the module whose ``to_k`` and ``to_v`` answer for the
    whole picture. K and V are those of the module at this moment, so a LoRA loaded later counts. Attention does not
    depend on the order of keys, so the parts are put one after the other by rank, for columns as for rows.
    Cross-attention to text needs nothing from the peers.

    ``only_calls_processor``: the module's own forward does nothing else, but to look up in each call which of the
    further arguments the processor takes.
    """

    def __init__(
        self,
        module: nn.Module,
        key: str,
        holder: FrameHolder,
        *,
        level: int,
        mask_to_tokens: MaskToTokens | None = None,
        only_calls_processor: bool = False,
    ) -> None:
        super().__init__(module, key, holder)
        self.level = level
        self._mask_to_tokens = mask_to_tokens
        self._only_calls_processor = only_calls_processor

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        frame, attn = self.frame, self.module
        to_image = encoder_hidden_states is None or attn.added_kv_proj_dim is not None
        if to_image and attention_mask is not None:
            raise UnsupportedModel(
                f"{self.key}: attention_mask over image tokens is not known in patches; leave it out"
            )
        if not hidden_states.numel():
            return self._without_tokens(frame, hidden_states, to_image)
        if kwargs.get("ip_adapter_masks") is not None:
            kwargs["ip_adapter_masks"] = self._own_masks(frame, kwargs["ip_adapter_masks"])
        view = _View(attn, self, frame) if to_image and not attn.only_cross_attention else attn
        # A graph must not depend on the kind of the exchange: one serves all steps.
        if view is attn or torch.compiler.is_compiling() or not self._is_own_first(frame):
            return self._attend(view, hidden_states, encoder_hidden_states, attention_mask, kwargs)
        with _OwnFirst(view, frame.patch):
            return self._attend(view, hidden_states, encoder_hidden_states, attention_mask, kwargs)

    def _attend(self, view: Any, x: Tensor, text: Tensor | None, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        """The module's own forward."""
        output: Tensor
        if kwargs or not self._only_calls_processor:
            output = self.plain(view, x, text, mask, **kwargs)
        else:
            output = view.processor(view, x, encoder_hidden_states=text, attention_mask=mask)
        return output

    def _is_own_first(self, frame: Frame) -> bool:
        """Whether own tokens are attended to while the peers' travel: by the one processor that is known to ask torch
        for it, of the keys as they are.
        """
        is_known = type(self.module.processor).__name__ == "AttnProcessor2_0" and self.module.norm_k is None
        return frame.exchange.is_slow and frame.context_window is None and is_known

    @without_products
    def gather(self, frame: Frame, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, all tokens, C]`` from the own ones ``[B, tokens, C]``, as one message.

        With a context window: own tokens, and those of the neighbours that lie in it.
        """
        if torch.compiler.is_compiling():
            k, v = self.ask([k, v], [self._num_keys(frame)] * 2, 1)
            return k, v
        if frame.context_window is not None:
            return self._nearby(frame, frame.context_window, k, v)
        parts = self.launch(frame, k, v).wait()
        return torch.cat([part[0] for part in parts], dim=1), torch.cat([part[1] for part in parts], dim=1)

    def launch(self, frame: Frame, k: Tensor, v: Tensor) -> Pending[list[Sequence[Tensor]]]:
        """Everyone's keys and values, on their way."""
        return frame.exchange.gather(self.key, (k, v), frame.num_tokens(self.level), 1, level=self.level)

    def answer(self, tensors: list[Tensor], dim: int, question: int) -> Sequence[Tensor]:
        """See Layer."""
        return self.gather(self.frame, *tensors)

    def _num_keys(self, frame: Frame) -> int:
        """How many tokens there are in what `gather` returns."""
        sizes, split = frame.num_tokens(self.level), frame.split(self.level)
        own = split.span(frame.patch)
        if not frame.sees_peers:
            return sizes[frame.patch] + frame.num_remembered(self.level)
        if frame.context_window is None:
            return sum(sizes)
        rows = Nearby(split, frame.context_window).reads(own) if len(own) else own
        rows = rows if split.is_ring else rows & Span(0, split.size)
        return len(rows) * frame.levels.across[self.level]

    def _nearby(self, frame: Frame, share: float, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        split, width = frame.split(self.level), k.shape[-1]
        plan = halo(split, split, Nearby(split, share), frame.patch)
        if not plan.links:
            return k, v
        sides = frame.sides(self.level, len(split.span(frame.patch)))
        grid = torch.cat([k, v], dim=-1).view(k.shape[0], *sides, 2 * width)  # [B, H, W, C + C] of the own patch
        received = frame.exchange.neighbours(self.key, grid, plan, frame.dim - 1, kind="context").wait()
        tokens = [rows.flatten(1, 2) for rows in received.values()]
        return (
            torch.cat([k, *(part[..., :width] for part in tokens)], dim=1),
            torch.cat([v, *(part[..., width:] for part in tokens)], dim=1),
        )

    def _without_tokens(self, frame: Frame, x: Tensor, to_image: bool) -> Tensor:
        """A rank whose patch has no rows at this level still takes part in what its peers gather."""
        attn = self.module
        if to_image and attn.group_norm is not None:
            attn.group_norm(x.flatten(2) if x.ndim == 4 else x.transpose(1, 2))
        if to_image and not attn.only_cross_attention:
            tokens = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
            self.gather(frame, attn.to_k(tokens), attn.to_v(tokens))
        return x

    def _own_masks(self, frame: Frame, masks: Any) -> list[Tensor | None]:
        """Own rows of IP-Adapter's masks ``[1, images, H, W]``, brought to this level's size over the whole picture.

        They are ``[1, images, 1, tokens]``: the processor works the sides out again from their quotient and the
        number of tokens, which rounding can spoil for a patch; of one row it cannot.
        """
        assert self._mask_to_tokens is not None, "this model's table does not know IP-Adapter masks"
        split, across = frame.split(self.level), frame.levels.across[self.level]
        own: list[Tensor | None] = []
        for mask in masks if isinstance(masks, list) else list(masks.unsqueeze(1)):
            if mask is None:
                own.append(None)
                continue
            images = []
            for image in range(mask.shape[1]):
                tokens = self._mask_to_tokens(mask[:, image], mask.shape[0], split.size * across, 1)
                whole = tokens.view(mask.shape[0], *frame.sides(self.level, split.size))
                images.append(frame.own(self.level, whole, frame.dim - 1).flatten(1)[:, None])
            own.append(torch.stack(images, dim=1))
        return own


class _View:
    """The Attention module as its processor sees it during one call."""

    def __init__(self, attn: Any, layer: PatchAttention, frame: Frame) -> None:
        self._attn, self._layer, self._frame = attn, layer, frame
        self._tokens: Tensor | None = None  # of the last to_k
        self._values: Tensor | None = None
        self.is_own_first = False
        self.pending: Pending[list[Sequence[Tensor]]] | None = None  # what the own keys and values are waiting for

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    def to_k(self, tokens: Tensor) -> Tensor:
        """Keys of the whole picture; the values of the same tokens come in the same message."""
        k: Tensor = self._attn.to_k(tokens)
        self._values = self._attn.to_v(tokens)
        if self.is_own_first:
            self.pending = self._layer.launch(self._frame, k, self._values)
        else:
            k, self._values = self._layer.gather(self._frame, k, self._values)
        self._tokens = tokens
        return k

    def to_v(self, tokens: Tensor) -> Tensor:
        """Values of the whole picture; for other tokens than the keys' (PAG's identity branch) just their own."""
        if tokens is self._tokens and self._values is not None:
            return self._values
        own: Tensor = self._attn.to_v(tokens)
        return own


class _OwnFirst(TorchFunctionMode):
    """While the module runs in this thread: its attention begins with own keys, and the peers' follow."""

    def __init__(self, view: _View, patch: int) -> None:
        super().__init__()
        view.is_own_first = True
        self._view, self._patch = view, patch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention or self._view.pending is None:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """With keys ``[B, heads, own, D]``, whose peers' travel as ``[B, n, heads x D]``."""
        pending, self._view.pending = self._view.pending, None
        assert pending is not None

        def others() -> tuple[Tensor, Tensor]:
            parts = [part for rank, part in enumerate(pending.wait()) if rank != self._patch]
            k, v = (torch.cat([part[i] for part in parts], 1) for i in (0, 1))
            heads = (*k.shape[:2], *key.shape[1::2])  # [B, n, heads, D]
            return k.view(heads).transpose(1, 2), v.view(heads).transpose(1, 2)

        if can_merge(query, key, value, *args, **kwargs):
            return attend_own_first(query, key, value, others, kwargs.get("scale"))
        k, v = others()
        k, v = torch.cat([key, k], 2), torch.cat([value, v], 2)
        result: Tensor = F.scaled_dot_product_attention(query, k, v, *args, **kwargs)
        return result
