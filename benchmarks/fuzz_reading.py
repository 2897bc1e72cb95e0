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
from ichpipe.dicom.enhanced import EnhancedCtError, list_frames
from ichpipe.dicom.slice_header import read_header

if TYPE_CHECKING:
    from ichpipe.dicom.decode_sandbox import TrialDecoder

PLANTED: Final = "Planted"  # PatientName of the sound files
LONGEST_MESSAGE: Final = 300
ROUNDING: Final = 0.5 + 1e-6  # what rounding to whole HU may change
GOOD: Final = ("equal", "refused")


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
        results = self._product(path)
        seconds, used = time.perf_counter() - begun, self._cpu_s() - used
        kilobytes = max(peak_kb(process) for process in self._processes())
        outcome, message = max((self._judge(file, *result) for result in results), key=lambda one: one[0] not in GOOD)
        return {"outcome": outcome, "message": message, "s": seconds, "cpu_s": round(used, 2), "kb": kilobytes}

    def _product(self, path: str) -> list[tuple[int | None, str, str, Any]]:
        """Read like ``scan``: an image, or each frame of an Enhanced CT: its number, outcome, message and pixels."""
        try:
            try:
                self._as_scan(path)
            except EnhancedCtError as error:
                frames = list_frames(path)
                if not frames:
                    return [(None, "refused", str(error), None)]
                return [(number, *self._image(frame)) for number, frame in enumerate(frames)]
            except UnreadableDicomError as error:
                return [(None, *self._pixels(path, str(error)))]
            return [(None, *self._pixels(path))]
        except UnreadableDicomError as error:
            return [(None, "refused", str(error), None)]
        except Exception as error:  # what the fuzzer is after
            return [(None, "exception", f"{type(error).__name__}: {error}"[:LONGEST_MESSAGE], None)]

    def _image(self, path: str) -> tuple[str, str, Any]:
        try:
            self._as_scan(path)
        except UnreadableDicomError as error:
            return self._pixels(path, str(error))
        return self._pixels(path)

    def _pixels(self, path: str, refusal: str = "") -> tuple[str, str, Any]:
        """Read the pixels: those of a file that the scan refuses must do no harm either."""
        late, pixels = "", []
        try:
            pixels = [read(path) for read in (hounsfield.read_hu, hounsfield.read_square_hu)]
        except UnreadableDicomError as error:
            late = str(error)
        message = (refusal or late).removeprefix(f"{path}: ")
        if any(mark in text for mark in ("crashed", "given up") for text in (refusal, late)):
            return "refused after a crash", message, None
        if refusal:
            return "refused", message, None
        return ("pixels refused late", message, None) if late else ("accepted", "", pixels)

    def _as_scan(self, path: str) -> None:
        if read_header(path).compressed:
            self._trial.require(path)

    def _judge(self, file: Path, frame: int | None, outcome: str, message: str, pixels: Any) -> tuple[str, str]:
        """Compare accepted pixels with the reference, and look at the message of a refusal."""
        if pixels is not None:
            return self._compared(file, frame, *pixels)
        unclear = message.count("\n") or not message or len(message) > LONGEST_MESSAGE or PLANTED in message
        return ("unclear message" if outcome == "refused" and unclear else outcome), message

    def _compared(self, file: Path, frame: int | None, hu: Any, square: Any) -> tuple[str, str]:
        data = file.read_bytes()
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as archive:
                data = archive.read(stream_mutations.MEMBER)
        try:
            reference, smooth = reference_hu(data, frame)
        except Exception as error:  # the reference's refusal is a disagreement like any other
            return "no reference", f"{type(error).__name__}: {error}"[:200]
        if reference.shape != hu.shape or not np.array_equal(reference, hu):
            return "unequal", f"{(reference != hu).sum()} pixels" if reference.shape == hu.shape else "shape"
        if smooth.shape != square.shape or np.abs(smooth - square).max() > ROUNDING:
            return "unequal", f"with square pixels: {square.shape}, not {smooth.shape}"
        return "equal", ""

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
