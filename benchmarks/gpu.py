"""For whoever has a GPU for ten minutes: tests, extraction, training, fine-tuning and stage two at RSNA's size.

python -m benchmarks gpu --out gpu.json       # ten minutes at most on one GPU; 4 GB of disk
python -m benchmarks gpu --tiny               # the same on a CPU in two minutes; its figures mean nothing

Each part runs in a process of its own, within what is left of ``--minutes``. A part that fails or has no time left
says so in the file, and the others go on. Without a GPU it prints ``no GPU`` and stops, unless ``--tiny`` is given.

This script has never run on a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PACKAGES = ("torch", "timm", "numpy", "pandas", "pyarrow", "pydicom", "zarr", "dask", "distributed", "pytest")
MODULES = {"ichpipe": "ichpipe"} | {name: name for name in PACKAGES}
PARTS = ("tests", "extract", "train", "finetune", "sequence")
GPU_TESTS = ("test_extraction.py", "test_faults.py")  # the one in test_arms.py trains a whole run first, for minutes
RSNA = ("--slices", "752803", "--series", "21744")


def main(words: list[str]) -> int:
    """Run the parts and write the JSON; 1 if a part failed, 2 without a GPU or a package."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, on whatever device there is")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together [10]")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/gpu.json"), help="JSON file to write")
    options = parser.parse_args(words)
    if missing := [name for name, module in MODULES.items() if importlib.util.find_spec(module) is None]:
        print(explain_missing(missing), file=sys.stderr)
        return 2
    if str(FOLDER) not in sys.path:  # the scripts import each other by their names
        sys.path.insert(0, str(FOLDER))
    import kit  # noqa: PLC0415 - a bare machine lacks what it needs

    from ichpipe.common.device import choose_device, device_name  # noqa: PLC0415

    device = choose_device("auto")
    if device.type == "cpu":
        print("no GPU: PyTorch finds none; see docs/troubleshooting.md", file=sys.stderr)
        if not options.tiny:
            return 2
    end, found = time.monotonic() + 60 * options.minutes, {}
    for name in options.only:
        found[name] = measure_part(name, end - time.monotonic(), tiny=options.tiny)
        print(f"{name}: {found[name].get('error', 'done')} ({found[name]['seconds']:.0f} s)", flush=True)
    facts = kit.facts() | {"device": device_name(device), "tiny": options.tiny, "minutes": options.minutes}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"benchmark": "gpu", **facts, "result": found}, indent=2) + "\n")
    print(f"written: {options.out}")
    return int(any("error" in part for part in found.values()))


def explain_missing(missing: list[str]) -> str:
    """Return the commands that install what is missing, here or by wheels from another machine."""
    others = [name for name in missing if name != "ichpipe"]
    lines = [f"missing: {', '.join(missing)}"]
    if others:
        versions = "-c constraints.txt"
        names = " ".join(others)
        lines += [
            f"install: {sys.executable} -m pip install {versions} {names}",
            f"without a network here, on another machine: pip download {versions} -d wheels {names}",
            f"and here: {sys.executable} -m pip install --no-index --find-links wheels {versions} {names}",
        ]
    if "ichpipe" in missing:
        lines.append(f"ichpipe itself, in its checkout: {sys.executable} -m pip install --no-deps -e .")
    return "\n".join(lines)


def measure_part(name: str, seconds: float, *, tiny: bool) -> dict[str, Any]:
    """Run one part in a process of its own; what it found, or why it did not, with its seconds."""
    start = time.monotonic()
    if seconds < 5:
        return {"error": "no time was left; raise --minutes, or name parts with --only", "seconds": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "part.json"
        try:
            done = subprocess.run(
                command_of(name, written, tiny=tiny),
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
                cwd=FOLDER.parent,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after the {seconds:.0f} s that were left", "seconds": time.monotonic() - start}
        if name == "tests":
            found: dict[str, Any] = {"summary": done.stdout.strip().rpartition("\n")[2]}
        elif done.returncode == 0:
            found = json.loads(written.read_text()) if written.exists() else json.loads(done.stdout.splitlines()[-1])
        else:
            found = {}
    if done.returncode:
        found["error"] = f"exit code {done.returncode}"
        found["last_lines"] = (done.stdout + done.stderr).splitlines()[-20:]
    return found | {"seconds": round(time.monotonic() - start, 1)}


def command_of(name: str, written: Path, *, tiny: bool) -> list[str]:
    """Return the command line of a part."""
    python, small = sys.executable, ["--small"] if tiny else []
    if name == "tests":
        files = [str(FOLDER.parent / "tests" / file) for file in GPU_TESTS]
        return [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *files]
    if name == "extract":
        size = small or ["--slices", "1024", "--precision", "bf16", "--batch", "128", "--rounds", "2"]
        size += ["--encodings", "uncompressed"]
        return [python, str(FOLDER / "extract.py"), *size, "--out", str(written)]
    if name == "sequence":
        size = small or [*RSNA, "--precision", "bf16"]
        return [python, str(FOLDER / "sequence.py"), *size, "--epochs", "1", "--out", str(written)]
    return [python, str(FOLDER / "gpu_training.py"), name, *(["--tiny"] if tiny else [])]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
