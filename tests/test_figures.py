import io
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from ichpipe.common.classes import CLASSES
from ichpipe.report.figures import POSITIVE, ladder, learning_curves, roc, study_sheet
from ichpipe.scoring.metrics import curves

ORANGE = tuple(int(POSITIVE[start : start + 2], 16) for start in (1, 3, 5))


def make_score(loss, auc):
    aucs = {name: {"value": auc, "ci_low": auc - 0.02, "ci_high": auc + 0.02, "n_positive": 9} for name in CLASSES}
    interval = [loss - 0.01, loss + 0.01]
    return {"weighted_log_loss": loss, "weighted_log_loss_ci": interval, "auc": aucs, "study_auc": aucs}


def make_metrics(arms=("paper",)):
    sequence = {arm: make_score(0.15 - 0.01 * number, 0.9) for number, arm in enumerate(arms)}
    models = {"slice_cnn": make_score(0.2, 0.85), "sequence": sequence, "finetuned": make_score(0.12, 0.92)}
    return models | {"n_slices": 330, "n_studies": 10}


def make_points():
    generator = np.random.default_rng(0)
    labels = (generator.random((200, 6)) < 0.3).astype(float)
    labels[:, 1] = 0
    return {name: curves(labels, generator.random((200, 6)))["roc"] for name in ("slice_cnn", "finetuned")}


def make_history(epochs=4):
    return [
        {"epoch": e, "train_loss": None if e == 0 else 0.5 / e, "val_loss": 0.5 / (e + 1), "learning_rate": 0.0}
        for e in range(epochs)
    ]


def make_series(slices=12, positive=(4, 5)):
    hu = np.random.default_rng(0).integers(0, 80, (slices, 32, 32)).astype(np.int16)
    labels = np.zeros((slices, 6))
    labels[list(positive), 0] = labels[list(positive), 5] = 1
    return hu, {"slice_cnn": np.full((slices, 6), 0.4), "finetuned": labels * 0.8}, labels


DRAWINGS = {
    "ladder": lambda: ladder(make_metrics()),
    "roc": lambda: roc(make_points()),
    "learning_curves": lambda: learning_curves({"slice CNN": make_history(), "fine-tuned": make_history(2)}),
    "study_sheet": lambda: study_sheet(*make_series(), "series 1.2.3"),
}


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def count_of(content, colour):
    return int((np.abs(pixels(content) - colour).max(axis=2) <= 3).sum())


@pytest.mark.parametrize("name", DRAWINGS)
def test_same_input_gives_the_same_bytes_and_no_origin(name):
    content = DRAWINGS[name]()
    assert content == DRAWINGS[name]()
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG"
    assert not set(image.info) & {"Software", "Creation Time", "date", "Author"}
    assert len(np.unique(pixels(content))) > 10, "an empty picture"
    assert 300 < image.width < 2000
    assert 150 < image.height < 2500


@pytest.mark.slow
def test_numbers_reach_the_pictures():
    better = make_metrics()
    better["finetuned"] = make_score(0.08, 0.95)
    assert ladder(better) != ladder(make_metrics())
    moved = make_points()
    moved["finetuned"] = moved["slice_cnn"]
    assert roc(moved) != roc(make_points())
    assert learning_curves({"a": make_history(4)}) != learning_curves({"a": make_history(5)})
    hu, probabilities, labels = make_series()
    other = study_sheet(hu, {**probabilities, "finetuned": labels * 0.5}, labels, "t")
    assert other != study_sheet(hu, probabilities, labels, "t")


@pytest.mark.slow
def test_ladder_grows_by_a_rung_for_each_arm():
    heights = [pixels(ladder(make_metrics(arms))).shape[0] for arms in (("a",), ("a", "b"), ("a", "b", "c"))]
    assert heights[0] < heights[1] < heights[2]


def test_ladder_says_where_a_figure_has_no_value():
    metrics = make_metrics()
    empty = {"value": None, "ci_low": None, "ci_high": None, "n_positive": 0}
    metrics["slice_cnn"]["study_auc"] = {"any": empty}
    metrics["finetuned"]["weighted_log_loss_ci"] = None
    assert ladder(metrics) != ladder(make_metrics())


@pytest.mark.slow
def test_more_positive_slices_more_frames():
    def frames(positive):
        hu, probabilities, labels = make_series(positive=positive)
        return count_of(study_sheet(hu, probabilities, labels, "t"), ORANGE)

    none, one, two = frames(()), frames((4,)), frames((4, 8))
    assert none == 0
    assert one > 200
    assert two == pytest.approx(2 * one, rel=0.2)


def test_slices_are_shown_in_the_brain_window():
    def share_of_grey(hu_value):
        hu, probabilities, labels = make_series(positive=())
        tile = pixels(study_sheet(np.full_like(hu, hu_value), probabilities, labels, "t"))
        grey = 255 * np.clip((hu_value - 0) / 80, 0, 1)
        return (np.abs(tile - round(grey)).max(axis=2) <= 2).mean()

    assert share_of_grey(40) > 0.2
    assert share_of_grey(20) > 0.2
    assert share_of_grey(-1000) > 0.2


@pytest.mark.parametrize("slices", [1, 2, 11, 41, 90])
@pytest.mark.slow
def test_series_of_any_length(slices):
    hu, probabilities, labels = make_series(slices, positive=(0,))
    assert pixels(study_sheet(hu, probabilities, labels, "t")).shape[0] < 1200


def test_drawing_leaves_no_global_state():
    code = (
        "import sys, numpy as np; from ichpipe.report.figures import learning_curves; "
        "learning_curves({'a': [{'epoch': 0, 'train_loss': None, 'val_loss': 0.5}]}); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_model_without_epochs_has_a_line_and_no_panel(monkeypatch):
    texts, set_text = [], Text.set_text
    monkeypatch.setattr(Text, "set_text", lambda self, text: (texts.append(text), set_text(self, text))[1])
    learned = {"slice CNN": make_history(), "fine-tuned": make_history(2)}
    before = Image.open(io.BytesIO(learning_curves(learned))).size
    texts.clear()
    content = learning_curves({"sequence, floor": make_history(1), **learned, "sequence, other": []})
    assert Image.open(io.BytesIO(content)).size == before
    assert "sequence, floor" not in texts  # no title of a panel
    assert "epoch\nno epochs: sequence, floor; sequence, other" in texts
    assert learning_curves({"sequence, floor": make_history(1)})
