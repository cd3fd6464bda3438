"""Attention masks of a patch: the model makes them for own tokens of the picture, and the keys are everyone's."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from ..errors import UnsupportedModel
from ..geometry import Split
from .base import Frame
from .tokens import TOKENS, Place, Tokens


def widened(mask: Tensor, frame: Frame, place: Place, num_own: int, num_keys: int, name: str) -> Tensor:
    """An attention mask ``[..., keys]`` for ``num_own`` own tokens -> for all ``num_keys``, as `PatchSeam` orders them.

    Image tokens are never masked by themselves, so those of the peers get the value of the first own one, for each
    query where there is a row for each. A mask for all queries that was made for the whole picture stays. Where the
    ranks share out the text, the mask is made for all of it, in its rows too if there is one for each query.

    Args:
        mask: of any dtype.
        frame: the present one.
        place: of image tokens.
        num_own: keys of this rank.
        num_keys: keys in all.
        name: of the seam.

    Raises:
        UnsupportedModel: a mask with a row for each query of the whole picture.
    """
    is_for_all = mask.ndim < 3 or mask.shape[-2] == 1
    if frame.words is not None:
        return _of_shared_words(mask, frame, frame.words, num_own, is_for_all, name)
    if mask.shape[-1] == num_keys and (is_for_all or num_keys == num_own):
        return mask
    if mask.shape[-1] != num_own or not (is_for_all or mask.shape[-2] == num_own):
        raise UnsupportedModel(
            f"{name}: an attention mask of shape {tuple(mask.shape)} goes across patches; only one that hides "
            "text tokens, such as [batch, 1, 1, keys], is known"
        )
    num_image = frame.num_keys(TOKENS, has_words=False)[frame.patch]
    image, joined = Tokens(mask.ndim - 1, place).exchanged(mask, num_image, frame)
    return joined([image[..., :1].expand(*image.shape[:-1], num_image + num_keys - num_own)])


def _of_shared_words(mask: Tensor, frame: Frame, words: Split, num_own: int, is_for_all: bool, name: str) -> Tensor:
    own = words.span(frame.patch)
    num_image = num_own - len(own)
    num_made = words.size + num_image
    if mask.shape[-1] != num_made or not (is_for_all or mask.shape[-2] == num_made):
        raise UnsupportedModel(
            f"{name}: an attention mask of shape {tuple(mask.shape)} goes across patches; only one of {words.size} "
            f"tokens of text and {num_image} of the patch is known"
        )
    if not is_for_all:
        of_words, of_image = torch.split(mask, [words.size, num_image], -2)
        mask = torch.cat([of_words.narrow(-2, own.start, len(own)), of_image], -2)
    text, image = torch.split(mask, [words.size, num_image], -1)
    shares = zip(torch.split(text, list(words.sizes), -1), frame.num_keys(TOKENS, has_words=False), strict=True)
    parts = [(share, image[..., :1].expand(*image.shape[:-1], size)) for share, size in shares]
    guests = image[..., :1].expand(*image.shape[:-1], frame.num_common_guests)
    return torch.cat([*chain.from_iterable(parts), guests], -1)
