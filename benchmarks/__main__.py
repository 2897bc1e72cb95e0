"""All benchmarks by one command, each a process of its own; then pictures of what they wrote.

python -m benchmarks --out results                      # hours at full size
python -m benchmarks --only store growth --out results
python -m benchmarks --small                            # every one in seconds; shows that they run
python -m benchmarks plot results --out docs            # PNG files from the JSON files
python -m benchmarks gpu                                # for whoever has a GPU for ten minutes

What has no baseline is run by itself: fuzz.py and guards.py, stage_kills.py (docs/reliability.md), ladder.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
FIRST = ("extract", "alternatives", "growth", "cluster", "store", "extract_unchanged", "kills", "prepare", "feeding")


def main(words: list[str]) -> int:
    """Run what is asked for; 1 if any benchmark failed."""
    if words[:1] == ["plot"]:
        sys.path.insert(0, str(FOLDER))
        import plot  # noqa: PLC0415 - matplotlib, for this command alone

        return int(plot.main(words[1:]))
    if words[:1] == ["gpu"]:
        sys.path.insert(0, str(FOLDER))
        import gpu  # noqa: PLC0415 - says what a bare machine lacks

        return int(gpu.main(words[1:]))
    there = names()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=there, default=there, metavar="NAME", help=", ".join(there))
    parser.add_argument("--small", action="store_true", help="a size that takes seconds; its figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder of the JSON files")
    options = parser.parse_args(words)
    failed = [name for name in options.only if not one(name, options.out, small=options.small)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def names() -> list[str]:
    """List the scripts that can be run, those about the speed of the whole first."""
    found = {path.stem for path in FOLDER.glob("*.py") if "\nBENCHMARK = " in path.read_text(encoding="utf-8")}
    return [name for name in FIRST if name in found] + sorted(found - set(FIRST))


def one(name: str, out: Path, *, small: bool) -> bool:
    """Run one script; say its ratios. A file of an earlier run is removed first."""
    target = out / f"{name}.json"
    target.unlink(missing_ok=True)
    start = time.perf_counter()
    script = FOLDER / f"{name}.py"
    command = [sys.executable, str(script), "--out", str(target), *(["--small"] if small else [])]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode or not target.exists():
        print(f"{name}: exit code {done.returncode}", flush=True)
        return False
    result = json.loads(target.read_text(encoding="utf-8"))
    print(f"{name} ({time.perf_counter() - start:.0f} s), against {result['baseline']}", flush=True)
    for line in ratio_lines(result["ratios"]):
        print(f"    {line}", flush=True)
    return True


def ratio_lines(ratios: dict[str, Any]) -> list[str]:
    """Return one line a ratio."""
    return [f"{name}: {'not measured' if value is None else format(value, '.4g')}" for name, value in ratios.items()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
