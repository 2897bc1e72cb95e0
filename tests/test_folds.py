"""Out-of-fold slice CNNs: what each is fed, that an interrupted stage goes on, and that no wrong one is used."""

import contextlib
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ichpipe.common.artifacts import FOLDS_FILE, MODEL_FILE, RECORD_FILE, Artifacts
from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import MissingFileError, ParamsError, TrainingError, WeightsError
from ichpipe.common.files import digest_of_file, read_json
from ichpipe.features.generations import list_generations
from ichpipe.images.slice_dataset import SliceDataset, load_slices
from ichpipe.index.index_writer import write_outputs
from ichpipe.index.slice_index import read_index
from ichpipe.models.header import Framing, fold_models, fold_numbers, read_header
from ichpipe.models.weights import load_slice_cnn
from ichpipe.params.schema import Params, load_params
from ichpipe.scoring.metrics import weighted_log_loss
from ichpipe.stages import fit_slices, phantom, prepare
from ichpipe.training.slice_trainer import SliceFitting

FOLDS, EPOCHS = 3, 2


class Spy:
    """Watches `fit-slices`: which files each network is trained on, its first weights, its seed, its epochs."""

    def __init__(self, monkeypatch, stop_after=None):
        self.fed, self.start, self.seeds, self.epochs = defaultdict(set), {}, {}, []
        self.name, self.training, self.stop_after = None, False, stop_after
        self.watch_start(monkeypatch, SliceFitting.trainer)
        self.watch_epoch(monkeypatch, SliceFitting.train_epoch)
        self.watch_reading(monkeypatch, SliceDataset.__getitem__)

    def watch_start(self, monkeypatch, original):
        def trainer(fitting, checkpoint, key):
            self.name = checkpoint.stem.removeprefix("fit-slices").lstrip(".") or "slice-cnn"
            self.seeds[self.name] = fitting.seed
            return original(fitting, checkpoint, key)

        monkeypatch.setattr(SliceFitting, "trainer", trainer)

    def watch_epoch(self, monkeypatch, original):
        def train_epoch(fitting, epoch, position):
            self.start.setdefault(self.name, {key: value.clone() for key, value in fitting.cnn.state_dict().items()})
            self.epochs.append((self.name, epoch))
            self.training = True
            original(fitting, epoch, position)
            self.training = False
            if (self.name, epoch) == self.stop_after:
                raise InterruptedError(f"stopped in {self.name}")

        monkeypatch.setattr(SliceFitting, "train_epoch", train_epoch)

    def watch_reading(self, monkeypatch, original):
        def read(dataset, row):
            if self.training:
                self.fed[self.name].add(dataset.paths[row])
            return original(dataset, row)

        monkeypatch.setattr(SliceDataset, "__getitem__", read)


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    made = Params.model_validate({
        "phantom": {"studies": 10, "size_px": 32, "seed": 3},
        "prepare": {"dicom_dir": str(data / "dicom"), "labels": str(data / "stage_2_train.csv"), "size_px": 32,
                    "val_fraction": 0.2, "test_fraction": 0.2, "folds": FOLDS},
        "fit-slices": {"backbone": "resnet10t", "epochs": EPOCHS, "precision": "fp32", "folds": FOLDS},
    })  # fmt: skip
    phantom.run(made.phantom, data)
    return made


@pytest.fixture(scope="module")
def spied(params, tmp_path_factory):
    """A finished run and what was seen of it."""
    artifacts = Artifacts(tmp_path_factory.mktemp("run"))
    prepare.run(params.prepare, artifacts.index_dir)
    with pytest.MonkeyPatch.context() as monkeypatch:
        spy = Spy(monkeypatch)
        fit_slices.run(params, artifacts, "cpu")
    return artifacts, spy


@pytest.fixture
def run(spied):
    return spied[0]


@pytest.fixture
def spy(spied):
    return spied[1]


@pytest.fixture
def index(run):
    return read_index(run.index)


@pytest.fixture
def fresh(run, tmp_path):
    """A run that has its index and nothing else."""
    artifacts = Artifacts(tmp_path / "fresh")
    shutil.copytree(run.index_dir, artifacts.index_dir)
    return artifacts


def plain(params):
    return params.model_copy(update={"fit_slices": params.fit_slices.model_copy(update={"folds": 0})})


def bytes_of(artifacts):
    """All that the stage writes but the record, which alone holds wall time."""
    paths = sorted(path for path in artifacts.slice_cnn.rglob("*.*") if path.name != RECORD_FILE)
    return {path.relative_to(artifacts.root): path.read_bytes() for path in paths}


@pytest.mark.slow
def test_each_network_is_fed_every_train_slice_but_those_of_its_fold(spy, index):
    train = index[index["split"] == "train"]
    assert set(spy.fed) == {"slice-cnn", "fold-0", "fold-1", "fold-2"}
    assert spy.fed["slice-cnn"] == set(train["path"])
    patient_of = index.set_index("path")["patient_id"]
    for fold in range(FOLDS):
        fed = spy.fed[f"fold-{fold}"]
        assert fed == set(train.loc[train["fold"] != fold, "path"])
        of_fold = set(index.loc[index["fold"] == fold, "patient_id"])
        assert of_fold
        assert not of_fold & set(patient_of[list(fed)])


def rows_by_fold(run, params, index):
    """What each fold's network embeds."""
    specs = list_generations(params, run, index)
    return {spec.fold: spec.index for spec in specs if spec.fold is not None}


def test_each_fold_s_network_embeds_the_train_rows_that_it_never_saw(run, params, spy, index):
    parts = list(rows_by_fold(run, params, index).values())
    assert len(parts) == FOLDS
    for fold, rows in enumerate(parts):
        assert not set(rows["path"]) & spy.fed[f"fold-{fold}"]
        assert index.loc[rows.index].equals(rows)
    together = pd.concat(parts).sort_index()
    assert together.equals(index[index["split"] == "train"])


def test_all_networks_start_from_the_same_weights_and_draw_their_own_numbers(spy):
    first, *others = spy.start.values()
    assert len(others) == FOLDS
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)
    assert len(set(spy.seeds.values())) == 1 + FOLDS


def test_the_loss_out_of_fold_is_that_of_each_network_on_what_it_left_out(run, params, index):
    labels, probabilities = [], []
    for fold, folder in fold_models(run, params, digest_of_file(run.index)).items():
        rows = rows_by_fold(run, params, index)[fold]
        with torch.no_grad():
            _, logits = load_slice_cnn(folder)(load_slices(rows["path"].tolist(), Framing(params.prepare.size_px)))
        labels.append(rows[list(CLASSES)].to_numpy())
        probabilities.append(torch.sigmoid(logits.double()).numpy())
    own = read_json(run.fold_cnns / FOLDS_FILE)
    assert [facts["excluded_fold"] for facts in own] == list(range(FOLDS))
    assert [facts["n_out_of_fold_slices"] for facts in own] == [len(part) for part in labels]
    expected = [weighted_log_loss(*pair) for pair in zip(labels, probabilities, strict=True)]
    assert [facts["out_of_fold_loss"] for facts in own] == pytest.approx(expected, rel=1e-4)
    record = read_json(run.slice_cnn / RECORD_FILE)
    expected = weighted_log_loss(np.concatenate(labels), np.concatenate(probabilities))
    assert record["out_of_fold_loss"] == pytest.approx(expected, rel=1e-4)
    assert record["n_folds"] == FOLDS
    assert record["n_out_of_fold_slices"] == record["n_train_slices"] == (index["split"] == "train").sum()
    assert record["val_loss"] != own[0]["val_loss"]


def test_the_header_says_what_was_left_out(run):
    index = digest_of_file(run.index)
    assert read_header(run.slice_cnn).made_from == {"index": index}
    assert read_header(run.fold_cnn(1)).made_from == {"index": index, "excluded_fold": "1", "folds": str(FOLDS)}


@pytest.mark.slow
def test_a_second_run_gives_the_same_bytes_and_removes_folds_of_a_former_one(run, params, tmp_path):
    again = Artifacts(tmp_path / "again")
    shutil.copytree(run.root, again.root)
    shutil.copytree(run.fold_cnn(0), again.fold_cnn(7))
    fit_slices.run(params, again, "cpu")
    assert bytes_of(again) == bytes_of(run)
    assert len(bytes_of(again)) == 2 * (1 + FOLDS) + 1


def test_without_folds_there_is_one_network_the_same_one_and_no_fold(run, fresh, params):
    stale = fresh.resume("fit-slices.fold-1.pt")
    stale.parent.mkdir()
    stale.touch()
    fit_slices.run(plain(params), fresh, "cpu")
    assert (fresh.slice_cnn / MODEL_FILE).read_bytes() == (run.slice_cnn / MODEL_FILE).read_bytes()
    assert [path.name for path in fresh.fold_cnns.iterdir()] == [FOLDS_FILE]
    assert read_json(fresh.fold_cnns / FOLDS_FILE) == []
    assert list(stale.parent.iterdir()) == []
    assert "out_of_fold_loss" not in read_json(fresh.slice_cnn / RECORD_FILE)
    assert fold_models(fresh, plain(params), digest_of_file(fresh.index)) == {}


@pytest.mark.slow
def test_a_stage_interrupted_again_and_again_trains_no_epoch_twice(run, fresh, params):
    """DVC removes a stage's outputs before it runs it again: checkpoints alone must do."""
    trained = []
    for stop_after in (("fold-0", 1), ("fold-1", EPOCHS), None):
        with pytest.MonkeyPatch.context() as monkeypatch:
            spy = Spy(monkeypatch, stop_after)
            with pytest.raises(InterruptedError) if stop_after else contextlib.nullcontext():
                fit_slices.run(params, fresh, "cpu")
        trained += spy.epochs if stop_after is None else spy.epochs[:-1]  # the last one was cut short
        if stop_after == ("fold-1", EPOCHS):
            assert (fresh.fold_cnn(0) / MODEL_FILE).exists()
            assert not fresh.fold_cnn(1).exists()
            shutil.rmtree(fresh.slice_cnn)
    networks = ["slice-cnn", *(f"fold-{fold}" for fold in range(FOLDS))]
    assert trained == [(name, epoch) for name in networks for epoch in range(1, EPOCHS + 1)]
    assert bytes_of(fresh) == bytes_of(run)
    assert list(fresh.resume("").iterdir()) == []


def test_folds_of_other_parameters_are_gone_before_the_new_network_stands(run, params, tmp_path):
    other = Artifacts(tmp_path / "other")
    shutil.copytree(run.root, other.root)
    shorter = params.fit_slices.model_copy(update={"epochs": 1})
    with pytest.MonkeyPatch.context() as monkeypatch:
        Spy(monkeypatch, stop_after=("fold-0", 1))
        with pytest.raises(InterruptedError):
            fit_slices.run(params.model_copy(update={"fit_slices": shorter}), other, "cpu")
    assert (other.slice_cnn / MODEL_FILE).read_bytes() != (run.slice_cnn / MODEL_FILE).read_bytes()
    with pytest.raises(MissingFileError, match=r"fold-0.*run: ichpipe fit-slices"):
        fold_models(other, params, digest_of_file(other.index))


@pytest.mark.parametrize("folds", [1, 2, 4])
def test_another_number_of_folds_than_the_index_has_is_refused(folds):
    with pytest.raises(ParamsError, match=rf"fit-slices\.folds is {folds}, but prepare\.folds is 3"):
        load_params(Path("none.yaml"), (f"fit-slices.folds={folds}", "prepare.folds=3"))


def test_the_held_out_fold_of_a_cross_validation_has_no_network(params):
    def numbers(**changes):
        return fold_numbers(params.model_copy(update={"prepare": params.prepare.model_copy(update=changes)}))

    assert numbers() == [0, 1, 2]
    assert numbers(test_fold=1) == [0, 2]
    assert fold_numbers(plain(params)) == []


@pytest.mark.parametrize(("test_fold", "words"), [(None, "fold 0 holds none"), (0, "fold 1 holds them all")])
def test_a_fold_that_can_not_be_left_out_stops_the_stage_before_it_trains(fresh, params, index, test_fold, words):
    one_fold = index.assign(fold=np.int32(1))
    write_outputs(fresh.index_dir, one_fold, pd.DataFrame(columns=["path", "reason"]), {})
    section = params.prepare.model_copy(update={"test_fold": test_fold})
    with pytest.raises(TrainingError, match=rf"{words}.*prepare\.folds"):
        fit_slices.run(params.model_copy(update={"prepare": section}), fresh, "cpu")
    assert not fresh.slice_cnn.exists()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("slice-cnn/folds/fold-1", "was trained without fold 1 of 3, wanted without fold 0 of 3"),
        ("slice-cnn", "was trained on all folds, wanted without fold 0 of 3"),
    ],
)
def test_a_network_that_left_out_another_fold_is_refused(run, params, tmp_path, source, words):
    other = Artifacts(tmp_path / "other")
    shutil.copytree(run.slice_cnn, other.slice_cnn)
    shutil.copy(run.root / source / MODEL_FILE, other.fold_cnn(0))
    with pytest.raises(WeightsError, match=rf"fold-0/model\.safetensors {words}.*run: ichpipe fit-slices"):
        fold_models(other, params, digest_of_file(run.index))


def test_networks_of_another_index_or_number_of_folds_are_refused(run, params):
    with pytest.raises(WeightsError, match=r"fold-0/model\.safetensors was trained on another index.*fit-slices"):
        fold_models(run, params, "0" * 64)
    two = params.model_copy(update={"fit_slices": params.fit_slices.model_copy(update={"folds": 2})})
    with pytest.raises(WeightsError, match="without fold 0 of 3, wanted without fold 0 of 2"):
        fold_models(run, two, digest_of_file(run.index))
