"""One process at a time writes the outputs of one stage in one folder; a second one is refused, and told the first's.

The lock belongs to the process: the kernel frees it when that dies, however it dies. Under `torchrun`, processes of one
run share a folder, and the first of them holds it for all. Arms of stage two are stages of their own: they may train
side by side. The embedding store has a lock of its own, which waits (`cache.place`).
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING, Final

from ichpipe.common.errors import BusyError, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

_LEFT: Final = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp|\.tmp[A-Za-z0-9]{6}")  # of files.atomic_path; of safetensors


@contextlib.contextmanager
def hold(folder: Path, what: str, outputs: Sequence[Path] | None = None, resume: Path | None = None) -> Iterator[None]:
    """Hold ``folder/.<what>.lock`` while the block runs, and remove what a killed run left half-written.

    Leftovers are looked for below ``outputs`` and, where their names begin with ``what``, in ``resume``; without
    ``outputs`` in ``folder`` alone. Raises BusyError where another process holds it, OutputError where nothing can be
    written there.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    number, new = folder / f".{what}.pid", not folder.exists()
    with contextlib.ExitStack() as stack:
        if new:
            stack.callback(_remove_if_unused, folder, what)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _acquire(stack, folder, what, number)
            number.write_text(f"{os.getpid()}\n", encoding="ascii")
        except OSError as error:
            raise OutputError(
                f"nothing can be written in {folder} ({error.strerror}); make room there, let it be written to, or "
                "name another folder (--artifacts, --out)"
            ) from error
        stack.callback(number.unlink, missing_ok=True)
        for place in [folder] if outputs is None else outputs:
            _remove(place.glob(".*tmp*") if outputs is None else place.rglob(".*tmp*"))
        if resume is not None:
            _remove(resume.glob(f".{what}.*.tmp"))
        yield


def _remove_if_unused(folder: Path, what: str) -> None:
    """Leave no folder behind in which a command that failed wrote nothing."""
    lock = folder / f".{what}.lock"
    with contextlib.suppress(OSError):
        if set(folder.iterdir()) <= {lock}:
            lock.unlink(missing_ok=True)
            folder.rmdir()


def _acquire(stack: contextlib.ExitStack, folder: Path, what: str, number: Path) -> None:
    from filelock import FileLock, Timeout  # noqa: PLC0415 - not for `--help`

    try:
        stack.enter_context(FileLock(folder / f".{what}.lock").acquire(timeout=0))
    except Timeout:
        raise BusyError(_busy(folder, what, number)) from None
    except NotImplementedError:  # a file system without locks
        pass


def _remove(found: Iterable[Path]) -> None:
    for path in found:
        if _LEFT.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def _busy(folder: Path, what: str, number: Path) -> str:
    with contextlib.suppress(OSError):
        who = number.read_text(encoding="ascii").strip()
        return f"process {who} is running {what} in {folder}; wait for it, end it (kill {who}), or name another folder"
    return f"another process is running {what} in {folder}; wait for it, or name another folder"
