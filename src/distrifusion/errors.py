"""Everything distrifusion raises on purpose. Each message names the value that was wrong and what would be right."""


class DistrifusionError(Exception):
    """Base of all errors that distrifusion raises on purpose."""


class ConfigError(DistrifusionError, ValueError):
    """A bad value, or values that do not fit together: a world that is not the product of the mesh, too few rows ..."""


class UnsupportedModel(DistrifusionError, TypeError):  # noqa: N818 - a contract name
    """A model, or one module of it, that would be computed wrongly in patches. Names the module and its class."""


class RanksDisagree(DistrifusionError, RuntimeError):  # noqa: N818 - a contract name
    """The ranks were given different work (size, dtype, seed, configuration). Names both values."""


class PeerLost(DistrifusionError, ConnectionError):  # noqa: N818 - a contract name
    """A peer died, left, or did not answer within the timeout."""
