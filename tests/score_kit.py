"""What the tests of ``score`` share: made-up slices, the forms they come in, and calls of the command."""

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from ichpipe.common.classes import CLASSES, SUBTYPES
from ichpipe.index.cq500_reads import FINDINGS, READERS
from ichpipe.stages.cli import cli, main

KAGGLE = [*SUBTYPES, "any"]
FAST = ["--set", "evaluate.bootstrap_samples=40"]


def make(n=60, patients=6, seed=0):
    """Labels and predictions of slices: frames with ``sop_uid``, identifiers and the six classes."""
    generator = np.random.default_rng(seed)
    patient = np.sort(generator.integers(patients, size=n))
    groups = pd.DataFrame(
        {
            "patient_id": [f"P{number}" for number in patient],
            "study_uid": [f"1.2.{number}" for number in patient],
            "series_uid": [f"1.2.{number}.{row % 2}" for row, number in enumerate(patient)],
            "sop_uid": [f"ID_{number:09x}" for number in generator.permutation(n)],
        }
    )
    true = (generator.random((n, 6)) < 0.25).astype(int)
    true[:, 0] = true[:, 1:].max(axis=1)
    found = np.clip(0.4 * true + 0.6 * generator.random((n, 6)), 0.001, 0.999).round(4)
    labels, predictions = (groups.join(pd.DataFrame(values, columns=list(CLASSES))) for values in (true, found))
    return labels, predictions.sample(frac=1, random_state=seed).reset_index(drop=True)


def reads_text(rows):
    """CQ500's reads.csv of rows (name, 18 reads: six findings of each reader)."""
    columns = [f"{reader}:{finding}" for reader in READERS for finding in FINDINGS.values()]
    return "".join(",".join(map(str, row)) + "\n" for row in [("name", *columns), *((name, *r) for name, r in rows)])


def long_rows(table):
    """Kaggle's rows, in its order of classes."""
    values = table.set_index("sop_uid")[KAGGLE]
    return [f"{uid}_{name},{values.loc[uid, name]:g}" for uid in values.index for name in KAGGLE]


def write_long(table, path, rows=None):
    path.write_text("\n".join(["ID,Label", *(rows or long_rows(table))]) + "\n", encoding="utf-8")
    return path


def write_wide(table, path, order=KAGGLE):
    table.rename(columns={"sop_uid": "ID"})[["ID", *order]].to_csv(path, index=False)
    return path


def write_slices(table, path):
    """``slices.csv`` as ``predict`` writes it."""
    table.assign(slice_index=0, position_mm=0.0).to_csv(path, index=False)
    return path


def score(*arguments):
    """Run the command; return the JSON of standard output and the text of standard error."""
    done = CliRunner().invoke(cli, [*FAST, "score", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), done.stderr


def error(capsys, *arguments):
    """Run through the outermost door; return the one line of a failure."""
    with pytest.raises(SystemExit) as stop:
        main([*FAST, "score", *map(str, arguments)])
    assert stop.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ichpipe: ")
    assert len(captured.err.splitlines()) == 1
    return captured.err
