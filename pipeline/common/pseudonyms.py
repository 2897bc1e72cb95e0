"""PatientIDs replaced by keyed hashes: the same patient, the same word; without the key, no way back.

A plain hash of a hospital's numbers is undone by trying all of them; a keyed one (HMAC-SHA-256, RFC 2104) is not, as
long as the key stays secret. The parameter names where the key is, never the key; nothing that is written holds it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ichpipe.common.errors import MissingFileError, ParamsError

if TYPE_CHECKING:
    from collections.abc import Iterable

ENVIRONMENT: Final = "env:"
KEY_BYTES: Final = 16
"""A shorter key can be tried out."""

DIGITS: Final = 32
"""Hexadecimal digits that are kept, 128 bits: among a million patients two meet with probability 1e-27."""


class Pseudonyms:
    """The function from PatientID to pseudonym under one key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def __call__(self, patient_id: str) -> str:
        """Return 32 hexadecimal digits."""
        return hmac.new(self._key, b"patient\0" + patient_id.encode(), hashlib.sha256).hexdigest()[:DIGITS]

    def of(self, patient_ids: Iterable[str]) -> list[str]:
        """Return the pseudonym of each; a patient's is computed once."""
        known: dict[str, str] = {}
        return [known.get(one) or known.setdefault(one, self(one)) for one in patient_ids]

    @property
    def mark(self) -> str:
        """Name the key without telling it: rows made under another one are not used."""
        return hmac.new(self._key, b"which key", hashlib.sha256).hexdigest()[:DIGITS]


def read_pseudonyms(where: str | None) -> Pseudonyms | None:
    """Read the key from ``env:NAME`` or from a file, as ``prepare.hash_patient_ids`` says; None means none is wanted.

    Blanks at the key's ends don't count. MissingFileError where it is not there, ParamsError where it is too short.
    """
    if where is None:
        return None
    key = _from_environment(where) if where.startswith(ENVIRONMENT) else _from_file(Path(where))
    if len(key) < KEY_BYTES:
        raise ParamsError(
            f"prepare.hash_patient_ids: the key in {where} has {len(key)} bytes, fewer than {KEY_BYTES}; make one: "
            "python -c 'import secrets; print(secrets.token_hex(32))'"
        )
    return Pseudonyms(key)


def _from_environment(where: str) -> bytes:
    name = where.removeprefix(ENVIRONMENT)
    if name not in os.environ:
        raise MissingFileError(f"prepare.hash_patient_ids: the environment has no {name}; set it to the secret key")
    return os.environ[name].strip().encode()


def _from_file(path: Path) -> bytes:
    try:
        return path.read_bytes().strip()
    except OSError as error:
        raise MissingFileError(
            f"prepare.hash_patient_ids: {path}: {error.strerror}; name a file with the secret key"
        ) from error
