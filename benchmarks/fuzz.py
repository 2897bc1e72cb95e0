"""Damaged DICOM files through the header reader, the trial decoder and the pixel reader; anything odd is a finding.

python benchmarks/fuzz.py --files 10000 --out fuzz.json
python benchmarks/fuzz.py --files 2000 --dicom FOLDER         # real files as well
python benchmarks/fuzz.py --files 1 --first 4711 --keep DIR   # one case again, and the file kept

Sound files of thirteen encodings (good_files.py) are damaged one way or two (mutations.py, stream_mutations.py), or
what their headers say is drawn anew (attribute_mutations.py), case N from seed N. A child process with a memory limit
reads each: ``scan``'s way first (header; frames of an Enhanced CT; compressed files by the trial decoder, which is a
process of its own), then ``read_hu`` and ``read_square_hu``. A file may be refused with one clear message, or be
accepted with the pixels of pydicom's modality LUT and another decoder (reference_pixels.py). All else is a finding: any
other exception, a message of several lines or one that quotes a name, a warning of pydicom, a time above the limit, a
process that dies, and pixels that are not the reference's. The limit is one of CPU time, all reads and both processes
together; a minute by the clock is a hang. Memory is the highest resident size of either process.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import attribute_mutations
import mutations
import stream_mutations
from fuzz_reading import Reading
from good_files import good_files, read_folder

from ichpipe.dicom.decode_sandbox import TrialDecoder

LIMIT_S: Final = 2.0
HANGS_S: Final = 60.0
MEMORY_BYTES: Final = 4 * 2**30
REDRAWN: Final = 0.5  # share of mutations that change what the header says
LAST: Final = (stream_mutations.in_zip, mutations.deflate_bomb)  # not damaged again: that would unpack the bomb
STRONG: Final = 0.15  # share of cases that are damaged twice


def main() -> int:
    """Run, print a summary; exit code 1 where there are findings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--limit-s", type=float, default=LIMIT_S)
    parser.add_argument("--dicom", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for files that are findings")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.RLIM_INFINITY))  # a damaged file may claim anything
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), options)
    text = json.dumps(result, indent=2)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if result["findings"] else 0


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Damage and read files; return counts, time, memory and findings."""
    warnings.simplefilter("ignore")  # pydicom's, of damaged files
    sound = good_files(folder, options.size)
    if options.dicom:
        sound |= read_folder(options.dicom)
    started, tally, reader = time.perf_counter(), Tally(options), Reader()
    with suppress(KeyboardInterrupt):  # stopped: what was done counts
        for number in range(options.first, options.first + options.files):
            encoding, names, data = damaged(sound, number)
            path = folder / ("case.zip" if names[-1] == "in_zip" else "case.dcm")
            path.write_bytes(data)
            tally.add(number, encoding, names, data, reader.read(path))
    reader.close()
    return tally.summary(time.perf_counter() - started, reader.starts)


def damaged(sound: dict[str, list[bytes]], number: int) -> tuple[str, list[str], bytes]:
    """Return encoding, names of the mutations and bytes of one case; the number decides all."""
    chance = random.Random(number)  # noqa: S311
    encoding = list(sound)[number % len(sound)]
    data = chance.choice(sound[encoding])
    names: list[str] = []
    for _ in range(2 if chance.random() < STRONG else 1):
        try:
            parts = mutations.parts_of(data)
            coded = stream_mutations.fragments_of(parts) if parts.find(mutations.PIXELS) >= 0 else []
            choices = (*mutations.ANY_FILE, *((stream_mutations.in_zip,) if not names else ()))
            # Half of the other compressed files are damaged in what only they have.
            if chance.random() < REDRAWN:
                choices = attribute_mutations.REDRAWN
            elif coded and chance.random() < 0.5:
                choices = stream_mutations.COMPRESSED
            mutation = chance.choice(choices)
            data = mutation(parts, chance)
        except Exception:  # a file damaged before can't always be cut into its parts
            if not names:
                raise
            break
        names.append(mutation.__name__)
        if mutation in LAST:
            break
    return encoding, names, data


class Reader:
    """A child that reads files, replaced when it dies or hangs."""

    def __init__(self) -> None:
        self.starts = 0
        self._child: subprocess.Popen[str] | None = None

    def read(self, path: Path) -> dict[str, Any]:
        """Return what became of a file: outcome, message, seconds, kilobytes."""
        child = self._child or self._start()
        child.stdin.write(f"{path}\n")  # type: ignore[union-attr]
        child.stdin.flush()  # type: ignore[union-attr]
        begun = time.perf_counter()
        ready, _, _ = select.select([child.stdout], [], [], HANGS_S)
        line = child.stdout.readline() if ready else ""  # type: ignore[union-attr]
        if line:
            return dict(json.loads(line))
        self.close()
        outcome = "died" if ready else "hang"
        return {
            "outcome": outcome,
            "message": f"{outcome}: {child.returncode}",
            "s": time.perf_counter() - begun,
            "kb": 0,
        }

    def close(self) -> None:
        """End the child."""
        if self._child:
            self._child.kill()
            self._child.wait()
        self._child = None

    def _start(self) -> subprocess.Popen[str]:
        self.starts += 1
        code = "import fuzz; fuzz.serve()"
        where = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        self._child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=where
        )
        self._child.stdout.readline()  # type: ignore[union-attr]
        return self._child


def serve() -> None:
    """Read the file of each line on standard input, and answer with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    printed = os.fdopen(os.memfd_create("stderr"), "rb")
    os.dup2(printed.fileno(), 2)
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    with TrialDecoder() as trial:
        reading = Reading(trial)
        trial.start()
        answers.write("ready\n")
        for line in sys.stdin:
            answer = reading.read(Path(line.strip()))
            printed.seek(0)
            if b"Warning: " in (text := printed.read()):  # of pydicom: it may quote a name
                answer |= {"outcome": "warning", "message": text[:300].decode("utf-8", "replace")}
            os.ftruncate(2, 0)
            printed.seek(0)
            answers.write(json.dumps(answer) + "\n")


class Tally:
    """Counts outcomes and keeps findings."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._limit_s, self._keep = options.limit_s, options.keep
        self._outcomes: collections.Counter[str] = collections.Counter()
        self._of_encoding: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self._of_mutation: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self._cpu_of_mutation: collections.Counter[str] = collections.Counter()
        self._reasons: collections.Counter[str] = collections.Counter()
        self._seconds: list[float] = []
        self._cpu_s = 0.0
        self._kb, self._findings = 0, list[dict[str, Any]]()

    def add(self, number: int, encoding: str, names: list[str], data: bytes, found: dict[str, Any]) -> None:
        """Count one case."""
        outcome = str(found["outcome"])
        self._seconds.append(found["s"])
        self._cpu_s = max(self._cpu_s, found.get("cpu_s", 0.0))
        self._kb = max(self._kb, found["kb"])
        self._outcomes[outcome] += 1
        self._of_encoding[encoding][outcome] += 1
        for name in names:
            self._of_mutation[name][outcome] += 1
            self._cpu_of_mutation[name] = max(self._cpu_of_mutation[name], found.get("cpu_s", 0.0))
        if outcome == "refused":
            self._reasons["".join(" " if one.isdigit() else one for one in found["message"])[:60].strip()] += 1
        slow = found.get("cpu_s", found["s"]) > self._limit_s
        if outcome not in {"refused", "equal"} or slow:
            case = {"case": number, "encoding": encoding, "mutations": names, "slow": slow, **found}
            self._findings.append(case)
            if self._keep:
                self._keep.mkdir(parents=True, exist_ok=True)
                (self._keep / f"{number}.{'zip' if names[-1] == 'in_zip' else 'dcm'}").write_bytes(data)
            print(json.dumps(case), file=sys.stderr)

    def summary(self, seconds: float, starts: int) -> dict[str, Any]:
        """Return everything counted."""
        ordered = sorted(self._seconds)
        return {
            "files": len(ordered),
            "outcomes": dict(self._outcomes),
            "findings": len(self._findings),
            "slowest_s": round(ordered[-1], 3),
            "slowest_cpu_s": self._cpu_s,
            "median_s": round(ordered[len(ordered) // 2], 4),
            "peak_mb": self._kb // 1024,
            "reader_starts": starts,
            "seconds": round(seconds, 1),
            "by_encoding": {name: dict(counts) for name, counts in self._of_encoding.items()},
            "by_mutation": {name: dict(counts) for name, counts in sorted(self._of_mutation.items())},
            "slowest_cpu_s_by_mutation": dict(self._cpu_of_mutation.most_common()),
            "reasons": dict(self._reasons.most_common(40)),
            "first_findings": self._findings[:20],
        }


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
