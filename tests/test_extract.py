"""The store as ``extract`` fills it: what is computed, what is not, and who may read it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import store_kit as kit
import torch

from ichpipe.cache.layout import Generation
from ichpipe.cache.location import StoreLocation
from ichpipe.cache.reader import EmbeddingStore
from ichpipe.cache.writer import Work, update
from ichpipe.common.artifacts import Artifacts
from ichpipe.features.dask_client import connect
from ichpipe.features.embedder import MakeEmbedder, SliceEmbedder, SliceInput
from ichpipe.features.generations import GenerationSpec, open_features
from ichpipe.index.slice_index import read_index
from ichpipe.models.slice_cnn import SliceCnn, spec_for
from ichpipe.models.weights import load_slice_cnn, save_model
from ichpipe.params.schema import PAPER_WINDOWS, load_params

BACKBONES = [
    "resnet10t",
    "resnet18",
    "resnet50",
    "tf_efficientnet_lite0",
    "efficientnet_b0",
    "densenet121",
    "seresnext50_32x4d",
    "convnext_atto",
    "mobilenetv3_small_050",
]


def features_of(run, arm=None, *overrides):
    params = load_params(run.params, overrides)
    artifacts = Artifacts(run.artifacts)
    return open_features(params, artifacts, read_index(artifacts.index), params.sequence[arm] if arm else None)


def to_compute(output):
    """How many slices each generation still needed, as the log says it."""
    return [int(n) for n in re.findall(r": (\d+) of \d+ slices to compute", output)]


@pytest.fixture
def own(branch, tmp_path):
    """A branch with a copy of the data that a test may change, and its store."""
    data = tmp_path / "data"
    shutil.copytree(branch.data, data)
    branch.data = data
    branch.point_to(data)
    return branch.steps("prepare", "extract")


# Identity: only what is new is computed


def test_moved_files_cost_nothing(own):
    shutil.move(own.data / "dicom", own.data / "elsewhere")
    (own.data / "dicom").mkdir()
    for number, path in enumerate(sorted((own.data / "elsewhere").rglob("*.dcm"))):
        path.rename(own.data / "dicom" / f"{number}.dcm")
    own.steps("prepare")
    output = own("extract").output
    assert "slices are there" in output
    assert to_compute(output) == []


def test_new_changed_and_vanished_slices(own):
    """One study leaves, comes back, and one file changes: 0, 0 and 1 slices are computed."""
    index = read_index(own.artifacts / "index" / "slices.parquet")
    study = index["study_uid"].iloc[0]
    files = [Path(path) for path in index.loc[index["study_uid"] == study, "path"]]
    aside = own.data / "aside"
    aside.mkdir()
    for path in files:
        path.rename(aside / path.name)
    own.steps("prepare")
    assert to_compute(own("extract").output) == []
    store = features_of(own).plain
    assert len(store) == len(index) - len(files)
    assert not set(index.loc[index["study_uid"] == study, "series_uid"]) & set(store.series_uids)
    for path in files:
        (aside / path.name).rename(path)
    own.steps("prepare")
    assert to_compute(own("extract").output) == []
    assert len(features_of(own).plain) == len(index)
    kit.flip(files[0], -1)  # the last pixel
    own.steps("prepare")
    assert to_compute(own("extract").output) == [1]
    assert len(features_of(own).plain) == len(index)


def test_vanished_series_stay_where_asked(own):
    index = read_index(own.artifacts / "index" / "slices.parquet")
    gone = index["series_uid"].iloc[0]
    for path in index.loc[index["series_uid"] == gone, "path"]:
        Path(path).unlink()
    own.steps("prepare")
    assert own("--set", "extract.keep_vanished=true", "extract").exit_code == 0
    assert gone in features_of(own).plain.series_uids
    own.steps("extract")
    assert gone not in features_of(own).plain.series_uids


@pytest.mark.slow
def test_two_networks_share_a_store_and_prune_keeps_the_one_in_use(branch):
    before = features_of(branch).plain
    uid = before.series_uids[0]
    kept = np.array(before.embedding(uid))
    other = ["--set", "fit-slices.seed=9", "--set", "fit-slices.epochs=1"]
    shutil.copytree(branch.artifacts / "slice-cnn", branch.folder / "aside")
    assert branch(*other, "fit-slices").exit_code == 0
    branch.steps("extract")
    assert (features_of(branch).plain.embedding(uid) != kept).any()
    shutil.rmtree(branch.artifacts / "slice-cnn")
    shutil.copytree(branch.folder / "aside", branch.artifacts / "slice-cnn")
    assert to_compute(branch("extract").output) == []  # the former generation is still there
    np.testing.assert_array_equal(features_of(branch).plain.embedding(uid), kept)
    store = branch.artifacts / "embeddings.zarr"
    assert len(json.loads(branch("cache", "info", store, "--json").output)["generations"]) == 2
    assert "would go" in branch("cache", "prune", store, "--dry-run").output
    assert len(json.loads(branch("cache", "info", store, "--json").output)["generations"]) == 2
    assert branch("cache", "prune", store).exit_code == 0
    facts = json.loads(branch("cache", "info", store, "--json").output)
    assert [one["complete"] for one in facts["generations"]] == [True]
    np.testing.assert_array_equal(features_of(branch).plain.embedding(uid), kept)


def test_prune_never_empties_a_store(branch, capsys):
    shutil.rmtree(branch.artifacts / "slice-cnn")
    store = branch.artifacts / "embeddings.zarr"
    assert "nothing in" in branch.error(capsys, "cache", "prune", store)
    assert json.loads(branch("cache", "info", store, "--json").output)["generations"]


# The command line's care of a store


def test_cache_info_says_what_is_there(run, index):
    store = run.artifacts / "embeddings.zarr"
    (one,) = json.loads(run("cache", "info", store, "--json").output)["generations"]
    assert (one["rows"], one["series"], one["studies"]) == (
        len(index), index["series_uid"].nunique(), index["study_uid"].nunique()
    )  # fmt: skip
    assert one["complete"]
    assert one["missing_studies"] == []
    assert one["identity"]["backbone"] == "resnet10t"
    text = run("cache", "info", store).output
    assert f"{len(index)} rows" in text
    assert "resnet10t" in text


@pytest.mark.slow
def test_a_flipped_bit_is_found_named_refused_repaired_and_computed_again(branch, capsys):
    before = features_of(branch).plain
    store = branch.artifacts / "embeddings.zarr"
    assert branch("cache", "verify", store).exit_code == 0
    victim = min(store.glob("*/segment-*/embedding/c/1/0"))
    kit.flip(victim, 1000, 8)
    result = branch("cache", "verify", store, "--json")
    assert result.exit_code == 1
    found = json.loads(result.output)
    index = read_index(branch.artifacts / "index" / "slices.parquet")
    assert set(found["studies"]) == set(index["study_uid"].iloc[100:200])  # chunk 1 of 100 rows
    message = branch.error(capsys, "fit-sequence")
    assert "fails its checksum" in message
    assert found["studies"][0] in message
    assert branch("cache", "verify", store, "--repair").exit_code == 1
    assert to_compute(branch("extract").output) == [100]
    assert branch("cache", "verify", store).exit_code == 0
    for uid in before.series_uids:
        np.testing.assert_array_equal(features_of(branch).plain.embedding(uid), np.array(before.embedding(uid)))


def test_a_store_that_is_not_there_is_one_message(run, capsys, tmp_path):
    for command in ("info", "verify", "prune"):
        assert "does not exist" in run.error(capsys, "cache", command, tmp_path / "none.zarr")


# Equality with embedding on the fly


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.slow
def test_cached_rows_equal_those_made_on_the_fly_for_every_kind_of_backbone(backbone, index, tmp_path):
    torch.manual_seed(0)
    save_model(tmp_path / "cnn", SliceCnn(spec_for(backbone, PAPER_WINDOWS, 64, 0.0)), {})
    few = index[index["series_uid"] == index["series_uid"].iloc[0]].head(6)
    cache = GenerationSpec(tmp_path / "cnn", few)
    slices = [SliceInput(*row) for row in few[["path", "series_uid", "file_digest"]].itertuples(index=False)]
    cnn = load_slice_cnn(tmp_path / "cnn")
    work = Work(slices, MakeEmbedder(tmp_path / "cnn", ("cpu",), 4), lambda: connect(1, None))
    generation = Generation(cache.identity(), cnn.embedding_dim, cnn.spec.classes, 100)
    assert sum(update(StoreLocation(str(tmp_path / "store")), generation, cache.rows(), work)) == 6
    cached = EmbeddingStore(tmp_path / "store", cache.identity(), cache.rows()).series(few["series_uid"].iloc[0])
    embedding, logits = SliceEmbedder(cnn, torch.device("cpu"), 4)(slices)
    np.testing.assert_allclose(cached.embedding.astype(np.float64), embedding, rtol=2.0**-11, atol=2.0**-25)
    np.testing.assert_array_equal(cached.logit, logits)


def test_two_worker_processes_write_the_same_store(branch, run):
    shutil.rmtree(branch.artifacts / "embeddings.zarr")
    assert branch("extract", "--workers", 2).exit_code == 0
    files = kit.all_bytes(run.artifacts / "embeddings.zarr")
    assert len(files) > 8
    for name, content in files.items():
        assert (branch.artifacts / "embeddings.zarr" / name).read_bytes() == content, name


def test_a_current_store_is_left_alone(branch):
    before = {p: p.stat().st_mtime_ns for p in (branch.artifacts / "embeddings.zarr").rglob("*")}
    branch.steps("extract")
    assert {p: p.stat().st_mtime_ns for p in (branch.artifacts / "embeddings.zarr").rglob("*")} == before


def test_cached_embeddings_equal_those_made_on_the_fly(run, index):
    folder = run.artifacts / "slice-cnn"
    store = features_of(run).plain
    embed = SliceEmbedder(load_slice_cnn(folder), torch.device("cpu"), 7)
    uid, rows = next(iter(index.groupby("series_uid")))
    cached = store.series(uid)
    embedding, logits = embed([SliceInput(path, uid, "") for path in rows["path"]])
    assert list(cached.sop_uids) == rows["sop_uid"].tolist()
    bound = 2.0**-11 * np.abs(embedding) + 2.0**-24 + 1e-4  # half a unit in the last place of float16, other batches
    assert (np.abs(cached.embedding.astype(np.float64) - embedding) <= bound).all()
    np.testing.assert_allclose(cached.logit, logits, atol=1e-4)


@pytest.mark.slow
def test_a_store_of_other_weights_is_refused_by_stage_two_and_replaced_by_extract(branch, capsys):
    assert branch("--set", "fit-slices.seed=9", "--set", "fit-slices.epochs=1", "fit-slices").exit_code == 0
    message = branch.error(capsys, "fit-sequence")
    assert "weights: store has" in message
    assert "ichpipe extract" in message
    branch.steps("extract", "fit-sequence")
