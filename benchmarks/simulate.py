"""Sequences of RSNA 2019's size without its images: real label rows and series lengths, drawn embeddings.

With the table of series, each study holds the label rows of one real series: share of positive studies, of positive
slices in them, and mixtures of classes are real. The table has no order within a series: positive slices stand in one
or two runs, and in a run rows that differ least stand together, which is invented. Without the table of series a study
is positive or not by an assumed share, and a run has the subtypes of one real positive slice. Six directions of the
embedding carry the classes, the others noise. What makes a slice hard is drawn as it was
measured on 55 CT-ICH patients (out-of-fold logits of a slice CNN): its error is shared by neighbours (correlation .8;
.7 for the rest of the embedding), and whole runs are faint or plain. The strength of the signal is set so that the best
linear head scores what 2-D CNNs score on RSNA's stage-1 test. Left out, for want of a measurement: runs that look
positive and are not, and readers who differ about the ends of a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression

from ichpipe.common.classes import CLASSES
from ichpipe.scoring.metrics import weighted_log_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

ERROR_CORRELATION = 0.8
FEATURE_CORRELATION = 0.7
POSITIVE_STUDIES = 0.4
"""Share of studies with a haemorrhage where no table of series is given (39.9 % of 6,750 real series)."""
SECOND_RUN = 0.29
"""Share of positive studies whose positive slices form two runs (CT-ICH: 1.29 runs a study)."""
STRENGTH_VARIATION = 0.37
"""Coefficient of variation of the signal between runs (CT-ICH, what the error's correlation leaves unexplained)."""
LINEAR_LOSS = 0.063
"""Weighted log loss of 2-D CNNs on stage-1 test (Nguyen et al. 2020 and the log of its code)."""
NUISANCE = 64
GENERIC_ROWS = {  # prevalence of stage-1 train, for a run without the table
    "epidural": 0.0041,
    "intraparenchymal": 0.0483,
    "intraventricular": 0.0352,
    "subarachnoid": 0.0476,
    "subdural": 0.0630,
}


@dataclass(frozen=True)
class Simulated:
    """Labels (n, 6), signal (n, 6) and noise (n, 64) of all slices, and the linear head on the signal."""

    lengths: NDArray[np.intp]
    labels: Floats
    signal: Floats
    noise: Floats
    weight: Floats  # (6, 6)
    bias: Floats  # (6,)
    linear_loss: float
    strength: float

    def logits(self, rows: slice | NDArray[np.intp]) -> Floats:
        """Return the linear head's logits."""
        return np.asarray(self.signal[rows] @ self.weight.T + self.bias, dtype=np.float32)

    def embedding(self, rows: slice | NDArray[np.intp], dim: int) -> Floats:
        """Return embeddings (n, dim): signal and noise along random directions, and a little noise of their own."""
        draw = np.random.default_rng(5)
        mix = draw.normal(size=(6 + NUISANCE, dim)).astype(np.float32) / np.sqrt(6 + NUISANCE)
        known = np.concatenate([self.signal[rows], self.noise[rows]], axis=1)
        own = draw.normal(size=(4096, dim)).astype(np.float32) * 0.05
        values = known @ mix
        values += own[np.arange(len(values)) % len(own)]
        return np.asarray(values, dtype=np.float32)


def simulate(
    lengths: NDArray[np.intp],
    rows: NDArray[np.float32],
    seed: int = 0,
    target: float = LINEAR_LOSS,
    series: Sequence[NDArray[np.float32]] = (),
) -> Simulated:
    """Draw labels and features; ``rows`` (m, 6) are real label rows in the order of CLASSES.

    ``series`` are the label rows of real series: as many as ``lengths`` are drawn, and their lengths replace it.
    """
    draw = np.random.default_rng(seed)
    if series:
        drawn = [series[number] for number in draw.integers(len(series), size=len(lengths))]
        lengths = np.array([len(one) for one in drawn], dtype=np.intp)
        parts = [arrange(one, draw) for one in drawn]
        labels, shown = (np.concatenate(part) for part in zip(*parts, strict=True))
    else:
        labels, shown = draw_runs(lengths, rows, draw)
    errors = neighbourly(lengths, 6, ERROR_CORRELATION, draw)
    noise = neighbourly(lengths, NUISANCE, FEATURE_CORRELATION, draw)
    strength, head, loss = _fit_strength(labels, shown, errors, target)
    signal = errors + strength * shown
    weight, bias = (np.stack([part(one) for one in head]).astype(np.float32) for part in
                    (lambda one: one.coef_[0], lambda one: one.intercept_[0]))  # fmt: skip
    return Simulated(lengths, labels, signal, noise, weight, bias, loss, strength)


def real_series(table: pd.DataFrame, labels: pd.DataFrame) -> list[NDArray[np.float32]]:
    """Return the label rows (T, 6) of each real series; ``table`` has ID and series, ``labels`` has ID and classes."""
    name = next(column for column in labels.columns if column not in CLASSES)  # without a heading in some tables
    joined = table.merge(labels, left_on="ID", right_on=name, validate="one_to_one")
    if len(joined) < len(table):
        raise ValueError(f"{len(table) - len(joined)} slices of the table of series have no label row")
    rows = joined.sort_values("series", kind="stable")
    values = rows[list(CLASSES)].to_numpy(np.float32)
    return np.split(values, np.flatnonzero(np.diff(pd.factorize(rows["series"])[0])) + 1)


def arrange(rows: NDArray[np.float32], draw: np.random.Generator) -> tuple[Floats, Floats]:
    """Order the label rows (T, 6) of one series; return them and what images show of them (T, 6)."""
    labels, shown = np.zeros_like(rows), np.zeros_like(rows)
    left = list(rows[rows[:, 0] == 1])
    if not left:
        return labels, shown
    chain = [left.pop(int(draw.integers(len(left))))]
    while left:
        distances = [np.abs(row - chain[-1]).sum() for row in left]
        chain.append(left.pop(int(np.argmin(distances))))
    cut = int(draw.integers(1, len(chain))) if len(chain) > 1 and draw.random() < SECOND_RUN else len(chain)
    runs = [run for run in (chain[:cut], chain[cut:]) if run]
    empty = len(rows) - len(chain)  # negative slices before, between and after the runs
    gaps = np.sort(draw.integers(empty + 1, size=len(runs)))
    done = 0
    for run, gap in zip(runs, gaps, strict=True):
        start = int(gap) + done
        labels[start : start + len(run)] = run
        shown[start : start + len(run)] = np.stack(run) * draw_strength(draw)
        done += len(run)
    return labels, shown


def draw_strength(draw: np.random.Generator) -> np.float32:
    """Draw how plain one run is: log-normal, with mean 1."""
    spread = np.sqrt(np.log1p(STRENGTH_VARIATION**2))
    return np.float32(np.exp(spread * draw.standard_normal() - spread**2 / 2))


def draw_runs(lengths: NDArray[np.intp], rows: NDArray[np.float32], draw: np.random.Generator) -> tuple[Floats, Floats]:
    """Draw labels (n, 6), whose share of positives is that of the table, and what images show of them (n, 6)."""
    positive = rows[rows[:, 0] == 1]
    share = float(rows[:, 0].mean()) / POSITIVE_STUDIES
    offset = np.concatenate([[0], np.cumsum(lengths)])
    labels = np.zeros((int(offset[-1]), 6), dtype=np.float32)
    shown = np.zeros_like(labels)
    ill = draw.random(len(lengths)) < POSITIVE_STUDIES
    for number in np.flatnonzero(ill):
        first, last = int(offset[number]), int(offset[number + 1])
        wanted = draw.gamma(4, share * (last - first) / 4)
        runs = 2 if draw.random() < SECOND_RUN else 1
        for _ in range(runs):
            size = min(max(1, round(wanted / runs)), last - first)
            start = first + int(draw.integers(last - first - size + 1))
            row = positive[draw.integers(len(positive))]
            labels[start : start + size] = row
            shown[start : start + size] = row * draw_strength(draw)
    return labels, shown


def neighbourly(lengths: NDArray[np.intp], width: int, correlation: float, draw: np.random.Generator) -> Floats:
    """Draw standard normal noise (n, width) in which neighbours of a series correlate (a first-order process)."""
    offset = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    found = draw.standard_normal((int(lengths.sum()), width), dtype=np.float32)
    for step in range(1, int(lengths.max())):
        here = offset[lengths > step] + step
        found[here] = correlation * found[here - 1] + np.sqrt(1 - correlation**2) * found[here]
    return found


def _fit_strength(labels: Floats, shown: Floats, errors: Floats, target: float) -> tuple[float, list[Any], float]:
    """Find the strength of the signal at which the best linear head scores ``target``, by bisection."""
    some = np.linspace(0, len(labels) - 1, min(len(labels), 120_000)).astype(np.intp)
    fit, test = some[::2], some[1::2]
    low, high = 0.5, 12.0
    head, loss, middle = [], np.inf, high
    for _ in range(14):
        middle = (low + high) / 2
        signal = errors[fit] + middle * shown[fit]
        head = [LogisticRegression(C=100.0, max_iter=300).fit(signal, labels[fit, one]) for one in range(6)]
        held_out = errors[test] + middle * shown[test]
        found = np.stack([one.predict_proba(held_out)[:, 1] for one in head], axis=1)
        loss = weighted_log_loss(labels[test], found)
        low, high = (middle, high) if loss > target else (low, middle)
    return middle, head, float(loss)


def label_rows(tables: Sequence[pd.DataFrame] | None) -> NDArray[np.float32]:
    """Return label rows (m, 6): of real tables, or drawn at RSNA's prevalence, subtypes apart."""
    if tables:
        return np.concatenate([table[list(CLASSES)].to_numpy(np.float32) for table in tables])
    draw = np.random.default_rng(3)
    rows = np.zeros((20_000, 6), dtype=np.float32)
    for name, prevalence in GENERIC_ROWS.items():
        rows[:, CLASSES.index(name)] = draw.random(len(rows)) < prevalence
    rows[:, 0] = rows[:, 1:].max(axis=1)
    return rows
