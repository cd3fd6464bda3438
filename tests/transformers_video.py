"""Tiny transformers of videos: see transformers_tiny.py."""

from __future__ import annotations

from transformers_tiny import Tiny

VIDEO: dict[str, Tiny] = {}
