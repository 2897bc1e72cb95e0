"""Install check on any system: help, a phantom, every step of a tiny run, and predictions of it.

python .ci/smoke.py

It uses the installed `ichpipe` in a temporary folder; the numbers mean nothing. Exit code 1 where a step fails.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

STUDIES = 16
PARAMS = """
phantom: {size_px: 48}
prepare: {dicom_dir: phantom/dicom, labels: phantom/stage_2_train.csv, size_px: 48, test_fraction: 0.3, folds: 2}
fit-slices: {backbone: resnet10t, epochs: 1, precision: fp32}
extract: {chunk_rows: 100}
sequence:
  paper: {cell: lstm, hidden: 8, layers: 1, epochs: 1}
finetune: {arm: paper, epochs: 1}
evaluate: {bootstrap_samples: 50}
"""


def main() -> int:
    """Run the steps in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "params.yaml").write_text(PARAMS, encoding="utf-8")
        for line in (
            ["--version"],
            ["--help"],
            ["phantom", "--out", "phantom", "--studies", str(STUDIES)],
            ["run", "--predict", "phantom/dicom", "--out", "predictions"],
        ):
            print("ichpipe", *line, flush=True)
            if (code := subprocess.run(["ichpipe", *line], cwd=folder, check=False).returncode) != 0:  # noqa: S603, S607
                print(f"ichpipe {line[0]} ended with exit code {code}; see its message above")
                return 1
        with (folder / "predictions" / "studies.csv").open(encoding="utf-8", newline="") as table:
            studies = list(csv.DictReader(table))
    if len(studies) != STUDIES or not all(0 <= float(study["any"]) <= 1 for study in studies):
        print(f"studies.csv has {len(studies)} studies instead of {STUDIES}, or a number that is no probability")
        return 1
    print(f"{STUDIES} studies predicted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
