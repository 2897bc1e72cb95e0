"""The error classes of the store."""

from __future__ import annotations


class StoreError(RuntimeError):
    """The store is absent, incomplete, damaged, or holds rows of another model or index."""


class SeveralGenerationsError(StoreError):
    """The store holds several generations or none, and no identity says which."""
