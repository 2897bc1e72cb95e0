"""Ending processes at random moments, and looking at what they leave behind: what stage_kills.py and tests use."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator, Sequence

STRAY_S = 15.0
"""How long processes of a killed command may take to see that it is gone."""


@dataclass(frozen=True)
class Struck:
    """How a command ended that was sent a signal; ``alive``: it was still running then."""

    alive: bool
    code: int
    stderr: str
    strays: int  # processes of its session that are still there after STRAY_S


def wait_seconds(seconds: float) -> Callable[[subprocess.Popen[str]], None]:
    """Return what waits so long."""
    return lambda _process: time.sleep(seconds)


def wait_for_changes(
    folders: Sequence[Path], number: int, draw: random.Random
) -> Callable[[subprocess.Popen[str]], None]:
    """Return what waits until the files below ``folders`` have changed so often, and up to 20 ms more."""
    pause = draw.uniform(0, 0.02)

    def wait(process: subprocess.Popen[str]) -> None:
        for seen in changes(folders, process):
            if seen >= number:
                time.sleep(pause)
                return

    return wait


def changes(folders: Sequence[Path], process: subprocess.Popen[str]) -> Iterator[int]:
    """Yield the number of changes below ``folders`` that were seen, until the process ends."""
    before, count = _listing(folders), 0
    while process.poll() is None:
        now = _listing(folders)
        if now != before:
            count, before = count + 1, now
            yield count
        time.sleep(0.005)


def strike(
    command: Sequence[str], folder: Path, number: int, wait: Callable[[subprocess.Popen[str]], None], *, group: bool
) -> Struck:
    """Start a command in a session of its own, wait, and send it a signal (``group``: to all its processes)."""
    with start(command, folder) as process:
        wait(process)
        alive = process.poll() is None
        if alive:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(process.pid, number)
        _, stderr = process.communicate(timeout=600)
    return Struck(alive, process.returncode, stderr, strays_of(process.pid))


def start(command: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """Start a command with signals as a terminal gives them, also where this program runs in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what is ignored here would be ignored there
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def strays_of(session: int) -> int:
    """Count the processes of a session that don't end by themselves, and end them."""
    until = time.monotonic() + STRAY_S
    while (left := _members(session)) and time.monotonic() < until:
        time.sleep(0.05)
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return len(left)


def _members(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, ValueError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    found.append(int(entry.name))
    return found


def _listing(folders: Sequence[Path]) -> list[tuple[str, int, int]]:
    found = []
    for parent, _, names in (walked for folder in folders for walked in os.walk(folder)):  # heeds no vanished folder
        for name in names:
            with contextlib.suppress(OSError):
                status = os.stat(path := os.path.join(parent, name))  # noqa: PTH116, PTH118
                found.append((path, status.st_mtime_ns, status.st_size))
    return found
