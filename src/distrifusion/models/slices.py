"""What of a model is cut into slices of weights, by the classes of its blocks: for strategy='tensor'.

Attention by heads, feed-forward by hidden features, resnets by groups of their second norm, samplers by channels. What
no rule names runs whole on every rank, with the same input and the same result, so it is always right: embeddings,
modulations, norms, 1 x 1 convolutions around transformers, shortcuts, the first and the last convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
from diffusers.models import attention_processor as processors
from diffusers.models.attention import FeedForward, LuminaFeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.normalization import RMSNorm
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers import (
    auraflow_transformer_2d,
    sana_transformer,
    transformer_chroma,
    transformer_cogview4,
    transformer_flux,
    transformer_flux2,
    transformer_hunyuan_video,
    transformer_longcat_image,
    transformer_ltx,
    transformer_lumina2,
    transformer_ovis_image,
    transformer_qwenimage,
    transformer_wan,
    transformer_z_image,
)
from diffusers.models.upsampling import Upsample2D
from torch import nn

from ..errors import UnsupportedModel
from ..geometry import Span, Split
from ..layers import FrameHolder, JoinedSlice, Layer, Sliced, SlicedNorm
from ..layers.slices import Features, number_of
from .cutter import Cutter, behind, in_features, out_features, parts, repeated, wide
from .known import PROCESSORS
from .unet import FAMILIES
from .walk import check_module, unsupported

COVERED: tuple[type[nn.Module], ...] = (
    *FAMILIES,
    diffusers.PixArtTransformer2DModel,
    diffusers.DiTTransformer2DModel,
    diffusers.HunyuanDiT2DModel,
    diffusers.SanaTransformer2DModel,
    diffusers.SD3Transformer2DModel,
    diffusers.FluxTransformer2DModel,
    diffusers.ChromaTransformer2DModel,
    diffusers.OvisImageTransformer2DModel,
    diffusers.LongCatImageTransformer2DModel,
    diffusers.Flux2Transformer2DModel,
    diffusers.QwenImageTransformer2DModel,
    diffusers.AuraFlowTransformer2DModel,
    diffusers.CogView3PlusTransformer2DModel,
    diffusers.CogView4Transformer2DModel,
    diffusers.Lumina2Transformer2DModel,
    diffusers.ZImageTransformer2DModel,
    diffusers.WanTransformer3DModel,
    diffusers.WanVACETransformer3DModel,
    diffusers.LTXVideoTransformer3DModel,
    diffusers.CogVideoXTransformer3DModel,
    diffusers.HunyuanVideoTransformer3DModel,
)
"""Models whose blocks are all known here."""

_BY_HEADS: tuple[type, ...] = (
    *(each for each in PROCESSORS if each is not processors.AttnAddedKVProcessor2_0),
    processors.JointAttnProcessor2_0,
    processors.AuraFlowAttnProcessor2_0,
    processors.CogVideoXAttnProcessor2_0,
    processors.HunyuanAttnProcessor2_0,
    processors.SanaLinearAttnProcessor2_0,
    sana_transformer.SanaAttnProcessor2_0,
    transformer_cogview4.CogView4AttnProcessor,
    transformer_flux.FluxAttnProcessor,
    transformer_flux2.Flux2AttnProcessor,
    transformer_flux2.Flux2ParallelSelfAttnProcessor,
    transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0,
    transformer_longcat_image.LongCatImageAttnProcessor,
    transformer_ltx.LTXVideoAttnProcessor,
    transformer_lumina2.Lumina2AttnProcessor2_0,
    transformer_ovis_image.OvisImageAttnProcessor,
    transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0,
    transformer_wan.WanAttnProcessor,
    transformer_z_image.ZSingleStreamAttnProcessor,
)
"""Processors that treat each head alone, and ask the module how many there are."""

_ADVICE: dict[type, str] = {
    processors.AttnAddedKVProcessor2_0: ", since it takes their number from the picture; set AttnAddedKVProcessor()"
}

_NORMS = (nn.RMSNorm, RMSNorm)


def sliced_layers(model: Any, rank: int, num_ranks: int, holder: FrameHolder) -> Iterator[Layer]:
    """The layers of ``model`` of which ``rank`` has a slice, not attached.

    Raises:
        ConfigError: fewer heads, groups or features than ranks.
        UnsupportedModel: a class that is not known in slices, with those that are; or an attention, an adapter or a
            dropout that would be computed wrongly.
    """
    if type(model) not in COVERED:
        known = ", ".join(each.__name__ for each in COVERED)
        raise UnsupportedModel(f"strategy='tensor' does not know {type(model).__name__}; it knows {known}")
    cutter = Cutter(rank, num_ranks, holder)
    for name, module in model.named_modules():
        if module is not model:
            check_module(module, name)
        rule = _RULES.get(type(module))
        if rule is not None:
            yield from rule(cutter, module, name)
        elif hasattr(module, "processor"):
            raise unsupported(module, name, "is an attention that is not known in slices of its weights")


def fused(model: Any) -> frozenset[str]:
    """Modules into whose weights an adapter is fused: with slices of them, it is fused into these alone."""
    return frozenset(name for name, module in model.named_modules() if getattr(module, "merged", False) is True)


Rule = Callable[[Cutter, Any, str], Iterator[Layer]]


@dataclass(frozen=True)
class _Heads:
    """Heads of an attention, of ``width`` features. Each of their keys serves ``queries`` of them."""

    inner: int  # features of all heads
    width: int
    queries: int
    own_keys: Span

    @property
    def features(self) -> Features:
        """Own features of queries."""
        return (wide(self.own_keys, self.queries * self.width),)

    @property
    def key_features(self) -> Features:
        """Own features of keys and values."""
        return (wide(self.own_keys, self.width),)

    def numbers(self, attn: Any) -> dict[str, int]:
        """What the attention is to say of its own heads."""
        num_keys = len(self.own_keys)
        own = {"heads": num_keys * self.queries, "inner_dim": num_keys * self.queries * self.width}
        return own | ({"inner_kv_dim": num_keys * self.width} if hasattr(attn, "inner_kv_dim") else {})


def _heads(cut: Cutter, attn: Any, name: str) -> _Heads:
    """Own heads.

    Raises:
        ConfigError: fewer heads, or keys, than ranks.
        UnsupportedModel: a processor that is not known.
    """
    processor, is_fused = type(attn.processor), getattr(attn, "fused_projections", False)
    if processor not in _BY_HEADS or is_fused:
        advice = "; call unfuse_qkv_projections()" if is_fused else _ADVICE.get(processor, "")
        why = f"has the processor {processor.__name__}, which is not known in slices of the weights{advice}"
        raise unsupported(attn, name, why)
    heads, inner = number_of(attn, "heads"), number_of(attn, "inner_dim")
    width = inner // heads
    num_keys = number_of(attn, "inner_kv_dim") // width if hasattr(attn, "inner_kv_dim") else heads
    own = cut.own(num_keys, "heads" if num_keys == heads else "heads with keys of their own", name)
    return _Heads(inner, width, heads // num_keys, own)


def _attention(cut: Cutter, attn: Any, name: str) -> Iterator[Layer]:
    heads = _heads(cut, attn, name)
    for child in ("to_q", "add_q_proj"):
        yield from cut.made(getattr(attn, child, None), f"{name}.{child}", heads.features)
    for child in ("to_k", "to_v", "add_k_proj", "add_v_proj"):
        yield from cut.made(getattr(attn, child, None), f"{name}.{child}", heads.key_features)
    for child in ("to_k_ip", "to_v_ip"):  # of an IP-Adapter
        for i, each in enumerate(getattr(attn.processor, child, None) or ()):
            yield from cut.made(each, f"{name}.processor.{child}.{i}", heads.key_features)
    for child in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        yield from _norm(cut, getattr(attn, child, None), f"{name}.{child}", heads)
    if getattr(attn, "to_out", None) is not None:
        yield from cut.read(attn.to_out[0], f"{name}.to_out.0", heads.features)
    yield from cut.read(getattr(attn, "to_add_out", None), f"{name}.to_add_out", heads.features)
    # LTX turns queries and keys before it knows their heads.
    arguments = {"image_rotary_emb": heads.features} if isinstance(attn, transformer_ltx.LTXAttention) else None
    yield Sliced(attn, name, cut.holder, numbers=heads.numbers(attn), arguments=arguments)


def _norm(cut: Cutter, norm: Any, name: str, heads: _Heads) -> Iterator[Layer]:
    """Of queries or keys: most are over each head alone."""
    shape = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None)
    if not isinstance(shape, tuple) or shape == (heads.width,):
        return
    if not isinstance(norm, _NORMS) or shape != (heads.inner,) or norm.weight is None:
        raise unsupported(norm, name, "is over the features of all heads, which is known of RMS norms only")
    yield SlicedNorm(norm, name, cut.holder, size=heads.inner, slices={"weight": (heads.features, 0)})


def _between(*names: str) -> Rule:
    """Of a feed-forward: layers to its hidden features, or to twice as many for a gate; the last one reads them."""
    *made, read = names

    def rule(cut: Cutter, module: Any, name: str) -> Iterator[Layer]:
        size = in_features(module.get_submodule(read))
        own = cut.own(size, "features", name)
        for child in made:
            layer = module.get_submodule(child)
            yield from cut.made(layer, f"{name}.{child}", repeated(own, size, out_features(layer) // size))
        yield from cut.read(module.get_submodule(read), f"{name}.{read}", (own,))

    return rule


def _sana_feed_forward(cut: Cutter, module: Any, name: str) -> Iterator[Layer]:
    yield from _between("conv_inverted", "conv_point")(cut, module, name)
    size = in_features(module.conv_point)
    own = repeated(cut.own(size, "features", name), size, 2)
    yield from cut.made(module.conv_depth, f"{name}.conv_depth", own, groups=sum(map(len, own)))


def _single_block(cut: Cutter, block: Any, name: str) -> Iterator[Layer]:
    """Attention and feed-forward side by side, with one layer behind both."""
    heads = _heads(cut, block.attn, f"{name}.attn")
    size = in_features(block.proj_out) - heads.inner
    hidden = cut.own(size, "features", f"{name}.proj_mlp")
    made = repeated(hidden, size, out_features(block.proj_mlp) // size)
    yield from cut.made(block.proj_mlp, f"{name}.proj_mlp", made)
    yield from cut.read(block.proj_out, f"{name}.proj_out", (*heads.features, behind(hidden, heads.inner)))
    if hasattr(block, "mlp_hidden_dim"):
        yield Sliced(block, name, cut.holder, numbers={"mlp_hidden_dim": len(hidden)})


def _flux2_single(cut: Cutter, attn: Any, name: str) -> Iterator[Layer]:
    """The same, with one layer before both, too."""
    heads, size = _heads(cut, attn, name), number_of(attn, "mlp_hidden_dim")
    hidden = cut.own(size, "features", name)
    made = repeated(heads.features[0], heads.inner, 3)
    made += tuple(behind(span, 3 * heads.inner) for span in repeated(hidden, size, attn.mlp_mult_factor))
    yield from cut.made(attn.to_qkv_mlp_proj, f"{name}.to_qkv_mlp_proj", made)
    yield from cut.read(attn.to_out, f"{name}.to_out", (*heads.features, behind(hidden, heads.inner)))
    # By which its processor divides what was made.
    yield Sliced(attn, name, cut.holder, numbers={**heads.numbers(attn), "mlp_hidden_dim": len(hidden)})


def _resnet(cut: Cutter, block: Any, name: str) -> Iterator[Layer]:
    """The second norm is between the layers that are cut, so that no group may lie on two ranks."""
    norm, count = block.norm2, number_of(block.norm2, "num_groups")
    groups, width = cut.own(count, "groups", f"{name}.norm2"), norm.num_channels // count
    own = wide(groups, width)
    yield from cut.made(block.conv1, f"{name}.conv1", (own,))
    if block.time_emb_proj is not None:
        size = norm.num_channels
        times = repeated(own, size, out_features(block.time_emb_proj) // size)
        yield from cut.made(block.time_emb_proj, f"{name}.time_emb_proj", times)
    slices = dict.fromkeys(("weight", "bias"), ((own,), 0))
    yield Sliced(norm, f"{name}.norm2", cut.holder, slices=slices, numbers={"num_groups": len(groups)})
    yield from cut.read(block.conv2, f"{name}.conv2", (own,))


def _sampler(cut: Cutter, sampler: Any, name: str) -> Iterator[Layer]:
    for child, module in sampler.named_children():
        if not isinstance(getattr(module, "base_layer", module), nn.Conv2d):
            continue  # pooling, a norm, a transposed convolution
        for key, conv in parts(module, f"{name}.{child}", None):
            own = (cut.own(conv.out_channels, "channels", key),)
            slices = {"weight": (own, 0), **({"bias": (own, 0)} if conv.bias is not None else {})}
            sizes = Split.even(conv.out_channels, cut.num_ranks).sizes
            yield JoinedSlice(conv, key, cut.holder, sizes=sizes, slices=slices)


_RULES: dict[type, Rule] = {
    Attention: _attention,
    transformer_flux.FluxAttention: _attention,
    transformer_flux2.Flux2Attention: _attention,
    transformer_ovis_image.OvisImageAttention: _attention,
    transformer_longcat_image.LongCatImageAttention: _attention,
    transformer_ltx.LTXAttention: _attention,
    transformer_wan.WanAttention: _attention,
    transformer_flux2.Flux2ParallelSelfAttention: _flux2_single,
    transformer_flux.FluxSingleTransformerBlock: _single_block,
    transformer_chroma.ChromaSingleTransformerBlock: _single_block,
    transformer_ovis_image.OvisImageSingleTransformerBlock: _single_block,
    transformer_longcat_image.LongCatImageSingleTransformerBlock: _single_block,
    transformer_hunyuan_video.HunyuanVideoSingleTransformerBlock: _single_block,
    transformer_hunyuan_video.HunyuanVideoTokenReplaceSingleTransformerBlock: _single_block,
    FeedForward: _between("net.0.proj", "net.2"),
    transformer_flux2.Flux2FeedForward: _between("linear_in", "linear_out"),
    auraflow_transformer_2d.AuraFlowFeedForward: _between("linear_1", "linear_2", "out_projection"),
    LuminaFeedForward: _between("linear_1", "linear_3", "linear_2"),
    transformer_z_image.FeedForward: _between("w1", "w3", "w2"),
    sana_transformer.GLUMBConv: _sana_feed_forward,
    ResnetBlock2D: _resnet,
    Upsample2D: _sampler,
    Downsample2D: _sampler,
}
