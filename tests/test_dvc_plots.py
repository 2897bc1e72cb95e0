"""The plots that dvc.yaml names are of files that `evaluate` writes, and DVC itself draws them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PLOTS = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["plots"]
DRAWN = {name: body for plot in PLOTS if isinstance(plot, dict) for name, body in plot.items()}
PICTURES = [plot for plot in PLOTS if isinstance(plot, str)]


def rows_of(run, path):
    return json.loads((run.artifacts.parent / path).read_text())


@pytest.mark.parametrize("name", DRAWN)
def test_columns_are_in_the_files(run, name):
    body = DRAWN[name]
    for path, columns in body["y"].items():
        rows = rows_of(run, path)
        plotted = {body["x"], *([columns] if isinstance(columns, str) else columns)}
        assert rows
        assert all(plotted <= set(row) for row in rows)


@pytest.mark.parametrize("path", PICTURES)
def test_pictures_are_written(run, path):
    assert (run.artifacts.parent / path).read_bytes().startswith(b"\x89PNG")


def test_every_learning_stage_has_a_curve(run):
    models = {row["model"] for row in rows_of(run, "artifacts/plots/learning_curves.json")}
    assert models == {"slice CNN", "sequence, paper", "sequence, gru-logits", "sequence, floor", "fine-tuned"}


@pytest.mark.slow
def test_dvc_draws_them(run, tmp_path):
    dvc = shutil.which("dvc", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if dvc is None:
        pytest.skip("DVC is not installed")
    shutil.copytree(run.artifacts, tmp_path / "artifacts", ignore=shutil.ignore_patterns("*.zarr", ".resume"))
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"plots": PLOTS}, sort_keys=False))

    def call(*arguments):
        done = subprocess.run([dvc, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call("init", "--no-scm", "--quiet")
    shutil.copytree(ROOT / ".dvc" / "plots", tmp_path / ".dvc" / "plots")
    shown = json.loads(call("plots", "show", "--json"))
    assert not shown.get("errors")
    assert set(shown["data"]) == {*DRAWN, *PICTURES}
    for name, body in DRAWN.items():
        content = shown["data"][name][0]["content"]
        drawn = json.loads(content) if isinstance(content, str) else content
        assert "<DVC" not in json.dumps(drawn)
        assert drawn["spec"]["encoding"]["x"]["field"] == body["x"]
        assert len(drawn["data"]["values"]) > 5
        assert drawn["facet"]["field"] in drawn["data"]["values"][0]
