"""The store's one error. The cache imports nothing of the project, so the base stands here."""

from __future__ import annotations


class StoreError(RuntimeError):
    """The store is absent, incomplete, damaged, or made by something else than what is asked for."""
