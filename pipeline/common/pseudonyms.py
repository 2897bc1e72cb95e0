"""Pseudonyms of PatientIDs: keyed hashes that nobody can reverse without the key.

Trying all numbers of a hospital reverses a plain hash, but not a keyed one (HMAC-SHA-256, RFC 2104). The parameter
says where the key is. No output contains the key.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ichpipe.common.errors import MissingFileError, ParamsError

if TYPE_CHECKING:
    from collections.abc import Iterable

ENVIRONMENT: Final = "env:"
KEY_BYTES: Final = 16  # an attacker can try all shorter keys
DIGITS: Final = 32  # 128 bits in hexadecimal: a million patients collide with probability 1e-27


class Pseudonyms:
    """Pseudonyms under one key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def __call__(self, patient_id: str) -> str:
        """Return 32 hexadecimal digits."""
        return self._digest(b"patient\0" + patient_id.encode())

    def of(self, patient_ids: Iterable[str]) -> list[str]:
        """Return the pseudonym of each PatientID."""
        compute = functools.cache(self)
        return [compute(patient_id) for patient_id in patient_ids]

    @property
    def mark(self) -> str:
        """A fingerprint of the key, which tells rows of another key apart."""
        return self._digest(b"which key")

    def _digest(self, message: bytes) -> str:
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()[:DIGITS]


def read_pseudonyms(source: str | None) -> Pseudonyms | None:
    """Read the key from ``env:NAME`` or from a file, as ``prepare.hash_patient_ids`` says; None returns None.

    White space around the key does not count. Raises MissingFileError if there is no key, ParamsError if it is short.
    """
    if source is None:
        return None
    name = source.removeprefix(ENVIRONMENT)
    try:
        key = Path(source).read_bytes().strip() if name == source else os.environ[name].strip().encode()
    except KeyError:
        reason = f"the environment has no {name}; set it to the secret key"
        raise MissingFileError(f"prepare.hash_patient_ids: {reason}") from None
    except OSError as error:
        reason = f"{source}: {error.strerror}; name a file with the secret key"
        raise MissingFileError(f"prepare.hash_patient_ids: {reason}") from error
    if len(key) < KEY_BYTES:
        raise ParamsError(
            f"prepare.hash_patient_ids: the key in {source} has {len(key)} bytes, fewer than {KEY_BYTES}; make one: "
            "python -c 'import secrets; print(secrets.token_hex(32))'"
        )
    return Pseudonyms(key)
