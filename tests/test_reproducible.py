"""Stage two in two fresh clones of the same commit: the same bytes from the same cache, parameters and seed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = "from ichpipe.stages.cli import main; main()"
WHERE = "import ichpipe, pathlib; print(pathlib.Path(ichpipe.__file__).parents[1])"


def clone(folder):
    """Clone this checkout (or, where there is none, copy it) and lay its rooms out as they install."""
    source = folder / "source"
    if (ROOT / ".git").exists():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    else:
        for room in ("pipeline", "stages", "cache"):
            shutil.copytree(ROOT / room, source / room)
    site = folder / "site"
    for room, package in (("pipeline", "ichpipe"), ("stages", "ichpipe/stages"), ("cache", "ichpipe/cache")):
        shutil.copytree(source / room, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    return {**os.environ, "PYTHONPATH": str(site)}


@pytest.mark.slow
def test_two_fresh_clones_give_the_same_bytes(run, tmp_path):
    made = []
    for name in ("one", "two"):
        environment = clone(tmp_path / name)
        location = subprocess.run(
            [sys.executable, "-c", WHERE], env=environment, check=True, capture_output=True, text=True
        ).stdout.strip()
        assert Path(location) == tmp_path / name / "site"  # the clone's code, not this checkout's
        branch = run.copy(tmp_path / name / "run")
        shutil.rmtree(branch.artifacts / "sequence")
        shutil.rmtree(branch.artifacts / "metrics")
        for command in ("fit-sequence", "finetune", "evaluate", "compare"):
            line = [sys.executable, "-c", CODE, *branch.arguments(command)]
            subprocess.run(line, env=environment, check=True, capture_output=True)
        made.append(branch.artifacts)
    one, two = made
    names = [f"sequence/{arm}/{file}" for arm in ("paper", "gru-logits", "floor") for file in
             ("model.safetensors", "predictions.parquet", "history.json")]  # fmt: skip
    names += ["finetuned/predictions.parquet", "metrics/evaluate.json"]
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert without_seconds(one) == without_seconds(two)


def without_seconds(artifacts):
    comparison = json.loads((artifacts / "compare" / "arms.json").read_text())
    for row in comparison["arms"]:
        assert row.pop("seconds_per_seed") >= 0
    return comparison


@pytest.mark.slow
def test_from_files_to_the_store_another_process_gives_the_same_bytes(run, tmp_path):
    """The other half: index, slice CNN and store, made anew from the DICOM files, with decoding and Dask processes."""
    other = run.fresh(tmp_path / "again")
    for words in (("prepare",), ("fit-slices", "--workers", "1"), ("extract", "--workers", "2")):
        line = [sys.executable, "-c", CODE, *other.arguments(*words)]
        subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    for folder in ("index", "slice-cnn", "embeddings.zarr"):
        one, two = (bytes_of(root / folder) for root in (run.artifacts, other.artifacts))
        assert one.keys() == two.keys()
        assert [name for name in one if one[name] != two[name]] == []


def bytes_of(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "record.json"]  # wall times
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
