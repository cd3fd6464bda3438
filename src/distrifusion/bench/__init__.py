"""``distrifusion bench``: seconds per step of strategies and worlds, side by side in one run."""

from .command import app

__all__ = ["app"]
