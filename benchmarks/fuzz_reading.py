"""One damaged file read as the product reads it, and compared with the reference; runs in the fuzzer's child."""

from __future__ import annotations

import os
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import stream_mutations
from reference_pixels import reference_hu

from ichpipe.common.errors import UnreadableDicomError
from ichpipe.dicom import hounsfield
from ichpipe.dicom.slice_header import read_header

if TYPE_CHECKING:
    from ichpipe.dicom.decode_sandbox import TrialDecoder

PLANTED: Final = "Planted"  # PatientName of the sound files
LONGEST_MESSAGE: Final = 300


class Reading:
    """Reads files, and measures time and memory."""

    def __init__(self, trial: TrialDecoder) -> None:
        self._trial = trial

    def read(self, file: Path) -> dict[str, Any]:
        """Return outcome, message, seconds and kilobytes."""
        path = f"{file}/{stream_mutations.MEMBER}" if file.suffix == ".zip" else str(file)
        for process in self._processes():
            reset_peak(process)
        begun, used = time.perf_counter(), self._cpu_s()
        outcome, message, hu = self._product(path)
        seconds, used = time.perf_counter() - begun, self._cpu_s() - used
        kilobytes = max(peak_kb(process) for process in self._processes())
        if hu is not None:
            outcome, message = self._compared(file, hu)
        elif outcome == "refused" and (message.count("\n") or not message or len(message) > LONGEST_MESSAGE
                                       or PLANTED in message):  # fmt: skip
            outcome = "unclear message"
        return {"outcome": outcome, "message": message, "s": seconds, "cpu_s": round(used, 2), "kb": kilobytes}

    def _product(self, path: str) -> tuple[str, str, Any]:
        """Read like ``scan._read``, then the pixels: those of a file that the scan refuses must do no harm either."""
        refusals, hu = [], None
        try:
            for read in (self._as_scan, hounsfield.read_hu):
                try:
                    hu = read(path)
                except UnreadableDicomError as error:
                    refusals.append(str(error).removeprefix(f"{path}: "))
        except Exception as error:  # what the fuzzer is after
            return "exception", f"{type(error).__name__}: {error}", None
        if not refusals:
            return "accepted", "", hu
        if hu is None and len(refusals) == 1:
            return "pixels refused late", refusals[0], None
        if any("crashed" in one or "given up" in one for one in refusals):
            return "refused after a crash", refusals[0], None
        return "refused", refusals[0], None

    def _as_scan(self, path: str) -> None:
        if read_header(path).compressed:
            self._trial.require(path)

    def _compared(self, file: Path, hu: Any) -> tuple[str, str]:
        data = file.read_bytes()
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as archive:
                data = archive.read(stream_mutations.MEMBER)
        try:
            reference = reference_hu(data)
        except Exception as error:  # the reference's refusal is a disagreement like any other
            return "no reference", f"{type(error).__name__}: {error}"[:200]
        same = reference.shape == hu.shape and np.array_equal(reference, hu)
        return (
            ("equal", "")
            if same
            else ("unequal", f"{(reference != hu).sum()} pixels" if reference.shape == hu.shape else "")
        )

    def _cpu_s(self) -> float:
        return sum(cpu_s(process) for process in self._processes())

    def _processes(self) -> list[str]:
        child = self._trial.child
        return ["self", *([str(child.pid)] if child else [])]


def cpu_s(process: str) -> float:
    """Return the CPU time of a process so far, in seconds (of 10 ms, as the kernel counts)."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def reset_peak(process: str) -> None:
    """Let the kernel forget the highest resident size of a process so far."""
    Path(f"/proc/{process}/clear_refs").write_text("5", encoding="ascii")


def peak_kb(process: str) -> int:
    """Return the highest resident size since then, in kilobytes."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
