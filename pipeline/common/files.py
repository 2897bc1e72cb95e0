"""Files written whole or not at all, the lock of a stage, digests of files and values, versions of packages."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from ichpipe.common.errors import BusyError, DataError, MissingFileError, OutputError
from ichpipe.common.processes import launched_rank

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

log = logging.getLogger("ichpipe")

TEMPORARY: Final = ".ichpipe-tmp"  # ends the names of temporary folders, which no other program uses
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # full disk, exhausted quota, size limit
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})  # NFS, FUSE and the like without flock
_REFUSED: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST})
# Libraries that write through C++ or Rust (safetensors) give texts without an error number.
_FULL_TEXTS: Final = ("No space left on device", "File too large", "Disk quota exceeded")


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path in a folder beside ``target``; on success sync it and rename it over ``target``.

    A reader sees the old file or the whole new one, also after a power cut. After an exception no file remains. The
    file gets the permissions that the process's umask gives a new file.
    Raises OutputError that names the folder if the disk is full or the folder is not writable.
    """
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except OSError as error:
        if error.errno not in FULL | _REFUSED:
            raise
        raise _output_error(target, error.strerror or str(error)) from error
    temporary = folder / target.name  # libraries that write a temporary file of their own do so in this folder
    try:
        yield temporary
        temporary.chmod(folder.stat().st_mode & 0o666)
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    except Exception as error:  # libraries raise errors of their own where the disk is full
        cause = _disk_error(error)
        if cause is None:
            raise
        raise _output_error(target, cause) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's names, to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_error(error: Exception) -> str | None:
    """Return the operating system's text if the disk caused the error, else None."""
    if isinstance(error, OutputError):  # of a file that was written in the block
        return None
    if isinstance(error, OSError) and error.errno is not None:
        # An error of replace() has two file names; one with a single name may come from a file that the block reads.
        own = error.errno in FULL or error.errno == errno.EROFS or (error.errno in _REFUSED and error.filename2)
        return error.strerror if own else None
    return next((text for text in _FULL_TEXTS if text in str(error)), None)


def _output_error(target: Path, cause: str) -> OutputError:
    return OutputError(
        f"{target} can't be written ({cause}); free disk space in {target.parent}, make the folder writable, or name "
        "another one; then run the same command again: finished parts are kept"
    )


def write_bytes(target: Path, content: bytes) -> None:
    """Write ``content``, whole or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)


def write_text(target: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    write_bytes(target, text.encode())


def write_json(target: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; NaN and infinity are refused."""
    write_text(target, json.dumps(value, indent=2, allow_nan=False) + "\n")


def decode_text(data: bytes, title: str) -> str:
    """Decode a text that the user wrote: UTF-8, or UTF-16 with a byte order mark. Raises DataError with the remedy."""
    encoding = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{title}, line {line}: neither UTF-8 nor UTF-16 text; save it as UTF-8") from None


def read_json(path: Path) -> Any:
    """Read JSON that a stage wrote; an error names a missing or incomplete file."""
    require_file(path, "run the stage that writes it (see dvc.yaml)")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise DataError(f"{path} is not complete JSON ({error}); run the stage that writes it") from error


def require_file(path: Path, remedy: str) -> Path:
    """Return ``path`` if it exists, else raise MissingFileError with the remedy."""
    if not path.exists():
        raise MissingFileError(f"{path} does not exist; {remedy}")
    return path


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON-like value's canonical text, as 64 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    from importlib import metadata  # noqa: PLC0415 - 10 ms, which `ichpipe --help` can do without

    versions = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@contextmanager
def hold_lock(
    folder: Path, stage: str, outputs: Sequence[Path] | None = None, resume: Path | None = None
) -> Iterator[None]:
    """Hold ``folder/.<stage>.lock`` in the block, and delete temporary folders of a killed run.

    The kernel frees the lock when its process dies. Under `torchrun` the first process of a run holds it for all.
    Temporary folders are deleted below ``outputs`` and, if their names begin with ``stage``, in ``resume``; without
    ``outputs`` in ``folder`` alone. Raises BusyError if another process holds the lock, OutputError if the folder is
    not writable.
    """
    if launched_rank()[0] > 0:
        yield
        return
    pid_file, new = folder / f".{stage}.pid", not folder.exists()
    with ExitStack() as stack:
        if new:
            stack.callback(_remove_if_unused, folder, stage)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _acquire(stack, folder, stage, pid_file)
            pid_file.write_text(f"{os.getpid()}\n", encoding="ascii")
        except OSError as error:
            raise OutputError(
                f"nothing can be written in {folder} ({error.strerror}); free disk space, make it writable, or name "
                "another one (--artifacts, --out)"
            ) from error
        stack.callback(pid_file.unlink, missing_ok=True)
        leftovers = [path for output in outputs or [] for path in output.rglob(f".*{TEMPORARY}")]
        leftovers += [] if outputs is not None else folder.glob(f".*{TEMPORARY}")
        leftovers += [] if resume is None else resume.glob(f".{stage}.*{TEMPORARY}")
        for path in leftovers:
            shutil.rmtree(path, ignore_errors=True)
        yield


def _remove_if_unused(folder: Path, stage: str) -> None:
    """Remove the folder of a command that failed before it wrote anything."""
    lock = folder / f".{stage}.lock"
    with suppress(OSError):
        if set(folder.iterdir()) <= {lock}:
            lock.unlink(missing_ok=True)
            folder.rmdir()


def _acquire(stack: ExitStack, folder: Path, stage: str, pid_file: Path) -> None:
    from filelock import FileLock, Timeout  # noqa: PLC0415 - not for `--help`

    try:
        stack.enter_context(FileLock(folder / f".{stage}.lock").acquire(timeout=0))
    except Timeout:
        holder, remedy = "another process", "wait for it"
        with suppress(OSError):
            pid = pid_file.read_text(encoding="ascii").strip()
            holder, remedy = f"process {pid}", f"wait for it, end it (kill {pid})"
        raise BusyError(f"{holder} is running {stage} in {folder}; {remedy}, or name another folder") from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: this file system has no locks; start no second %s there at the same time", folder, stage)
