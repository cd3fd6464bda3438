"""``distrifusion bench``: seconds per step of strategies, worlds and sizes, side by side in one run."""

from .command import bench

__all__ = ["bench"]
