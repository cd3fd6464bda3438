"""``distrifusion bench``: seconds per step of strategies and worlds, side by side in one run."""

from .command import bench

__all__ = ["bench"]
