"""Every number that a user may change, with its range and unit."""

from ichpipe.params.schema import Params

__all__ = ["Params"]
