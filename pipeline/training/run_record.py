"""Writes the record beside every trained model: parameters, device, versions and seconds.

No host name, user name or absolute path: a record may be shared with the model.
"""

from __future__ import annotations

import contextlib
import platform
import subprocess
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ichpipe.common.artifacts import HISTORY_FILE, RECORD_FILE
from ichpipe.common.files import installed_versions, write_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from ichpipe.training.trainer import Epoch

PACKAGES = ("ichpipe", "torch", "timm", "numpy", "pydicom", "zarr", "dask")


def start_watch() -> Callable[[], float]:
    """Return a function that returns the seconds from now on, to a tenth."""
    start = time.perf_counter()
    return lambda: round(time.perf_counter() - start, 1)


def write_record(
    folder: Path, *, stage: str, params: dict[str, Any], device: torch.device, seconds: float, facts: dict[str, Any]
) -> None:
    """Write ``record.json``; ``facts`` are the stage's own (counts, best epoch, …)."""
    from ichpipe.common.device import device_name  # noqa: PLC0415 - torch is already loaded where there is a device

    versions = {"python": platform.python_version()} | installed_versions(PACKAGES)
    commit: str | None = None  # of the working folder, where it is a git checkout
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)  # noqa: S607
        commit = done.stdout.strip()
    record = {"stage": stage, "params": params, **facts, "device": device_name(device), "wall_seconds": seconds}
    write_json(folder / RECORD_FILE, record | {"versions": versions, "commit": commit})


def write_history(folder: Path, history: list[Epoch]) -> None:
    """Write the learning curve apart from the record: it is the same for the same seed, wall time is not."""
    write_json(folder / HISTORY_FILE, [asdict(line) for line in history])
