"""Compressed files decoded once, in a process of its own: a codec that crashes or hangs costs one file, not the run.

Codecs are native code, and files are strangers. ``scan`` has every compressed file tried here; what passes is decoded
by later stages in their own process.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from ichpipe.common.errors import DataError, UnreadableDicomError
from ichpipe.dicom import hounsfield

if sys.platform != "win32":
    import resource

if TYPE_CHECKING:
    from types import TracebackType

TIMEOUT_S: Final = 30.0
"""A slice takes milliseconds, one of 4096 pixels a side some seconds; what takes longer hangs."""

STARTING_S: Final = 120.0  # for the first file: importing on a loaded machine
MEMORY_BYTES: Final = 4 * 2**30  # beyond what the process has when it starts
_SERVE: Final = "from ichpipe.dicom.decode_sandbox import serve; serve()"


class TrialDecoder:
    """Decodes files one after another in a child that is started when first needed and replaced when it dies."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._child: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def __enter__(self) -> TrialDecoder:
        """Start nothing yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the child."""
        self.close()

    def require(self, path: str) -> None:
        """Decode a file. Raises UnreadableDicomError: the reason of ``read_hu``, or that a codec died or hung."""
        child = self.start()
        try:
            child.stdin.write(json.dumps(path) + "\n")  # type: ignore[union-attr]  # a pipe
            answer = self._answers.get(timeout=self._timeout_s)
        except queue.Empty:
            self.close()
            raise UnreadableDicomError(f"decoding takes longer than {self._timeout_s:.0f} s: given up") from None
        except OSError:
            answer = ""
        if not answer:
            how = _name(self._end(signal_it=False))
            raise UnreadableDicomError(f"its decoder crashed ({how}): the stream is damaged")
        if reason := str(json.loads(answer)):
            raise UnreadableDicomError(reason)

    def close(self) -> None:
        """End the child, at once."""
        self._end(signal_it=True)

    def _end(self, *, signal_it: bool) -> int:
        child, self._child = self._child, None
        if child is None:
            return 0
        with contextlib.suppress(OSError):
            if signal_it:
                child.kill()
            child.stdin.close()  # type: ignore[union-attr]  # a pipe
        code = child.wait()
        child.stdout.close()  # type: ignore[union-attr]  # a pipe
        return code

    @property
    def child_pid(self) -> int | None:
        """Return the child's process id, None where none runs."""
        return self._child.pid if self._child else None

    def start(self) -> subprocess.Popen[str]:
        """Start the child unless it runs. Raises DataError where that fails."""
        if self._child:
            return self._child
        # -P: a file numpy.py in the current folder, which may be the folder of images, is not imported.
        self._child = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-c", _SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            encoding="ascii",
        )  # fmt: skip
        self._answers = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(self._child.stdout, self._answers), daemon=True).start()
        if not self._answer(STARTING_S):
            self.close()
            raise DataError("the process that tries compressed files can't be started; is the machine out of memory?")
        return self._child

    def _answer(self, timeout_s: float) -> str:
        with contextlib.suppress(queue.Empty):
            return self._answers.get(timeout=timeout_s)
        return ""


def _listen(answers: IO[str], into: queue.SimpleQueue[str]) -> None:
    with contextlib.suppress(ValueError, OSError):  # closed meanwhile
        for line in answers:
            into.put(line)
    into.put("")


def serve() -> None:
    """Answer each path on standard input with a reason, or with an empty text where the file decodes; then end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    answers = _private_output()
    _limit_memory()
    answers.write('"ready"\n')
    for line in sys.stdin:
        path, reason = json.loads(line), ""
        try:
            hounsfield.read_hu(path)
        except UnreadableDicomError as error:
            reason = str(error).removeprefix(f"{path}: ")
        answers.write(json.dumps(reason) + "\n")


def _private_output() -> IO[str]:
    """Return standard output for answers alone; what codecs print goes nowhere."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="ascii")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    return answers


def _limit_memory() -> None:
    """Bound what decoding may take, where the system can; an allocation beyond raises MemoryError in the codec."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError, ValueError):  # no /proc, or a limit that may not be raised
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = used + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _name(code: int) -> str:
    """Return what ended a process: a signal's name, or its exit code."""
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"exit code {code}"
