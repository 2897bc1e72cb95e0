"""The error class of the store."""

from __future__ import annotations


class StoreError(RuntimeError):
    """The store is absent, incomplete, damaged, or holds rows of another model or index."""
