"""What the small core does without the extras, and what a command says whose extra is missing."""

import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from ichpipe.common.classes import CLASSES
from ichpipe.stages.cli import OPTIONAL

WITHOUT = f"""
import sys
for name in {sorted(OPTIONAL - {"PIL", "jinja2", "markupsafe"})}:  # torch and timm bring these three
    sys.modules[name] = None
from ichpipe.stages.cli import main
main(sys.argv[1:])
"""


def call_without(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("prepare", "iterstrat", "train"),
        ("extract", "dask", "train"),
        ("evaluate", "matplotlib", "train"),
        ("report", "pytorch_grad_cam", "report"),
        ("explain", "pytorch_grad_cam", "explain"),
    ],
)
def test_a_command_names_the_extra_that_it_lacks(branch, tmp_path, command, package, extra):
    rest = (branch.data, "--out", tmp_path / "maps") if command == "explain" else ()
    if command == "extract":  # a complete store asks for no worker
        shutil.rmtree(branch.artifacts / "embeddings.zarr")
        rest = ("--workers", "1")
    done = call_without(*branch.arguments(command, *rest), cwd=tmp_path)
    assert done.returncode == 1
    assert f"{command} needs the package {package}; run: pip install 'ichpipe[{extra}]'" in done.stderr


@pytest.mark.slow
def test_the_core_predicts_reads_the_store_and_scores(branch, tmp_path):
    model, table = branch.artifacts / "finetuned", branch.artifacts / "predictions" / "finetuned.parquet"
    done = call_without("predict", branch.data, "--model", model, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "slices.csv").read_text().count("\n") > 10
    for words in (("info",), ("verify",)):
        assert call_without("cache", *words, branch.artifacts / "embeddings.zarr", cwd=tmp_path).returncode == 0
    labels = pd.read_parquet(branch.artifacts / "index" / "slices.parquet").set_index("sop_uid")
    rows = pd.read_parquet(table)
    ours = labels.loc[rows["sop_uid"], list(CLASSES)].reset_index()
    ours.to_csv(tmp_path / "labels.csv", index=False)
    scored = call_without("score", table, tmp_path / "labels.csv", "--format", "rsna", cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["weighted_log_loss"] > 0
