"""``distrifusion compare``: the pictures of strategies beside those of one device, measured, in a folder."""

from .command import compare

__all__ = ["compare"]
