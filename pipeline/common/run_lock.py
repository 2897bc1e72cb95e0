"""A lock that lets one process at a time write the outputs of a stage.

The kernel frees the lock when its process dies. Under `torchrun` the first process of a run holds it for all. Each arm
of stage two has its own lock, so arms can train side by side. The embedding store has a lock of its own, which waits
(`cache.location`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from typing import TYPE_CHECKING, Final

from ichpipe.common.errors import BusyError, OutputError
from ichpipe.common.files import TEMPORARY
from ichpipe.common.processes import launched_rank

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

log = logging.getLogger("ichpipe")

NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})  # NFS, FUSE and the like without flock


@contextlib.contextmanager
def hold_lock(
    folder: Path, stage: str, outputs: Sequence[Path] | None = None, resume: Path | None = None
) -> Iterator[None]:
    """Hold ``folder/.<stage>.lock`` in the block, and delete temporary folders of a killed run.

    Temporary folders are deleted below ``outputs`` and, if their names begin with ``stage``, in ``resume``; without
    ``outputs`` in ``folder`` alone. Raises BusyError if another process holds the lock, OutputError if the folder is
    not writable.
    """
    if launched_rank()[0] > 0:
        yield
        return
    pid_file, new = folder / f".{stage}.pid", not folder.exists()
    with contextlib.ExitStack() as stack:
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
    with contextlib.suppress(OSError):
        if set(folder.iterdir()) <= {lock}:
            lock.unlink(missing_ok=True)
            folder.rmdir()


def _acquire(stack: contextlib.ExitStack, folder: Path, stage: str, pid_file: Path) -> None:
    from filelock import FileLock, Timeout  # noqa: PLC0415 - not for `--help`

    try:
        stack.enter_context(FileLock(folder / f".{stage}.lock").acquire(timeout=0))
    except Timeout:
        message = f"another process is running {stage} in {folder}; wait for it, or name another folder"
        with contextlib.suppress(OSError):
            pid = pid_file.read_text(encoding="ascii").strip()
            remedy = f"wait for it, end it (kill {pid}), or name another folder"
            message = f"process {pid} is running {stage} in {folder}; {remedy}"
        raise BusyError(message) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        log.warning("%s: this file system has no locks; start no second %s there at the same time", folder, stage)
