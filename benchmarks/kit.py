"""What the benchmarks share: their options, a temporary folder, and the JSON file that each of them writes.

Every file is ``{"benchmark", "date", "commit", "machine", "versions", "parameters", "baseline", "ratios", "result"}``:
``ratios`` are numbers without a unit, each measured against ``baseline`` in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ichpipe.common.malloc import ENVIRONMENT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

FOLDER = Path(__file__).parent
LIBRARIES = (
    "ichpipe", "torch", "timm", "numpy", "pandas", "pyarrow", "zarr", "dask", "distributed", "pydicom", "imagecodecs",
    "pylibjpeg", "python-gdcm", "google-crc32c", "scikit-learn", "monai",
)  # fmt: skip


@dataclass(frozen=True)
class Benchmark:
    """One script: ``measure`` works in a folder of its own and returns JSON values, ``ratios`` picks from them."""

    baseline: str
    measure: Callable[[Path, argparse.Namespace], dict[str, Any]]
    ratios: Callable[[dict[str, Any]], dict[str, float | None]]
    add_options: Callable[[argparse.ArgumentParser], None]
    small: Mapping[str, Any]  # what ``--small`` changes

    def main(self, file: str, doc: str | None) -> None:
        """Run it as a program: read its options, measure, write and print the JSON."""
        options = self.parse(doc, sys.argv[1:])
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            text = json.dumps(self.run(Path(file).stem, Path(folder), options), indent=2)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(text + "\n", encoding="utf-8")
        print(text)

    def parse(self, doc: str | None, words: list[str]) -> argparse.Namespace:
        """Read options; with ``--small`` among them, what is not given has its small value."""
        parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
        self.add_options(parser)
        parser.add_argument("--folder", type=Path, help="where temporary files go")
        parser.add_argument("--small", action="store_true", help="a size that takes seconds; its figures mean nothing")
        parser.add_argument("--out", type=Path, help="JSON file to write")
        if "--small" in words:
            parser.set_defaults(**self.small)
        return parser.parse_args(words)

    def run(self, name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
        """Measure, and say beside the figures what they were measured on, and against what."""
        result = self.measure(folder, options)
        unsaid = {"folder", "out"}
        return {
            "benchmark": name,
            **facts(),
            "parameters": {key: _plain(value) for key, value in vars(options).items() if key not in unsaid},
            "baseline": self.baseline,
            "ratios": {
                key: None if value is None else float(f"{value:.4g}") for key, value in self.ratios(result).items()
            },
            "result": result,
        }


def like_the_command() -> None:
    """Start this program once more with the environment that ``ichpipe`` gives itself (`ichpipe.common.malloc`)."""
    if not ENVIRONMENT.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], own_heap())  # noqa: S606 - itself


def own_heap() -> dict[str, str]:
    """Return the environment with the variables of `ichpipe.common.malloc`; what the user has set wins."""
    return {name: str(value) for name, value in ENVIRONMENT.items()} | dict(os.environ)


def plain_heap() -> dict[str, str]:
    """Return the environment without the variables of `ichpipe.common.malloc`."""
    return {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}


def facts() -> dict[str, Any]:
    """Name date, commit, machine and versions."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": _commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def machine() -> dict[str, Any]:
    """Name the processor, the cores that this process may use, memory (GiB), GPU and threads a process may use."""
    import torch  # noqa: PLC0415 - the benchmarks of tables need none of it

    from ichpipe.common.device import accelerator_type, device_name  # noqa: PLC0415

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kind = accelerator_type()
    count = 0 if kind is None else torch.accelerator.device_count()
    gpus = [device_name(torch.device(str(kind), number)) for number in range(count)]
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "gpu": gpus or None,
        "system": f"{platform.system()} {platform.machine()}",
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _cpu() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=FOLDER, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-changed" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.name if isinstance(value, Path) else value


def ichpipe(*words: object) -> list[str]:
    """Return the command line of ``ichpipe`` in this interpreter, whether or not its script is on the PATH."""
    return [sys.executable, "-c", "from ichpipe.stages.cli import main; main()", *map(str, words)]


def status_mb(field: str = "VmRSS", pid: int | str = "self") -> float:
    """Return a memory field of a process (Linux): ``VmRSS`` what it holds, ``VmHWM`` the most it held, in MiB."""
    with open(f"/proc/{pid}/status", encoding="ascii") as lines:  # noqa: PTH123
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
