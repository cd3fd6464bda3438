"""Transformers of videos: tokens of all frames in one sequence, split by the rows or columns of every frame."""

from __future__ import annotations

from ..transformer import Plan

VIDEO: tuple[Plan, ...] = ()
