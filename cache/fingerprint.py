"""What made a row: names derived from content, and comparisons field by field.

A generation is named by the digest of all that turns a file's content into a row (weights, preprocessing, windows,
view, format). Within it a row is named by the digest of the file that it was computed from.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FORMAT_VERSION = 2
"""Version of the layout on disk (docs/store-format.md); a reader refuses a newer one."""

NAME_DIGITS = 16
"""Hexadecimal digits of a SHA-256 in the name of a folder: 64 bits, no collision among millions of generations."""


def name_of(value: Any) -> str:
    """Name a JSON-like value by its canonical text: 16 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:NAME_DIGITS]


def name_of_bytes(*parts: bytes | memoryview) -> str:
    """Name a sequence of byte strings (lengths count): 16 hexadecimal digits."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()[:NAME_DIGITS]


def digest_rows(rows: Iterable[tuple[str, str, str]]) -> str:
    """Hash (series UID, SOP UID, file digest) of every row in index order. SHA-256, hexadecimal."""
    text = "\n".join("\0".join(row) for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Name every field in which two identities differ, with both values; empty where they agree."""
    names = sorted(set(found) | set(wanted))
    return [
        f"{name}: store has {_short(found.get(name))}, wanted {_short(wanted.get(name))}"
        for name in names
        if found.get(name) != wanted.get(name)
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
