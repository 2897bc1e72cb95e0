"""What made a store: a flat mapping that is written into it and compared field by field."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FORMAT_VERSION = 1
"""Version of the layout on disk (docs/store-format.md); a reader refuses a newer one."""


def digest_rows(rows: Iterable[tuple[str, str, str]]) -> str:
    """Hash (series UID, SOP UID, file digest) of every row in store order. SHA-256, hexadecimal."""
    state = hashlib.sha256()
    for row in rows:
        state.update("\0".join(row).encode())
        state.update(b"\n")
    return state.hexdigest()


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Name every field in which two fingerprints differ, with both values; empty where they agree."""
    names = sorted(set(found) | set(wanted))
    return [
        f"{name}: store has {_short(found.get(name))}, wanted {_short(wanted.get(name))}"
        for name in names
        if found.get(name) != wanted.get(name)
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
