"""The examples run unchanged on a tiny phantom, without a warning, and are short."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


def call(name, *arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "HOME": str(cwd)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_series_is_read_and_drawn(run, tmp_path):
    said = call("read_series.py", run.data / "dicom", "--out", "seen.png", cwd=tmp_path)
    assert re.search(r"\(\d+, 48, 48\), int16, -10\d\d to \d+ HU", said)
    assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")


def test_embeddings_are_searched_and_probed(run, tmp_path):
    said = call("search_and_probe.py", run.artifacts, cwd=tmp_path)
    similar = [float(value) for value in re.findall(r"similarity (-?[\d.]+)", said)]
    assert len(similar) == 5
    assert similar == sorted(similar, reverse=True)
    assert 0 <= float(re.search(r"AUC ([\d.]+)", said).group(1)) <= 1


@pytest.mark.slow
def test_own_data_are_predicted(run, index, tmp_path):
    said = call("predict_own.py", run.data / "dicom", "--model", run.artifacts / "finetuned", cwd=tmp_path)
    studies = pd.read_csv(tmp_path / "predictions" / "studies.csv")
    assert len(studies) == index["study_uid"].nunique()
    assert f"{len(studies)} studies, {len(index)} slices; 0 files left out" in said
    assert "without positions: say where the slices lie" in said


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_example_is_short_and_says_how_it_is_called(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert f"python examples/{path.name} " in text
    names = re.search(r"^from ichpipe import (.*)$", text, re.MULTILINE).group(1).split(", ")
    import ichpipe

    assert set(names) <= set(ichpipe.__all__)


def test_each_example_is_run_here():
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'call("{path.name}"' in text for path in SCRIPTS)
