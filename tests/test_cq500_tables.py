"""``score --format cq500``: names of scans, majority of three, AUCs, intervals, operating points, two models."""

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from score_kit import error, reads_text, score
from sklearn.metrics import roc_auc_score

from ichpipe.common.classes import CLASSES
from ichpipe.index.cq500_reads import FINDINGS, READERS, read_majority, scan_number
from ichpipe.scoring.roc import compare, interval
from ichpipe.stages.cli import cli

CQ500 = ("--format", "cq500")
OTHERS = [
    "BleedLocation-Left", "BleedLocation-Right", "ChronicBleed", "Fracture", "CalvarialFracture", "OtherFracture",
    "MassEffect", "MidlineShift",
]  # fmt: skip


def make(n=80, seed=0):
    """Reads as CQ500 has them, 14 findings of three readers, and scores of the six kinds of bleed."""
    generator = np.random.default_rng(seed)
    names = [f"CQ500-CT-{number}" for number in generator.permutation(n)]
    truth = generator.random((n, 6)) < 0.3
    truth[:, 0] |= truth[:, 1:].any(axis=1)
    reads, scores = {"name": names, "Category": "B1"}, {"name": names}
    for reader in READERS:
        for column, finding in enumerate(FINDINGS.values()):
            reads[f"{reader}:{finding}"] = (truth[:, column] ^ (generator.random(n) < 0.1)).astype(int)
        reads |= {f"{reader}:{finding}": generator.integers(2, size=n) for finding in OTHERS}
    for column, finding in enumerate(FINDINGS.values()):
        scores[finding] = np.clip(0.4 * truth[:, column] + 0.6 * generator.random(n), 0, 1).round(2)
    return pd.DataFrame(reads), pd.DataFrame(scores).sample(frac=1, random_state=seed)


@pytest.fixture
def tables():
    return make()


def write(table, path):
    table.to_csv(path, index=False)
    return path


@pytest.fixture
def paths(tables, tmp_path):
    return write(tables[1], tmp_path / "p.csv"), write(tables[0], tmp_path / "reads.csv")


def joined(tables, name):
    """Majority and score of one class, by scan."""
    reads, scores = (table.set_index("name").sort_index() for table in tables)
    finding = FINDINGS[name]
    return (reads[[f"{reader}:{finding}" for reader in READERS]].sum(axis="columns") >= 2).astype(int), scores[finding]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("CQ500-CT-12", 12),
        ("CQ500CT12 CQ500CT12", 12),
        ("CQ500CT12", 12),
        ("cq500_ct_0012", 12),
        ("CQ500-CT12", 12),
        ("archive/CQ500CT7 CQ500CT7/Unknown Study/CT Plain", 7),
        ("qct01/CQ500-CT-310/CT 5mm Plain/693.dcm", 310),
        ("CQ500CT12 CQ500CT13", None),
        ("CT-12", None),
        ("12", None),
        ("", None),
    ],
)
def test_names_of_scans(text, number):
    assert scan_number(text) == number


def test_two_of_three_readers_decide(tmp_path):
    path = tmp_path / "reads.csv"
    path.write_text(reads_text([(f"CQ500-CT-{votes}", [1] * 6 * votes + [0] * 6 * (3 - votes)) for votes in range(4)]))
    found = read_majority(path)
    assert found.values.index.tolist() == [f"CQ500-CT-{votes}" for votes in range(4)]
    assert found.values.to_numpy().tolist() == [[0.0] * 6, [0.0] * 6, [1.0] * 6, [1.0] * 6]


def test_figures_are_those_of_scikit_learn_and_delong(tables, paths):
    found, said = score(*paths, *CQ500)
    assert said == ""
    assert (found["n_studies"], found["resampled_by"], found["finding"]) == (80, "scan", FINDINGS)
    for name in CLASSES:
        labels, values = joined(tables, name)
        auc = found["auc"][name]
        assert auc["value"] == pytest.approx(roc_auc_score(labels, values))
        assert auc["n_positive"] == labels.sum()
        assert auc["ci_low"] < auc["value"] < auc["ci_high"]
        assert found["study_auc"][name] == auc
        assert found["delong"][name] == pytest.approx(interval(labels, values))
        points = found["operating_points"][name]
        first, second = points["high_sensitivity"], points["high_specificity"]
        assert first["sensitivity"] >= 0.9
        assert second["specificity"] >= 0.9
        assert first["sensitivity"] == values[labels == 1].ge(first["threshold"]).mean()
        assert first["specificity"] == values[labels == 0].lt(first["threshold"]).mean()
        assert second["sensitivity_ci"][0] < second["sensitivity"] < second["sensitivity_ci"][1]
    assert found["weighted_log_loss"] > 0


def test_another_operating_point(paths):
    found, _ = score(*paths, *CQ500, "--operating-point", "0.95")
    point = found["operating_points"]["any"]["high_sensitivity"]
    assert point["wanted"] == 0.95 <= point["sensitivity"]


@pytest.mark.parametrize("spell", ["CQ500CT{0} CQ500CT{0}", "cq500-ct-{0:04d}", "/data/CQ500CT{0}/Unknown Study"])
@pytest.mark.parametrize("form", ["findings", "studies"])
def test_other_spellings_and_the_studies_of_predict_give_the_same(tables, paths, tmp_path, spell, form):
    expected, _ = score(*paths, *CQ500)
    table = tables[1].rename(columns={"name": "patient_id"} if form == "studies" else {})
    key = table.columns[0]
    table[key] = [spell.format(scan_number(name)) for name in table[key]]
    if form == "studies":
        table = table.rename(columns={finding: name for name, finding in FINDINGS.items()})
        table = table.assign(study_uid="1.2", series_uid="1.2.3", n_slices=30, forced=False)
    found, _ = score(write(table, tmp_path / "other.csv"), paths[1], *CQ500)
    assert found["auc"] == expected["auc"]
    assert found["weighted_log_loss"] == pytest.approx(expected["weighted_log_loss"])


def test_scans_that_do_not_match_are_counted_named_and_left_out(tables, paths, tmp_path):
    reads, scores = tables
    strange = pd.concat([scores[2:], scores[:1].assign(name="CQ500-CT-999"), scores[:1].assign(name="phantom")])
    found, said = score(write(strange, tmp_path / "p.csv"), paths[1], *CQ500)
    gone = set(scores["name"][:2])
    assert found["n_studies"] == 78
    report = found["predictions"]
    assert (report["n_scans_without_prediction"], set(report["scans_without_prediction"])) == (2, gone)
    assert report["scans_without_label"] == ["CQ500-CT-999"]
    assert report["rows_of_no_scan"] == ["phantom"]
    for name in [*gone, "CQ500-CT-999", "phantom"]:
        assert name in said
    rest = reads[~reads["name"].isin(gone)], scores[2:]
    labels, values = joined(rest, "subdural")
    assert found["auc"]["subdural"]["value"] == pytest.approx(roc_auc_score(labels, values))


def test_missing_scans_are_filled_only_if_asked(tables, paths, tmp_path):
    scores = tables[1]
    few = write(scores[2:], tmp_path / "few.csv")
    found, said = score(few, paths[1], *CQ500, "--missing", "0.5")
    filled = scores.copy()
    filled.iloc[:2, 1:] = 0.5
    expected, _ = score(write(filled, tmp_path / "filled.csv"), paths[1], *CQ500)
    assert found["auc"] == expected["auc"]
    assert found["predictions"]["filled_with"] == 0.5
    assert "scored as 0.5" in said


def test_several_rows_of_a_scan_need_a_rule(tables, paths, tmp_path, capsys):
    scores = tables[1]
    again = scores[:3].assign(SDH=1.0, name=[f"{name} thin" for name in scores["name"][:3]])
    path = write(pd.concat([scores, again]), tmp_path / "two.csv")
    message = error(capsys, path, paths[1], *CQ500)
    assert "--pool max" in message
    assert scores["name"].iloc[0] in message
    assert "line 82" in message
    found, _ = score(path, paths[1], *CQ500, "--pool", "max")
    labels, values = joined(tables, "subdural")
    values[scores["name"][:3].tolist()] = 1.0
    assert found["auc"]["subdural"]["value"] == pytest.approx(roc_auc_score(labels, values))
    assert (found["predictions"]["pool"], found["predictions"]["n_pooled_rows"]) == ("max", 3)
    same, said = score(write(pd.concat([scores, scores[:3]]), tmp_path / "same.csv"), paths[1], *CQ500)
    assert same["predictions"]["n_duplicate_rows"] == 3
    assert "3 rows repeat" in said


def test_against_is_delongs_test_on_the_scans_of_both(tables, paths, tmp_path):
    other = make(seed=3)[1].set_index("name").loc[tables[1]["name"]].reset_index()
    found, _ = score(*paths, *CQ500, "--against", write(other[4:], tmp_path / "o.csv"))
    against = found["against"]
    assert (against["n_studies"], against["predictions"]["n_scans_without_prediction"]) == (76, 4)
    common = [table[table["name"].isin(other["name"][4:])] for table in (*tables, other)]
    labels, first = joined(common[:2], "any")
    _, second = joined((common[0], common[2]), "any")
    assert against["delong_test"]["any"] == pytest.approx(compare(labels, first, second))
    assert against["delong_test"]["any"]["difference"] > 0
    assert against["delong_test"]["any"]["p_value"] < 0.05


def test_a_finding_that_no_scan_has_is_null(tables, paths, tmp_path):
    reads = tables[0].assign(**{f"{reader}:EDH": 0 for reader in READERS})
    found, _ = score(paths[0], write(reads, tmp_path / "r.csv"), *CQ500, "--against", paths[0])
    assert found["auc"]["epidural"] == {"value": None, "ci_low": None, "ci_high": None, "n_positive": 0}
    assert found["delong"]["epidural"] is None
    assert set(found["operating_points"]["epidural"].values()) == {None}
    assert set(found["against"]["delong_test"]["epidural"].values()) == {None}


@pytest.mark.parametrize(
    ("which", "change", "complaint"),
    [
        ("p.csv", lambda t: t.assign(IVH=1.5), "column IVH is no probability"),
        ("p.csv", lambda t: t.drop(columns="SAH"), "one whole set of columns"),
        ("p.csv", lambda t: t.assign(**dict.fromkeys(CLASSES, 0.5)), "has 2"),
        ("p.csv", lambda t: t.assign(name="X"), "names no scan of CQ500"),
        ("p.csv", lambda t: t.drop(columns="name"), "names no scan of CQ500"),
        ("p.csv", lambda t: t.assign(name=[f"CQ500-CT-{k + 999}" for k in t.index]), "has no prediction for any of"),
        ("reads.csv", lambda t: t.drop(columns="R2:SDH"), "lacks R2:SDH"),
        ("reads.csv", lambda t: t.assign(**{"R3:ICH": 0.5}), "column R3:ICH is neither 0 nor 1"),
        ("reads.csv", lambda t: t.assign(name="X"), "line 2: column name is no scan"),
        ("reads.csv", lambda t: pd.concat([t, t[:1].replace({1: 0, 0: 1})]), "contradicts"),
    ],
)
def test_a_wrong_table_is_one_clear_error(paths, tmp_path, capsys, which, change, complaint):
    bad = tmp_path / which
    write(change(pd.read_csv(bad)), bad)
    message = error(capsys, *paths, *CQ500)
    assert complaint in message
    assert str(bad) in message


def test_the_two_tables_in_the_wrong_places(paths, capsys):
    assert "one whole set of columns" in error(capsys, *paths[::-1], *CQ500)


LANCET = {  # Chilamkurthy et al. 2018: AUC, and the positives of the majority
    "ICH": (0.9419, 205), "IPH": (0.9544, 134), "IVH": (0.9310, 28), "SDH": (0.9521, 53), "EDH": (0.9731, 13),
    "SAH": (0.9574, 60),
}  # fmt: skip


@pytest.fixture(scope="module")
def real(real_data):
    folder = real_data / "tables" / "cq500"
    return folder / "prediction_probabilities.csv", folder / "reads.csv"


@pytest.mark.real_data
def test_real_areas_are_those_of_the_lancet(real):
    found, said = score(*real, *CQ500, "--against", real[0])
    assert (found["n_studies"], said) == (491, "")
    for name, finding in FINDINGS.items():
        value, positives = LANCET[finding]
        auc, delong = found["auc"][name], found["delong"][name]
        assert round(auc["value"], 4) == value
        assert auc["n_positive"] == positives
        # Both kinds of interval hold the value and are about as wide.
        assert auc["ci_low"] < auc["value"] < auc["ci_high"]
        assert delong["ci_low"] < auc["value"] < delong["ci_high"]
        assert found["against"]["delong_test"][name]["p_value"] == 1.0


@pytest.mark.real_data
def test_real_intervals(real):
    done = CliRunner().invoke(cli, ["score", *map(str, real), *CQ500])  # 1,000 resamples, the default
    found = json.loads(done.stdout)
    expected = {  # DeLong's; test_roc.py holds them against the definition
        "any": (0.9223, 0.9616),
        "intraparenchymal": (0.9349, 0.9739),
        "intraventricular": (0.8651, 0.9968),
        "subdural": (0.9182, 0.9861),
        "epidural": (0.9459, 1.0),
        "subarachnoid": (0.9314, 0.9835),
    }
    for name, limits in expected.items():
        assert (found["delong"][name]["ci_low"], found["delong"][name]["ci_high"]) == pytest.approx(limits, abs=5e-5)
        # The percentile bootstrap differs by chance, and by the skew that DeLong's leaves out.
        assert (found["auc"][name]["ci_low"], found["auc"][name]["ci_high"]) == pytest.approx(limits, abs=0.015)
    points = found["operating_points"]["any"]
    assert [round(points["high_sensitivity"][kind], 4) for kind in ("sensitivity", "specificity")] == [0.9024, 0.8322]
    assert [round(points["high_specificity"][kind], 4) for kind in ("sensitivity", "specificity")] == [0.8195, 0.9021]
