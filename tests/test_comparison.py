"""Arms beside each other: figures by hand, noise called noise, and what can't be compared said."""

import json
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.common.text_table import format_table
from ichpipe.report.figures import arms_figure
from ichpipe.scoring.arm_comparison import Arm, compare_arms, comparison_text
from ichpipe.scoring.heldout_predictions import LABELS
from ichpipe.scoring.metrics import paired_difference, weighted_log_loss

SETTINGS = {"bootstrap_samples": 400, "confidence": 0.95, "seed": 0}


def make_arm(name, skill, seeds=(0, 1, 2), *, spread=0.05, patients=60, store="s", drop=0, order=None):
    """An arm whose logits carry ``skill`` times the truth; seeds differ by noise of ``spread``."""
    generator = np.random.default_rng(7)
    size = 12 * patients
    truth = (generator.random((size, 6)) < 0.3).astype(float)
    truth[:, 0] = truth[:, 1:].max(axis=1)
    common = generator.normal(size=(size, 6))
    parts = []
    for seed in seeds:
        own = np.random.default_rng([seed, zlib.crc32(name.encode())]).normal(size=(size, 6)) * spread
        values = 1 / (1 + np.exp(-(skill * (2 * truth - 1) + common + own - 0.5)))
        table = pd.DataFrame(values, columns=list(CLASSES))
        table[LABELS] = truth
        table["sop_uid"] = [f"1.{row}" for row in range(size)]
        table["patient_id"] = [f"p{row // 12}" for row in range(size)]
        table["seed"] = seed
        parts.append(table.iloc[drop:] if order is None else table.iloc[order])
    record = {"store": store, "n_parameters": 123456, "seeds": [{"seed": s, "seconds": 2.0} for s in seeds]}
    return Arm(name, pd.concat(parts, ignore_index=True), record)


def rows_of(found):
    return {row["arm"]: row for row in found["arms"]}


def test_figures_equal_the_metric_of_each_seed():
    arms = [make_arm("base", 1.0), make_arm("other", 1.4)]
    found = rows_of(compare_arms(arms, "base", **SETTINGS))
    for arm in arms:
        losses, aucs = [], []
        for _, part in arm.table.groupby("seed"):
            losses.append(weighted_log_loss(part[LABELS], part[list(CLASSES)]))
            aucs.append(roc_auc_score(part["label_any"], part["any"]))
        row = found[arm.name]
        assert row["weighted_log_loss"]["of_seeds"] == pytest.approx(losses)
        assert row["weighted_log_loss"]["mean"] == pytest.approx(np.mean(losses))
        assert row["weighted_log_loss"]["sd"] == pytest.approx(np.std(losses, ddof=1))
        assert row["auc"]["any"] == pytest.approx(np.mean(aucs))
        assert sum(row["log_loss"].values()) + row["log_loss"]["any"] == pytest.approx(7 * np.mean(losses))


def test_with_one_seed_the_interval_is_that_of_two_models():
    base, other = make_arm("base", 1.0, (0,)), make_arm("other", 1.2, (0,))
    gain = rows_of(compare_arms([base, other], "base", **SETTINGS))["other"]["gain"]
    wanted = paired_difference(
        base.table[LABELS], base.table[list(CLASSES)], other.table[list(CLASSES)], base.table["patient_id"], **SETTINGS
    )
    for name in ("weighted_log_loss", "auc_any"):
        assert {key: gain[name][key] for key in wanted[name]} == pytest.approx(wanted[name])
    assert gain["weighted_log_loss"]["seed_error"] is None


@pytest.mark.parametrize(("skill", "expected"), [(2.0, "too few seeds"), (0.5, "too few seeds"), (1.0, "noise")])
@pytest.mark.parametrize(("of_base", "of_arm"), [((0,), (0,)), ((0, 1, 2), (0,)), ((0,), (0, 1, 2))])
def test_one_seed_is_too_few_for_a_verdict(skill, expected, of_base, of_arm):
    """A gain of twice the error over seeds can't be shown where that error is unknown."""
    found = compare_arms([make_arm("base", 1.0, of_base), make_arm("arm", skill, of_arm)], "base", **SETTINGS)
    assert rows_of(found)["arm"]["verdict"] == expected
    assert "too few" in comparison_text(found)
    assert arms_figure(found)


def make_fixed(name, skill, seeds=(0,), **settings):
    """An arm with nothing to learn, as the moving average is: every seed gives the same."""
    arm = make_arm(name, skill, (0,), **settings)
    table = pd.concat([arm.table.assign(seed=seed) for seed in seeds], ignore_index=True)
    return Arm(name, table, arm.record | {"n_parameters": 0})


@pytest.mark.parametrize(("skill", "expected"), [(2.0, "better"), (0.5, "worse"), (1.0, "noise")])
@pytest.mark.parametrize(("of_base", "of_arm"), [((0,), (0,)), ((0, 1, 2), (0, 1))])
def test_an_arm_without_anything_to_learn_has_no_seed(skill, expected, of_base, of_arm):
    """Too few seeds are no reason: it has none to vary."""
    found = compare_arms([make_arm("base", 1.0, of_base), make_fixed("floor", skill, of_arm)], "base", **SETTINGS)
    row = rows_of(found)["floor"]
    assert row["verdict"] == expected
    assert row["seeds"] == []
    assert row["weighted_log_loss"]["sd"] is None
    line = next(line for line in comparison_text(found).splitlines() if line.startswith("| floor"))
    assert line.split("|")[2].strip() == "none"
    assert arms_figure(found)


def test_beside_an_arm_without_seeds_the_other_one_needs_two():
    arms = [make_fixed("floor", 1.0), make_arm("one", 2.0, (0,)), make_arm("three", 2.0), make_fixed("other", 2.0)]
    found = rows_of(compare_arms(arms, "floor", **SETTINGS))
    assert {name: row["verdict"] for name, row in found.items()} == {
        "floor": "baseline", "one": "too few seeds", "three": "better", "other": "better",
    }  # fmt: skip
    three, spread = found["three"]["gain"]["weighted_log_loss"], found["three"]["weighted_log_loss"]["sd"]
    assert three["seed_error"] == pytest.approx(spread / 3**0.5)


def test_an_arm_without_seeds_is_held_against_the_spread_of_the_baseline():
    wild = make_arm("base", 1.0, spread=0.05)
    shift = wild.table["seed"].map({0: 0.0, 1: 1.5, 2: -1.5})
    logits = np.log(wild.table[list(CLASSES)] / (1 - wild.table[list(CLASSES)])).add(shift, axis=0)
    wild.table[list(CLASSES)] = 1 / (1 + np.exp(-logits))
    row = rows_of(compare_arms([wild, make_fixed("floor", 0.9)], "base", **SETTINGS))["floor"]
    gain = row["gain"]["weighted_log_loss"]
    assert not gain["simultaneous"][0] <= 0 <= gain["simultaneous"][1]
    assert abs(gain["value"]) < 2 * gain["seed_error"]
    assert row["verdict"] == "noise"


def test_better_worse_and_noise():
    arms = [make_arm("base", 1.0), make_arm("good", 1.5), make_arm("bad", 0.6), make_arm("same", 1.0)]
    found = compare_arms(arms, "base", **SETTINGS)
    verdicts = {row["arm"]: row["verdict"] for row in found["arms"]}
    assert verdicts == {"base": "baseline", "good": "better", "bad": "worse", "same": "noise"}
    for row in found["arms"][1:]:
        gain = row["gain"]["weighted_log_loss"]
        low, high = gain["simultaneous"]
        assert low <= gain["ci_low"] + 1e-3  # for all arms together it can't be narrower
        assert high >= gain["ci_high"] - 1e-3


def test_a_gain_within_the_spread_of_seeds_is_noise():
    steady, wild = make_arm("arm", 1.15), make_arm("arm", 1.15)
    shift = {0: 0.0, 1: 0.8, 2: -0.8}  # one seed gains what another loses
    logits = np.log(wild.table[list(CLASSES)] / (1 - wild.table[list(CLASSES)]))
    moved = logits.add(wild.table["seed"].map(shift), axis=0) * 1.05
    wild.table[list(CLASSES)] = 1 / (1 + np.exp(-moved))
    base = make_arm("base", 1.0)
    assert rows_of(compare_arms([base, steady], "base", **SETTINGS))["arm"]["verdict"] == "better"
    row = rows_of(compare_arms([base, wild], "base", **SETTINGS))["arm"]
    assert row["gain"]["weighted_log_loss"]["seed_error"] > 0.01
    assert row["verdict"] == "noise"


@pytest.mark.slow
def test_many_arms_that_are_the_same_are_seldom_called_different():
    wrong = 0
    for trial in range(20):
        arms = [make_arm("base", 1.0, (0,), spread=0.5)]
        arms += [make_arm(f"{trial}-{n}", 1.0, (n,), spread=0.5) for n in range(1, 9)]
        found = compare_arms(arms, "base", **SETTINGS | {"bootstrap_samples": 200})
        wrong += any(row["verdict"] not in ("baseline", "noise") for row in found["arms"])
    assert wrong <= 4  # 95 % together: one in twenty is expected


def test_the_order_of_rows_does_not_matter():
    shuffled = make_arm("other", 1.4, order=np.random.default_rng(1).permutation(720))
    base = make_arm("base", 1.0)
    plain, turned = (rows_of(compare_arms([base, arm], "base", **SETTINGS))["other"] for arm in
                     (make_arm("other", 1.4), shuffled))  # fmt: skip
    for key, value in plain["gain"]["weighted_log_loss"].items():
        assert turned["gain"]["weighted_log_loss"][key] == pytest.approx(value)


def test_other_patients_and_other_stores_are_warned_of():
    arms = [make_arm("base", 1.0), make_arm("fewer", 1.4, drop=12), make_arm("elsewhere", 1.4, store="t")]
    found = compare_arms(arms, "base", **SETTINGS)
    assert rows_of(found)["fewer"]["verdict"] == "not comparable"
    assert rows_of(found)["fewer"]["gain"] == {}
    assert rows_of(found)["elsewhere"]["verdict"] == "better"
    assert len(found["warnings"]) == 2
    text = comparison_text(found)
    assert "scored on other slices than base" in text
    assert "another embedding store than base: elsewhere" in text


def test_an_unknown_baseline_lists_the_arms():
    with pytest.raises(DataError, match=r"'papr'.*arms here: base"):
        compare_arms([make_arm("base", 1.0)], "papr", **SETTINGS)


def test_the_text_is_a_markdown_table_and_the_picture_a_picture(tmp_path):
    found = compare_arms([make_arm("base", 1.0), make_arm("good", 1.5)], "base", **SETTINGS)
    json.dumps(found, allow_nan=False)
    lines = comparison_text(found).splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[2].startswith("| base ")
    assert "better" in lines[3]
    assert "123,456" in lines[3]
    (tmp_path / "arms.png").write_bytes(arms_figure(found))
    with Image.open(tmp_path / "arms.png") as picture:
        assert picture.size[0] > 1000


def test_columns_line_up():
    rows = [["base", "1.5"], ["x", "not defined"]]
    assert format_table(["arm", "loss"], rows).splitlines() == [
        "arm          loss", "base          1.5", "x     not defined"
    ]  # fmt: skip
    assert format_table(["arm", "loss"], rows[:1], markdown=True).splitlines()[1] == "| ---- | ---: |"


def test_one_patient_has_no_interval_and_no_verdict():
    arms = [make_arm("base", 1.0, patients=1), make_arm("good", 3.0, patients=1)]
    row = rows_of(compare_arms(arms, "base", **SETTINGS))["good"]
    assert row["verdict"] == "noise"
    assert row["gain"]["weighted_log_loss"]["ci_low"] is None
    comparison_text(compare_arms(arms, "base", **SETTINGS))


@pytest.mark.parametrize(("label", "reason"), [(0, "no positive"), (1, "no negative")])
def test_a_class_of_one_kind_is_warned_of(label, reason):
    arms = [make_arm("base", 1.0, patients=3), make_arm("good", 3.0, patients=3)]
    for arm in arms:
        arm.table[LABELS[5]] = float(label)
    (warning,) = compare_arms(arms, "base", **SETTINGS)["warnings"]
    assert warning == f"AUC is not defined of {CLASSES[5]} ({reason}): it needs both"
