"""Names derived from content, and the comparison of identities field by field.

A generation is named by the digest of everything that turns a file into a row: weights, preprocessing, windows,
view and format. Within it, the digest of its DICOM file names a row.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FORMAT_VERSION = 2  # of the layout on disk (docs/store-format.md); a reader refuses a newer one
NAME_DIGITS = 16  # of a SHA-256 in a folder name: 64 bits make a collision among millions of names unlikely


def name_of(value: Any) -> str:
    """Hash the canonical JSON text of a value: 16 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:NAME_DIGITS]


def name_of_bytes(*parts: bytes | memoryview) -> str:
    """Hash byte strings and their lengths: 16 hexadecimal digits."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()[:NAME_DIGITS]


def digest_rows(rows: Iterable[tuple[str, str, str]]) -> str:
    """Return the SHA-256 of (series UID, SOP UID, file digest) of every row in order, hexadecimal."""
    return hashlib.sha256("\n".join("\0".join(row) for row in rows).encode()).hexdigest()


def differences(stored: Mapping[str, Any], requested: Mapping[str, Any]) -> list[str]:
    """Name every field in which two identities differ, with both values."""

    def short(value: Any) -> str:
        text = str(value)
        return text if len(text) <= 40 else f"{text[:37]}..."

    return [
        f"{name}: store has {short(stored.get(name))}, requested {short(requested.get(name))}"
        for name in sorted({*stored, *requested})
        if stored.get(name) != requested.get(name)
    ]
