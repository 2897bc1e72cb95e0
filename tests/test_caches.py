"""Out-of-fold embeddings and augmented views: what stage two reads, and that nothing can be taken for another."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import store_kit as kit
import torch
import zarr
from sklearn import decomposition

from ichpipe.cache.errors import StoreError
from ichpipe.cache.layout import name_of
from ichpipe.cache.reader import EmbeddingStore
from ichpipe.common.artifacts import Artifacts
from ichpipe.common.device import generator
from ichpipe.features.embedder import SliceEmbedder, SliceInput, view_draw
from ichpipe.features.generations import View, list_generations, open_features, store_url
from ichpipe.features.sequence_dataset import Shuffle, collect_series, plain_batches, shuffle_in_buffers, train_batches
from ichpipe.images import augmentation
from ichpipe.index.slice_index import read_index
from ichpipe.models.weights import load_sequence, load_slice_cnn
from ichpipe.params.schema import AugmentParams, load_params

SETTINGS = ("fit-slices.folds=2", "fit-slices.epochs=1", "extract.views.count=2", "sequence.paper.views=2")


@pytest.fixture(scope="module")
def folded(run, tmp_path_factory):
    """Two folds and two views, extracted, with one arm trained."""
    made = run.fresh(tmp_path_factory.mktemp("folded"))
    options = [word for setting in SETTINGS for word in ("--set", setting)]
    for command in (("prepare",), ("fit-slices",), ("extract",), ("fit-sequence", "--arm", "paper")):
        result = made(*options, *command)
        assert result.exit_code == 0, result.output
    made.options = options
    return made


IN_FOLD = ("sequence.paper.out_of_fold=false", "sequence.paper.views=0")


def opened(run, arm="paper", extra=()):
    params, artifacts = load_params(run.params, (*SETTINGS, *extra)), Artifacts(run.artifacts)
    index = read_index(artifacts.index)
    return params, artifacts, index, open_features(params, artifacts, index, params.sequence[arm] if arm else None)


def slices_of(rows):
    return [SliceInput(*row) for row in rows[["path", "series_uid", "file_digest"]].itertuples(index=False)]


@pytest.mark.slow
def test_every_train_series_comes_from_the_network_that_never_saw_it(folded):
    _, artifacts, index, features = opened(folded)
    plain = load_slice_cnn(artifacts.slice_cnn)
    fold_cnns = {fold: load_slice_cnn(artifacts.fold_cnn(fold)) for fold in (0, 1)}
    for (_, split, fold), rows in index.groupby(["series_uid", "split", "fold"], sort=False):
        (series,) = collect_series(features, rows.reset_index(drop=True))
        cached = series.sources[0]["embedding"].double().numpy()
        cnn = fold_cnns[fold] if split == "train" else plain
        wanted, _ = SliceEmbedder(cnn, torch.device("cpu"), 50)(slices_of(rows))
        np.testing.assert_allclose(cached, wanted, rtol=2.0**-10, atol=1e-4)
        assert len(series.sources) == (3 if split == "train" else 1)


def test_a_fold_s_generation_holds_no_patient_that_its_network_was_trained_on(folded):
    params, artifacts, index, _ = opened(folded)
    specs = [spec for spec in list_generations(params, artifacts, index) if spec.fold is not None]
    assert len(specs) == 6  # two folds, plain and two views
    for spec in specs:
        store = EmbeddingStore(store_url(params, artifacts), spec.identity())
        held = index[index["series_uid"].isin(store.series_uids)]
        trained_on = index[(index["split"] == "train") & (index["fold"] != spec.fold)]
        assert len(held)
        assert not set(held["patient_id"]) & set(trained_on["patient_id"])


def test_reading_a_fold_from_the_other_fold_s_generation_is_an_error(folded):
    params, artifacts, index, _ = opened(folded)
    zero, one = (spec for spec in list_generations(params, artifacts, index) if spec.fold is not None and not spec.view)
    with pytest.raises(StoreError, match="series are missing"):
        EmbeddingStore(store_url(params, artifacts), zero.identity(), one.rows())


def test_an_arm_may_be_trained_in_fold_for_comparison(folded):
    _, _, index, features = opened(folded, extra=IN_FOLD)
    train = index[index["split"] == "train"].reset_index(drop=True)
    for series in collect_series(features, train):
        assert series.sources[0].store is features.plain


def test_arms_that_read_other_generations_are_made_from_other_embeddings(folded):
    made = [opened(folded, extra=extra)[3].made_by for extra in
            ((), IN_FOLD, ("sequence.paper.views=1",))]  # fmt: skip
    assert len({json.dumps(one, sort_keys=True) for one in made}) == 3
    assert [len(one["generations"]) for one in made] == [7, 1, 5]


def test_a_view_is_one_change_per_series_and_recorded(folded):
    params, artifacts, index, _ = opened(folded)
    spec = next(spec for spec in list_generations(params, artifacts, index) if spec.view)
    root = zarr.open_group(store_url(params, artifacts), mode="r")
    (segment,) = [group for name, group in root[name_of(spec.identity())].groups() if name.startswith("segment-")]
    recorded, seeds = segment["augmentation"][:], segment["noise_seed"][:, 0]
    draw = view_draw(spec.view, slices_of(spec.index))
    source = segment["source"][:]
    order = {bytes(digest): row for row, digest in enumerate(source)}
    rows = [order[bytes.fromhex(digest)] for digest in spec.index["file_digest"]]
    np.testing.assert_array_equal(recorded[rows, :6], draw.affine.flatten(1).numpy())
    np.testing.assert_array_equal(recorded[rows, 6], draw.offset_hu.numpy())
    np.testing.assert_array_equal(seeds[rows], draw.noise_seed.numpy())
    assert len(np.unique(seeds)) == len(seeds)
    for _, of_series in pd.DataFrame(recorded[rows]).groupby(spec.index["series_uid"].to_numpy()):
        assert len(of_series.drop_duplicates()) == 1
    assert len(np.unique(recorded, axis=0)) > 1


def test_a_view_s_rows_equal_the_augmented_slices_embedded_on_the_fly(folded):
    params, artifacts, index, _ = opened(folded)
    spec = next(spec for spec in list_generations(params, artifacts, index) if spec.view)
    store = EmbeddingStore(store_url(params, artifacts), spec.identity(), spec.rows())
    rows = spec.index[spec.index["series_uid"] == spec.index["series_uid"].iloc[-1]]
    cnn = load_slice_cnn(spec.model_dir)
    wanted, _ = SliceEmbedder(cnn, torch.device("cpu"), 7, spec.view)(slices_of(rows))
    plain, _ = SliceEmbedder(cnn, torch.device("cpu"), 7)(slices_of(rows))
    cached = store.embedding(rows["series_uid"].iloc[0]).astype(np.float64)
    np.testing.assert_allclose(cached, wanted, rtol=2.0**-10, atol=1e-4)
    assert np.abs(cached - plain).max() > 0.01


def test_no_augmentation_makes_a_view_equal_to_the_plain_slice():
    still = {"flip_probability": 0, "rotation_deg": 0, "scale": 0, "shift": 0, "offset_hu": 0, "noise_hu": 0}
    view = View(1, 0, AugmentParams(**still))
    hu = torch.randint(-1024, 2000, (3, 1, 16, 16)).to(torch.int16)
    draw = view_draw(view, [SliceInput("a", "1.2", "aa"), SliceInput("b", "1.2", "bb"), SliceInput("c", "1.3", "cc")])
    torch.testing.assert_close(augmentation.apply(hu, draw), hu.float(), atol=0.01, rtol=0)


def test_training_draws_every_view_and_validation_only_the_plain_slices(folded):
    _, _, index, features = opened(folded)
    train = collect_series(features, index[index["split"] == "train"].reset_index(drop=True))
    drawn = []

    class Spy:
        def __init__(self, source, number):
            self.source, self.number = source, number

        def __getitem__(self, name):
            drawn.append(self.number)
            return self.source[name]

    spied = [replace(one, sources=tuple(Spy(s, n) for n, s in enumerate(one.sources))) for one in train]
    for epoch in range(40):
        list(train_batches(spied, ("embedding",), 4, Shuffle(0, epoch)))
    counts = np.bincount(drawn, minlength=3)
    assert counts.sum() == 40 * len(train)
    assert (counts > 40 * len(train) / 4).all()
    drawn.clear()
    list(plain_batches(spied, ("embedding",), 4))
    assert set(drawn) == {0}


@pytest.mark.parametrize("within", [None, 8])
def test_batches_are_the_same_from_a_map_and_read_through_zarr(folded, monkeypatch, within):
    _, _, index, features = opened(folded)
    train = collect_series(features, index[index["split"] == "train"].reset_index(drop=True))
    names, shuffle = ("embedding", "logits"), Shuffle(1, 1, within=within)
    mapped = list(train_batches(train, names, 3, shuffle))
    monkeypatch.setattr("ichpipe.cache.layout.is_plain", lambda _array: False)
    _, _, _, other = opened(folded)
    fetched = collect_series(other, index[index["split"] == "train"].reset_index(drop=True))
    for left, right in zip(mapped, train_batches(fetched, names, 3, shuffle), strict=True):
        assert set(left.sources) == {*names, "position_mm"}
        assert torch.equal(left.lengths, right.lengths)
        assert torch.equal(left.labels.nan_to_num(), right.labels.nan_to_num())
        assert all(torch.equal(left.sources[name], right.sources[name]) for name in left.sources)


@pytest.mark.parametrize(("n", "bound"), [(100, 16), (17, 8), (5, 1), (9, 100)])
def test_a_bounded_shuffle_keeps_every_series_once_and_its_reach(n, bound):
    buffers = shuffle_in_buffers(n, generator(3), bound)
    flat = [number for buffer in buffers for number in buffer]
    assert sorted(flat) == list(range(n))
    assert all(len(buffer) <= max(bound, 8) for buffer in buffers)


def test_too_many_views_and_unmatched_folds_are_errors(folded, capsys):
    message = folded.error(capsys, *folded.options, "--set", "sequence.paper.views=3", "fit-sequence", "--arm", "paper")
    assert "extract.views.count is 2" in message
    in_fold = ("--set", "sequence.paper.out_of_fold=false")
    message = folded.error(capsys, *folded.options, *in_fold, "fit-sequence", "--arm", "paper")
    assert "out_of_fold" in message
    assert "prepare.folds" in folded.error(capsys, "--set", "fit-slices.folds=3", "extract")


# Principal components


@pytest.fixture(scope="module")
def reduced(folded, tmp_path_factory):
    made = folded.copy(tmp_path_factory.mktemp("reduced"))
    made.options = [*folded.options, *(w for s in PCA for w in ("--set", s))]
    for command in ("extract", "fit-sequence", "finetune", "evaluate"):
        result = made(*made.options, command)
        assert result.exit_code == 0, result.output
    return made


PCA = ("extract.pca=12", "sequence.paper.inputs=[pca, logits]")


@pytest.mark.slow
def test_components_are_those_of_the_train_slices_alone(reduced):
    _, _, index, features = opened(reduced, extra=PCA)
    train = index.loc[index["split"] == "train", "series_uid"].unique()
    rows = np.concatenate([features.plain.embedding(uid) for uid in train]).astype(np.float64)
    wanted = decomposition.PCA(12, svd_solver="full").fit(rows)
    found = features.plain.principal_components
    np.testing.assert_allclose(found.mean, wanted.mean_, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.explained_variance_ratio, wanted.explained_variance_ratio_, rtol=1e-3)
    np.testing.assert_allclose(np.abs(np.sum(found.components * wanted.components_, axis=1)), 1, atol=1e-2)
    assert (np.take_along_axis(found.components, np.abs(found.components).argmax(1)[:, None], 1) > 0).all()


def test_every_generation_has_its_rows_under_the_same_map(reduced):
    params, artifacts, index, features = opened(reduced, extra=PCA)
    for spec in list_generations(params, artifacts, index):
        store = EmbeddingStore(store_url(params, artifacts), spec.identity(), spec.rows())
        for uid in store.series_uids:
            wanted = features.plain.principal_components.project(store.embedding(uid))
            np.testing.assert_allclose(store.read(uid, "pca").astype(np.float32), wanted, rtol=2.0**-11, atol=1e-6)


def test_a_model_of_components_needs_no_store(reduced):
    """What `predict` computes from embeddings equals what stage two read from the companion."""
    _, artifacts, index, features = opened(reduced, extra=PCA)
    model = load_sequence(artifacts.sequence("paper"))
    rows = index[index["split"] == "test"].reset_index(drop=True)
    for series in collect_series(features, rows)[:3]:
        stored = next(plain_batches([series], model.spec.inputs, 1))
        raw = series.sources[0]
        with torch.inference_mode():
            left = model(stored.sources, stored.lengths)[0]
            right = model.one_series(raw["embedding"], raw["logits"], series.position_mm)
        torch.testing.assert_close(left, right, atol=5e-3, rtol=1e-2)


@pytest.mark.slow
def test_components_of_other_rows_are_refused_and_made_anew(reduced, tmp_path, capsys):
    own = reduced.copy(tmp_path / "own")
    data = tmp_path / "data"
    shutil.copytree(reduced.data, data)
    own.point_to(data)
    next(iter(sorted((data / "dicom").rglob("*.dcm")))).unlink()
    options = [*reduced.options, "--set", "fit-slices.folds=0", "--set", "extract.views.count=0", "--set",
               "sequence.paper.views=0"]  # fmt: skip
    for command in ("prepare", "fit-slices"):
        assert own(*options, command).exit_code == 0
    assert own(*options, "--set", "extract.pca=null", "extract").exit_code == 0
    assert "no principal components" in own.error(capsys, *options, "fit-sequence", "--arm", "paper")
    assert own(*options, "extract").exit_code == 0
    assert own(*options, "fit-sequence", "--arm", "paper").exit_code == 0


@pytest.mark.slow
def test_a_damaged_companion_is_found(reduced, tmp_path, capsys):
    own = reduced.copy(tmp_path / "own")
    store = own.artifacts / "embeddings.zarr"
    assert own("cache", "verify", store).exit_code == 0
    for victim in store.glob("*/pca-*/embedding/c/0/0"):
        kit.flip(victim, 7)
    result = own("cache", "verify", store)
    assert result.exit_code == 1
    assert "pca-" in result.output
    assert "fails its checksum" in own.error(capsys, *reduced.options, "fit-sequence", "--arm", "paper")
    own("cache", "verify", "--repair", store)
    assert own(*reduced.options, "extract").exit_code == 0
    assert own("cache", "verify", store).exit_code == 0


def test_more_components_than_there_can_be_is_an_error(folded, capsys):
    assert "at most" in folded.error(capsys, *folded.options, "--set", "extract.pca=5000", "extract")
    assert "extract.pca is null" in folded.error(
        capsys, *folded.options, "--set", "sequence.paper.inputs=[pca]", "fit-sequence", "--arm", "paper"
    )
