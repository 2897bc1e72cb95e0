"""Decodes each compressed file once in a child process, so that a crash or a hang costs one file.

Codecs are native code; the files are untrusted. Later stages decode what passed in their own process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Final

from ichpipe.common.errors import DataError, UnreadableDicomError
from ichpipe.dicom import hounsfield

TIMEOUT_S: Final = 30.0  # a slice takes milliseconds, one of 4096 pixels a side some seconds
STARTING_S: Final = 120.0  # imports on a loaded machine
MEMORY_BYTES: Final = 4 * 2**30  # beyond what the process has when it starts
CHILD_CODE: Final = "from ichpipe.dicom.decode_sandbox import serve; serve()"


class TrialDecoder(contextlib.AbstractContextManager["TrialDecoder"]):
    """Decodes files in a child process. The first file starts the child; a child that died is replaced."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self.child: subprocess.Popen[bytes] | None = None  # None where none runs
        self._pipe: Connection | None = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def require(self, path: str) -> None:
        """Decode a file. Raises UnreadableDicomError: the reason of ``read_hu``, or that a codec died or hung."""
        pipe = self.start()
        try:
            pipe.send_bytes(os.fsencode(path))
            reason = pipe.recv_bytes().decode() if pipe.poll(self._timeout_s) else None
        except (EOFError, OSError):
            code = self.close(kill=False)
            cause = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
            raise UnreadableDicomError(f"its decoder crashed ({cause}): the stream is damaged") from None
        if reason is None:
            self.close()
            raise UnreadableDicomError(f"decoding takes longer than {self._timeout_s:.0f} s: given up")
        if reason:
            raise UnreadableDicomError(reason)

    def start(self) -> Connection:
        """Start the child unless it runs. Raises DataError where that fails."""
        if self._pipe is not None:
            return self._pipe
        self._pipe, child_end = Pipe()
        with child_end:
            # Not multiprocessing.Process: its child imports the user's script again.
            # -P: a file numpy.py in the current folder, which may be the folder of images, is not imported.
            line, nowhere = [sys.executable, "-P", "-c", CHILD_CODE], subprocess.DEVNULL  # codecs print
            self.child = subprocess.Popen(line, stdin=child_end.fileno(), stdout=nowhere, stderr=nowhere)  # noqa: S603
        with contextlib.suppress(EOFError, OSError):
            if self._pipe.poll(STARTING_S):
                self._pipe.recv_bytes()
                return self._pipe
        self.close()
        raise DataError("the process that tries compressed files can't be started; is the machine out of memory?")

    def close(self, *, kill: bool = True) -> int:
        """End the child, at once unless it has died; return its exit code."""
        child, pipe = self.child, self._pipe
        self.child = self._pipe = None
        if pipe is not None:
            pipe.close()
        if child is None:
            return 0
        if kill:
            child.kill()
        return child.wait()


def serve() -> None:
    """Answer each path on standard input with a reason, or with an empty text where the file decodes; then end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    if sys.platform != "win32":
        import resource  # noqa: PLC0415 - Windows has none

        with contextlib.suppress(OSError, ValueError):  # no /proc, or a limit that may not be raised
            used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            limit = used + MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(used + MEMORY_BYTES, hard)
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))  # a larger allocation is a MemoryError in the codec
    pipe = Connection(os.dup(0))
    pipe.send_bytes(b"ready")
    with contextlib.suppress(EOFError, OSError):  # the parent has closed the pipe
        while True:
            path, reason = os.fsdecode(pipe.recv_bytes()), ""
            try:
                hounsfield.read_hu(path)
            except UnreadableDicomError as error:
                reason = str(error).removeprefix(f"{path}: ")
            pipe.send_bytes(reason.encode("utf-8", "backslashreplace"))
