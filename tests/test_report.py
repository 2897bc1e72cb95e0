"""What the page of a run says, and that it says it safely. How it looks and behaves: test_report_browser.py."""

import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ichpipe.common.artifacts import Artifacts
from ichpipe.common.classes import CLASSES
from ichpipe.params.schema import load_params
from ichpipe.report import page as parts
from ichpipe.report.charts import Axis, Line, interval_plot, line_plot
from ichpipe.report.page import Section, Table, as_picture, render_page
from ichpipe.report.scores import choose_cases, format_threshold, of_studies
from ichpipe.scoring.bootstrap import Estimate
from ichpipe.scoring.calibration import Calibration, Curve, read_calibration, write_calibration
from ichpipe.scoring.heldout_predictions import LABELS, model_mark, read_predictions, write_predictions
from ichpipe.stages.report import run as make_report

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)> & ' {{ 7*7 }}"


class Reader(HTMLParser):
    """Collects tags with their attributes, and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, *tags):
        return [attributes for name, attributes in self.tags if name in tags]

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def reported(run, tmp_path_factory):
    made = run.copy(tmp_path_factory.mktemp("reported"))
    result = made("report", "--gpu", "cpu", "--cases", 1)
    assert result.exit_code == 0, result.output
    return made


def page_of(made):
    return (made.artifacts / "report" / "index.html").read_text(encoding="utf-8")


def report_again(made, *rest):
    result = made("report", "--gpu", "cpu", "--cases", 0, *rest)
    assert result.exit_code == 0, result.output
    return page_of(made)


def test_page_holds_the_figures_of_the_run(reported):
    text = Reader(page_of(reported)).text
    metrics = json.loads(reported.metrics())
    summary = json.loads((reported.artifacts / "index" / "summary.json").read_text())
    assert parts.format_number(metrics["finetuned"]["weighted_log_loss"]) in text
    assert Estimate.from_json(metrics["slice_cnn"]["auc"]["any"]).text() in text
    positive = summary["splits"]["train"]["prevalence"]["any"]
    assert parts.format_share(positive["positive"], positive["known"]) in text
    for arm in ("paper", "gru-logits", "floor"):
        assert f"sequence, {arm}" in text
    record = json.loads((reported.artifacts / "slice-cnn" / "record.json").read_text())
    assert record["commit"] in text
    assert record["versions"]["torch"] in text
    assert parts.format_duration(record["wall_seconds"]) in text
    assert "energy unknown" in text
    assert "resnet10t" in text


def test_page_is_one_file_without_script_or_address(reported):
    page = page_of(reported)
    reader = Reader(page)
    assert not reader.all("script")
    assert len(page) < 5_000_000
    addresses = [tag[name] for _, tag in reader.tags for name in ("src", "href") if name in tag]
    assert addresses
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "http://" not in page
    assert "https://" not in page
    assert not any(name.startswith("on") or name == "style" for _, tag in reader.tags for name in tag)
    (policy,) = [m["content"] for m in reader.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_every_plot_has_a_table_and_every_table_a_caption(reported):
    page = page_of(reported)
    for part in re.findall(r"<section.*?</section>", page, flags=re.DOTALL):
        if 'class="plot"' in part:
            assert "<table" in part
    assert page.count("<table") == page.count("<caption>") > 10
    assert all(tag.get("scope") in ("col", "row") for tag in Reader(page).all("th"))
    assert all(tag.get("alt") for tag in Reader(page).all("img"))
    assert all(tag.get("aria-label") for tag in Reader(page).all("svg") if tag.get("role") == "img")


def test_links_lead_somewhere_and_identifiers_are_single(reported):
    reader = Reader(page_of(reported))
    names = [tag["id"] for _, tag in reader.tags if "id" in tag]
    assert len(names) == len(set(names))
    assert {tag["href"][1:] for tag in reader.all("a")} <= set(names)


def test_same_run_same_bytes(reported, tmp_path):
    """Without pictures: a gradient on a CPU depends in its last bits on where memory lies, so a heat map may, too."""
    again = reported.copy(tmp_path / "again")
    first = report_again(again)
    shutil.rmtree(again.artifacts / "report")
    assert report_again(again) == first
    assert re.sub(r'src="data:[^"]*"', "", page_of(reported)).count("<td>") == first.count("<td>")


def test_cases_are_shown_with_pictures(reported):
    reader = Reader(page_of(reported))
    assert len(reader.all("img")) >= 2
    assert "Worst misses" in reader.text
    assert "Worst false alarms" in reader.text


def test_hostile_names_are_text(branch):
    """Arm names, reasons and parameters come from files that anyone may write."""
    metrics = json.loads(branch.metrics())
    metrics["sequence"][HOSTILE] = metrics["sequence"].pop("paper")
    metrics["paired"][HOSTILE] = next(iter(metrics["paired"].values()))
    (branch.artifacts / "metrics" / "evaluate.json").write_text(json.dumps(metrics))
    path = branch.artifacts / "index" / "summary.json"
    summary = json.loads(path.read_text()) | {"rejected": 1, "rejected_by_reason": {HOSTILE: 1}}
    path.write_text(json.dumps(summary))
    path = branch.artifacts / "compare" / "arms.json"
    comparison = json.loads(path.read_text()) | {"baseline": HOSTILE, "warnings": [HOSTILE]}
    comparison["arms"][0]["arm"] = HOSTILE
    path.write_text(json.dumps(comparison))
    page = report_again(branch)
    reader = Reader(page)
    assert not reader.all("script", "img")
    assert "<script>alert" not in page
    assert HOSTILE in "".join(reader.words)
    assert "49" not in "".join(word for word in reader.words if "alert" in word)


@pytest.mark.parametrize(
    ("gone", "sentence"),
    [
        ("compare", "Arms have not been compared"),
        ("metrics", "There are no scores yet"),
        ("plots", "not evaluated yet"),
        ("finetuned", "There is no fine-tuned model"),
        ("sequence", "At a glance"),
        ("index/summary.json", "There is no index of slices"),
    ],
)
def test_what_is_missing_is_said(branch, gone, sentence):
    path = branch.artifacts / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert sentence in Reader(report_again(branch)).text


def test_only_an_index_is_a_report(branch):
    for name in ("slice-cnn", "sequence", "finetuned", "metrics", "plots", "compare", "predictions"):
        shutil.rmtree(branch.artifacts / name)
    text = Reader(report_again(branch)).text
    assert "This run has not been evaluated yet." in text
    assert "Nothing has been trained yet" in text


def test_nothing_at_all_is_one_error(run, tmp_path, capsys):
    message = run.fresh(tmp_path / "empty").error(capsys, "report")
    assert "holds no run" in message
    assert "ichpipe prepare" in message


def test_torn_file_is_named(branch, capsys):
    path = branch.artifacts / "metrics" / "evaluate.json"
    path.write_text(path.read_text()[:50])
    assert "evaluate.json" in branch.error(capsys, "report")


def test_undefined_figures_are_said_so(branch):
    metrics = json.loads(branch.metrics())
    nothing = {"value": None, "ci_low": None, "ci_high": None, "n_positive": 0}
    for scores in (metrics["slice_cnn"], metrics["finetuned"], *metrics["sequence"].values()):
        scores["weighted_log_loss_ci"] = None
        for kind in ("auc", "study_auc"):
            scores[kind] = dict.fromkeys(CLASSES, nothing)
    for pair in metrics["paired"].values():
        pair["auc_any"] = nothing
        pair["weighted_log_loss"] |= {"ci_low": None, "ci_high": None}
    (branch.artifacts / "metrics" / "evaluate.json").write_text(json.dumps(metrics))
    for kind in ("roc", "precision_recall"):
        (branch.artifacts / "plots" / f"{kind}.json").write_text("[]")
    text = Reader(report_again(branch)).text
    assert "not defined" in text
    assert "nan" not in text.lower().split()
    assert "None" not in text


def test_test_patients_without_a_positive(branch):
    folder = branch.artifacts / "finetuned"
    table = read_predictions(folder, "")
    table[LABELS] = 0.0
    write_predictions(table, folder, model_mark(folder))
    text = Reader(report_again(branch, "--cases", 1)).text
    assert "no positive or no negative in validation" in text
    assert "Worst false alarms" in text
    assert "Worst misses" not in text


def test_unreadable_slices_cost_the_pictures_only(branch, tmp_path):
    table = pd.read_parquet(branch.artifacts / "index" / "slices.parquet")
    table["path"] = str(tmp_path / "gone" / "x.dcm")
    table.to_parquet(branch.artifacts / "index" / "slices.parquet")
    result = branch("report", "--gpu", "cpu", "--cases", 1)
    assert result.exit_code == 0
    page = Reader(page_of(branch))
    assert "can't be read here" in page.text
    assert not page.all("img")


def test_no_place_of_the_machine_is_shown(reported, tmp_path):
    assert str(reported.data) not in page_of(reported)
    params = load_params(reported.params)
    page = tmp_path / "page.html"
    make_report(params, Artifacts(reported.artifacts), page, cases=0)
    assert "…/dicom" in page.read_text(encoding="utf-8")


def test_operating_point_is_chosen_on_validation(reported):
    """By hand: the threshold for `any` of the page is one of the validation scores, and the counts are those at it."""
    table = pd.read_parquet(reported.artifacts / "finetuned" / "predictions.parquet")
    calibration = read_calibration(reported.artifacts / "finetuned")
    truth, score = of_studies(table[table["split"] == "val"], "max", calibration)
    threshold = min(score[truth[:, 0] == 1, 0])  # few positives: 0.9 of them is all
    test_truth, test_score = of_studies(table[table["split"] == "test"], "max", calibration)
    called, positive = test_score[:, 0] >= threshold, test_truth[:, 0] == 1
    counts = [(a & b).sum() for b in (positive, ~positive) for a in (called, ~called)]
    assert operating_row(reported)[:5] == [format_threshold(threshold), *map(str, counts)]


def operating_row(made, words="sensitivity", name="any"):
    page = page_of(made)
    caption = page.index(f"Threshold for {words}")
    row = re.search(rf'<th scope="row">{name}</th>(.*?)</tr>', page[caption:]).group(1)
    return re.findall(r"<td>(.*?)</td>", row)


def calibrate_model(made, method, maps):
    """Put a calibration beside the fine-tuned model, as if evaluate had fitted it."""
    folder = made.artifacts / "finetuned"
    write_calibration(folder, Calibration(method=method, model_sha256=model_mark(folder), **{method: maps}))


def test_an_arm_may_be_named_like_a_comparison(branch):
    path = branch.artifacts / "metrics" / "evaluate.json"
    metrics = json.loads(path.read_text())
    metrics["sequence"]["wide against narrow"] = metrics["sequence"].pop("paper")
    pair = metrics["paired"].pop("finetuned against sequence-paper")
    metrics["paired"] = {"finetuned against sequence-wide against narrow": pair, **metrics["paired"]}
    path.write_text(json.dumps(metrics))
    text = Reader(report_again(branch)).text
    for other in ("slice CNN", "sequence, wide against narrow"):
        assert text.count(f"Gain of fine-tuned over {other} in weighted log loss:") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "maps", "said"),
    [
        ("temperature", dict.fromkeys(CLASSES, 3.0), "calibrated by temperature."),
        ("temperature", {"any": 0.4}, "calibrated by temperature for any alone."),
        ("isotonic", {"any": Curve(probability=(0.0, 1.0), calibrated=(0.2, 0.3))}, "by isotonic for any alone."),
        ("none", {}, "calibration.json has no map (none)"),
    ],
)
def test_thresholds_are_those_that_predict_compares(branch, tmp_path, method, maps, said):
    """`predict --threshold T` with the T of the page calls the studies positive that the page counts."""
    if maps:
        calibrate_model(branch, method, maps)
    else:
        assert branch("--set", "evaluate.calibration=none", "evaluate").exit_code == 0
    assert said in Reader(report_again(branch)).text
    assert branch("predict", branch.data / "dicom", "--out", tmp_path).exit_code == 0
    predicted = pd.read_csv(tmp_path / "studies.csv").set_index("study_uid")
    table = pd.read_parquet(branch.artifacts / "finetuned" / "predictions.parquet")
    studies = table.groupby("study_uid").agg(split=("split", "first"), label=("label_any", "max"))
    studies["score"] = predicted["any"].reindex(studies.index)
    val, test = (studies[studies["split"] == split] for split in ("val", "test"))
    for words in ("sensitivity", "specificity"):
        shown, *counts = operating_row(branch, words)
        if words == "specificity" and shown.startswith("none: any would call too many"):
            continue  # the highest validation score is that of a negative
        threshold = float(shown)
        called, positive = test["score"] >= threshold, test["label"] == 1
        assert list(map(int, counts[:4])) == [(a & b).sum() for b in (positive, ~positive) for a in (called, ~called)]
        assert np.abs(val["score"] - threshold).min() < 1e-5  # one of the scores that predict gives in validation


def test_a_calibration_of_another_model_is_an_error(branch, capsys):
    folder = branch.artifacts / "finetuned"
    write_calibration(folder, Calibration(method="none", model_sha256="0" * 64))
    assert "ichpipe evaluate" in branch.error(capsys, "report", "--cases", "0")


def test_without_a_calibration_thresholds_are_of_the_networks_own_scores(branch):
    (branch.artifacts / "finetuned" / "calibration.json").unlink()
    assert "not calibrated: there is no calibration.json" in Reader(report_again(branch)).text


def test_patients_with_several_studies_have_no_exact_intervals(branch):
    folder = branch.artifacts / "finetuned"
    table = read_predictions(folder, "")
    table["patient_id"] = table["split"]
    write_predictions(table, folder, model_mark(folder))
    text = Reader(report_again(branch)).text
    assert "studies of 1 patients are not independent cases" in text
    assert "Clopper" not in text
    assert "[" not in "".join(operating_row(branch))


@pytest.mark.parametrize("threshold", [0.123456789, 0.5, 1.0, 9.99999999e-7, 0.9999999, 3.3e-15, 0.1 + 0.2])
def test_a_threshold_is_rounded_down(threshold):
    assert threshold * (1 - 2e-5) < float(format_threshold(threshold)) <= threshold


# The parts


def test_cases_are_the_extremes_and_each_stands_once():
    series = pd.Series(list("abcdef"))
    positive = np.array([True, True, True, False, False, False])
    score = np.array([0.9, 0.1, 0.5, 0.2, 0.8, 0.3])
    cases = [(case.series_uid, case.kind.split(":")[0]) for case in choose_cases(series, positive, score, 2)]
    assert cases == [
        ("b", "Worst misses"),
        ("c", "Worst misses"),
        ("e", "Worst false alarms"),
        ("f", "Worst false alarms"),
        ("a", "Best finds"),
    ]
    assert choose_cases(series, np.zeros(6, bool), score, 1)[0].series_uid == "a"


def test_plot_puts_points_in_their_place():
    svg = str(line_plot("t", [Line("a", [(0, 0), (1, 1)])], Axis("x", 0, 1), Axis("y", 0, 1)))
    path = re.search(r'<path class="line s0" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', svg)
    assert [float(number) for number in path.groups()] == [52, 200, 310, 10]


def test_plot_escapes_what_comes_in():
    for svg in (
        line_plot(HOSTILE, [Line(HOSTILE, [(0, 0)])], Axis(HOSTILE, 0, 1), Axis(HOSTILE, 0, 1)),
        interval_plot(HOSTILE, [(HOSTILE, Estimate(0.5, 0.4, 0.6))], HOSTILE),
    ):
        assert not Reader(str(svg)).all("script", "img")
        assert "alert(1)" in str(svg)


@pytest.mark.parametrize(
    "rows", [[], [("a", Estimate(None))], [("a", Estimate(0.0))], [("a", Estimate(1e-9, -1e-9, 2e-9))]]
)
def test_interval_plot_of_odd_rows_is_finite(rows):
    svg = str(interval_plot("t", rows, "n", zero=True))
    assert "nan" not in svg
    assert "inf" not in svg


def test_ticks_are_round_and_inside():
    assert Axis("x", 0, 1).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert Axis("x", -0.3, 1.3, whole=True).ticks() == [0, 1]
    assert Axis("x", 0.7, 10.3, whole=True).ticks() == [2, 4, 6, 8, 10]
    for low, high in ((0.0713, 0.0824), (-3e-5, 9e-5), (4.0, 1300.0)):
        ticks = Axis("x", low, high).ticks()
        assert 3 <= len(ticks) <= 8
        assert low <= min(ticks) <= max(ticks) <= high


def test_numbers_as_people_write_them():
    assert parts.format_number(-0.00001) == "0.0000"
    assert parts.format_number(None) == "not defined"
    assert parts.format_share(3, 0) == "3 of 0"
    assert parts.format_share(340, 2211) == "340 of 2,211 (15.4 %)"
    assert [parts.format_duration(value) for value in (4.26, 61, 3661 + 59 * 60)] == ["4.3 s", "1 min 1 s", "2 h 0 min"]


def test_page_of_plain_sections_escapes_everything():
    section = Section("a", HOSTILE, [HOSTILE], [Table(HOSTILE, [HOSTILE], [[HOSTILE, HOSTILE]])], preformatted=HOSTILE)
    reader = Reader(render_page([section], HOSTILE))
    assert not reader.all("script", "img")
    assert sum(word == HOSTILE for word in reader.words) >= 7


def test_picture_keeps_its_size():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(buffer, "PNG")
    picture = as_picture(buffer.getvalue(), "alt", "caption")
    assert (picture.width, picture.height) == (60, 40)
    assert picture == as_picture(buffer.getvalue(), "alt", "caption")
