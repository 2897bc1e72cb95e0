"""Every step that computes on a GPU has all its tensors there: it runs on `pretend_gpu`, where others raise."""

import numpy as np
import pandas as pd
import pytest
import torch
from pretend_gpu import GPU, is_fake, pretend_gpu
from process_kit import random_hu

from ichpipe.common.classes import CLASSES
from ichpipe.dicom.slice_header import read_header
from ichpipe.features.embedder import SliceEmbedder, SliceInput, embed_hu, predict_held_out, view_parameters
from ichpipe.features.generations import View
from ichpipe.features.sequence_dataset import (
    LabelledSeries,
    Shuffle,
    load_to_device,
    plain_batches,
    predict_rows,
    train_batches,
)
from ichpipe.images import augmentation
from ichpipe.images.slice_batch import Batch, draw_cut
from ichpipe.images.slice_dataset import SliceDataset
from ichpipe.inference.heat_maps import HeatMaps, LayerCAM, embed_series
from ichpipe.inference.predictor import predict_slices
from ichpipe.models.end_to_end import EndToEnd, Ensemble
from ichpipe.models.header import Framing, SequenceSpec
from ichpipe.models.sequence import build_sequence, stored_inputs
from ichpipe.models.slice_cnn import SliceCnn, require_size, spec_for
from ichpipe.params.schema import (
    PAPER_WINDOWS,
    AugmentParams,
    CutMixParams,
    FinetuneParams,
    PhantomParams,
    RegularizeParams,
    SequenceParams,
    SliceParams,
)
from ichpipe.stages import phantom
from ichpipe.training.end_to_end_trainer import EndToEndFitting, ImageSeries
from ichpipe.training.sequence_trainer import SequenceFitting
from ichpipe.training.slice_trainer import SliceFitting, Slices
from ichpipe.training.trainer import Position

pytestmark = pytest.mark.slow  # a minute together

SIZE = 32
WILD = AugmentParams(vertical_flip_probability=0.5, crop_area=0.6, distortion=0.05, blur_px=1.5)
MIXED = CutMixParams(alpha=1.0, probability=1.0)
CHANGES = RegularizeParams(reverse_probability=0.5, crop_slices=3, feature_noise=0.1, feature_dropout=0.2)
ARMS = {
    "lstm": {"inputs": ("embedding", "deltas", "spacing", "position"), "skip": ("logits",), "reversed": True},
    "gru": {"cell": "gru", "residual": True, "inputs": ("embedding", "pca"), "pca": 3, "smoothed": True},
    "transformer": {"cell": "transformer", "members": 2},
    "conv": {"cell": "conv", "mirrored": True},
    "average": {"cell": "average", "inputs": ("logits",)},
}


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Index rows of some synthetic heads."""
    folder = tmp_path_factory.mktemp("phantom")
    phantom.run(PhantomParams(studies=3, size_px=SIZE, seed=3), folder)
    headers = [read_header(path) for path in sorted((folder / "dicom").rglob("*.dcm"))]
    rows = pd.DataFrame({
        "path": [header.path for header in headers],
        "series_uid": [header.series_uid for header in headers],
        "file_digest": [header.file_digest for header in headers],
    })  # fmt: skip
    rows = rows.groupby("series_uid").head(9).reset_index(drop=True)
    rows["position_mm"] = rows.groupby("series_uid").cumcount() * 5.0
    return rows


def slice_cnn(**options):
    torch.manual_seed(0)
    return SliceCnn(spec_for("test_byobnet", PAPER_WINDOWS, SIZE, 0.1, **options))


def sequence(name="lstm", dim=None):
    settings = {"cell": "lstm", "hidden": 8, "layers": 2, "bidirectional": True, "dropout": 0.1, "heads": 2}
    dim = dim or slice_cnn().embedding_dim
    return build_sequence(SequenceSpec(**settings | {"inputs": ("embedding",), "embedding_dim": dim} | ARMS[name]))


def series_of(n=5, views=1):
    """Cached sequences of several lengths; features of 8, of which one slice has no label."""
    series, start = [], 0
    for number in range(n):
        t = 4 + number
        widths = {"embedding": 8, "logits": 6, "pca": 3}
        sources = tuple({name: torch.randn(t, width) for name, width in widths.items()} for _ in range(views))
        labels = torch.zeros(t, 6)
        labels[0] = torch.nan
        rows = np.arange(start, start + t)
        series.append(LabelledSeries(f"1.2.{number}", rows, sources, labels, torch.arange(t) * 5.0))
        start += t
    return series


def begin():
    return Position(1e-3, lambda: None)


def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    with pretend_gpu():
        layer = torch.nn.Linear(2, 3).to(GPU)
        assert layer(torch.ones(1, 2).to(GPU)).device == GPU
        with pytest.raises(RuntimeError, match="same device"):
            layer(torch.ones(1, 2))
        with pytest.raises(RuntimeError, match="changes a tensor of the CPU"):
            torch.zeros(3).add_(torch.ones(3, device=GPU))
        with pytest.raises(RuntimeError, match="numpy"):
            torch.ones(3, device=GPU).numpy()


@pytest.mark.parametrize("view", [None, View(1, 0, WILD)])
@pytest.mark.parametrize("precision", ["auto", "bf16", "fp32"])
def test_extract(heads, view, precision):
    slices = [SliceInput(*row) for row in heads[["path", "series_uid", "file_digest"]].itertuples(index=False)]
    with pretend_gpu():
        embedder = SliceEmbedder(slice_cnn(), GPU, 8, view, loaders=0, precision=precision)
        embedding, logits = embedder(slices)
        if view is not None:
            assert len(view_parameters(view, slices)["augmentation"]) == len(slices)
    assert embedding.dtype == logits.dtype == np.float32
    assert (logits == 1).all()  # what `pretend_gpu` gives back
    assert len(embedding) == len(logits) == len(heads)


@pytest.mark.parametrize("arm", list(ARMS))
def test_predict_and_evaluate(heads, arm):
    with pretend_gpu():
        model = Ensemble([EndToEnd(slice_cnn(), sequence(arm)) for _ in range(2)]).to(GPU).eval()
        slices, rejected = predict_slices(model, heads.assign(patient_id="P"), GPU, 10.0)  # thin: interleaved parts
        of_model, _ = predict_held_out(model, heads, GPU)
    assert len(slices) == len(of_model) == len(heads)
    assert rejected.empty
    assert slices[list(CLASSES)].to_numpy() == pytest.approx(1 / (1 + np.exp(-1)))


def test_embeddings_of_the_python_interface():
    with pretend_gpu():
        cnn = slice_cnn().to(GPU)
        require_size(cnn)
        assert embed_hu(cnn, random_hu(5), GPU, 2).shape == (5, cnn.embedding_dim)


@pytest.mark.parametrize("arm", ["lstm", "conv"])
def test_explain(heads, arm, monkeypatch):
    """All but LayerCAM's backward pass."""

    def forward_only(cam, images, targets):
        outputs = cam.model(images)
        scores = [target(output) for target, output in zip(targets, outputs, strict=True)]
        assert all(score.device == GPU for score in scores)
        return np.ones((len(scores), SIZE, SIZE), np.float32)

    one = heads[heads["series_uid"] == heads["series_uid"][0]]
    monkeypatch.setattr(LayerCAM, "__call__", forward_only)
    with pretend_gpu():
        model = Ensemble([EndToEnd(slice_cnn(), sequence(arm)) for _ in range(2)]).to(GPU)
        maker = HeatMaps(model)
        series = embed_series(model, one["path"].tolist(), one["position_mm"].tolist(), GPU, stride=2)
        assert series.logits(model).shape == series.slice_logits().shape == (len(one), 6)
        assert maker(series, [0, 3], 0).shape == (2, SIZE, SIZE)


@pytest.mark.parametrize("precision", ["auto", "bf16"])
@pytest.mark.parametrize("weights", [(), [1.5] * 12])
def test_slices_are_trained_on_and_validated(precision, weights):
    section = SliceParams(backbone="test_byobnet", augment=WILD, cutmix=MIXED, precision=precision, batch_size=5)
    labels = np.zeros((12, 6), np.float32)
    labels[3] = np.nan
    dataset = SliceDataset(list(range(12)), labels, Framing(SIZE), random_hu(12).__getitem__)
    slices = Slices(dataset, dataset, ["series"] * 12, weights)
    with pretend_gpu() as reached:
        cnn = slice_cnn().to(GPU)
        fitting = SliceFitting(cnn, section, GPU, 0, slices, range(12), 7)
        fitting.train_epoch(1, begin())
        assert fitting.validate() > 0
        assert {id(each) for each in cnn.parameters()} <= {id(each) for each in reached}


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("arm", list(ARMS))
def test_sequences_are_trained_on_and_validated(arm, held):
    changed = {name: value for name, value in ARMS[arm].items() if name in SequenceParams.model_fields}
    section = SequenceParams(hidden=8, heads=2, regularize=CHANGES, batch_series=2, **changed)
    with pretend_gpu():
        model = sequence(arm, 8).to(GPU)
        names = stored_inputs(model.spec.all_inputs)
        section = section.model_copy(update={"inputs": model.spec.all_inputs, "skip": ()})
        train, val = series_of(), series_of(views=2)
        if held:
            train, val = load_to_device(GPU, train, names), load_to_device(GPU, val, names)
            assert all(is_fake(source[name]) for item in train for source in item.sources for name in names)
        fitting = SequenceFitting(model, section, GPU, train, val, 0)
        if arm != "average":  # which has nothing to learn
            fitting.train_epoch(1, begin())
        assert fitting.validate() > 0
        assert np.isfinite(predict_rows(model, val, sum(map(len, val)), GPU)).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_series": 2, "accumulate": 2, "chunk_slices": 4},
        {"batch_slices": 12, "sample_slices": 6, "slice_loss": 0.5, "precision": "bf16", "layer_decay": 0.8},
        {"norm_momentum": 0.1, "learning_rate_cnn": 0.0, "unfreeze_epochs": 1},
        {"norm_momentum": 0.1},
    ],
)
def test_series_are_trained_on_and_validated(heads, settings):
    section = FinetuneParams(augment=WILD, cutmix=MIXED, **settings)
    series = []
    for _, rows in heads.groupby("series_uid"):
        labels = torch.zeros(len(rows), 6)
        labels[2] = torch.nan
        series.append(ImageSeries(rows["path"].tolist(), labels, torch.arange(len(rows)) * 5.0))
    with pretend_gpu() as reached:
        model = EndToEnd(slice_cnn(), sequence("lstm")).to(GPU)
        fitting = EndToEndFitting(model, section, GPU, series, series[:1])
        fitting.train_epoch(1, begin())
        assert fitting.validate() > 0
        learning = {id(each) for each in model.parameters() if each.requires_grad}
        assert learning <= {id(each) for each in reached}


def test_images_and_batches_of_sequences_come_on_the_gpu():
    drawn = augmentation.draw(WILD, 6, torch.Generator().manual_seed(0))
    batch = Batch(range(6), list(range(6)), draw_cut(MIXED, 6, SIZE, 0), lambda: drawn)
    with pretend_gpu():
        assert batch.images(random_hu(6), [1, 4], GPU).device == GPU
        series = load_to_device(GPU, series_of(), ("embedding",))
        shuffle = Shuffle(0, 1, CHANGES)
        for made in (*plain_batches(series, ("embedding",), 3), *train_batches(series, ("embedding",), 3, shuffle)):
            assert {values.device for values in made.sources.values()} == {GPU}
            moved = made.to(GPU)
            assert {values.device for values in (*moved.sources.values(), moved.labels)} == {GPU}
