"""Writing that never leaves a half-written file under the final name, and hashes of what was written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ichpipe.common.errors import DataError, MissingFileError, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator


FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers of the operating system that mean: no more bytes here (disk, quota, size limit)."""

_REFUSED: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST})
_OTHER_WORDS: Final = ("No space left on device", "File too large", "Disk quota exceeded")
_TORCH: Final = ("PytorchStreamWriter", "inline_container.cc")
"""How libraries that write through C++ or Rust say it: their exceptions carry no error number, torch's not even why."""


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; on success it is synced and renamed over it.

    A reader therefore sees the old file or the whole new one, also after a power cut. On an exception nothing remains.
    A disk that is full or a folder that takes no files is an OutputError that names the folder.
    """
    temporary = _temporary(target)
    try:
        yield temporary
        temporary.chmod(0o644)
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    except Exception as error:
        why = _why_not_written(error)
        if why is None:
            raise
        raise _output_error(target, why) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Ask the operating system to put a file's bytes, or a folder's names, on the disk now."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    except OSError as error:
        if error.errno not in FULL | _REFUSED:
            raise
        raise _output_error(target, error.strerror or str(error)) from error
    os.close(descriptor)
    return Path(name)


def _why_not_written(error: Exception) -> str | None:
    """Return what the operating system said where the disk is why; None for an error of another kind."""
    if isinstance(error, OutputError):  # of a file within
        return None
    if isinstance(error, OSError) and error.errno is not None:
        own = error.errno in FULL or error.errno == errno.EROFS or (error.errno in _REFUSED and error.filename2)
        return error.strerror if own else None
    text = str(error)
    if any(word in text for word in _TORCH):
        return "torch could not write all of it: is the disk full?"
    return next((word for word in _OTHER_WORDS if word in text), None)


def _output_error(target: Path, why: str) -> OutputError:
    return OutputError(
        f"{target} can't be written ({why}); make room in the folder {target.parent}, or let it be written to, or name "
        "another one, then run the same command again: what was finished is kept"
    )


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
