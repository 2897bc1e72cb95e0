"""Writing that never leaves a half-written file under the final name, and hashes of what was written."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ichpipe.errors import DataError, MissingFileError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; on success it is synced and renamed over it.

    A reader therefore sees the old file or the whole new one. On an exception nothing remains.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all; NaN and infinity are refused."""
    write_text(target, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON that a stage wrote; a missing or torn file is an error that names it."""
    require_file(path, "run the stage that writes it (see dvc.yaml)")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise DataError(f"{path} is not whole JSON ({error}); run the stage that writes it (see dvc.yaml)") from error


def require_file(path: Path, remedy: str) -> Path:
    """Return ``path`` if it exists, else raise an error that names it and the remedy."""
    if not path.exists():
        raise MissingFileError(f"{path} does not exist; {remedy}")
    return path


def digest_of(value: Any) -> str:
    """Hash a JSON-like value by its canonical text. 64 hexadecimal digits (SHA-256)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """Hash a file's bytes. 64 hexadecimal digits (SHA-256)."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
