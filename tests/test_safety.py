"""Files from elsewhere run no code and reach no place outside; the keys of hashed identifiers are in no output."""

import ast
import gc
import os
import shutil
import stat
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import planted
import pydicom
import pytest
from conftest import ct_dataset, save_dicom
from pydicom.fileset import FileSet

from ichpipe.common.errors import DataError, MissingFileError, ParamsError, UnreadableDicomError
from ichpipe.common.pseudonyms import Pseudonyms, read_pseudonyms
from ichpipe.dicom.archive import list_files, read_file
from ichpipe.dicom.coded_terms import BODY_PARTS, MODALITIES, RESCALE_TYPES, body_part, shown
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.index.scan import scan
from ichpipe.params.schema import load_params

ROOT = Path(__file__).parents[1]
ROOMS = ("pipeline", "stages", "cache")

# No code in data

FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load",
    "marshal.loads", "shelve.open", "joblib.load", "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads",
    "pandas.read_pickle", "pd.read_pickle", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "os.system",
    "os.popen", "tempfile.mktemp", "torch.jit.load", "torch.hub.load", "shutil.unpack_archive",
    "importlib.import_module",
}  # fmt: skip
UNPACKING = ("extractall", "extract")


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}, node


def wrong_calls(source):
    found = []
    for name, words, node in calls(ast.parse(source)):
        last = name.rpartition(".")[2]
        if (
            name in FORBIDDEN
            or (last in UNPACKING and "." in name)
            or (name == "torch.load" and words.get("weights_only") != "True")
            or words.get("allow_pickle") == "True"
            or (name == "yaml.load" and not ast.unparse(node).endswith(("SafeLoader)", "_Loader)")))
            or words.get("shell") == "True"
        ):
            found.append(name)
    return found


def test_nothing_is_unpickled_evaluated_or_unpacked_to_disk():
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            lazy = path == ROOT / "pipeline" / "__init__.py"  # names of our own modules, looked up when asked for
            assert not [name for name in wrong_calls(source) if not (lazy and name.endswith("import_module"))], path


@pytest.mark.parametrize(
    "source",
    ["eval(x)", "pickle.loads(x)", "torch.load(p)", "torch.load(p, weights_only=False)",
     "np.load(p, allow_pickle=True)", "yaml.load(x, Loader=yaml.Loader)", "subprocess.run(x, shell=True)",
     "archive.extractall()"],
)  # fmt: skip
def test_the_walk_sees_what_it_looks_for(source):
    assert wrong_calls(source)


def test_the_yaml_loader_makes_plain_values_only(tmp_path):
    (tmp_path / "p.yaml").write_text("phantom: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ParamsError):
        load_params(tmp_path / "p.yaml")


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["BOMB"])),)


def test_weights_and_checkpoints_that_hold_code_do_not_run_it(tmp_path, monkeypatch):
    import torch

    from ichpipe.common.errors import WeightsError
    from ichpipe.models.weights import load_pretrained
    from ichpipe.training.trainer import Trainer

    monkeypatch.setenv("BOMB", str(tmp_path / "gone-off"))
    torch.save({"key": "k", "model": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(WeightsError, match=r"holds objects of .*, which are not unpickled"):
        load_pretrained(torch.nn.Linear(1, 1), "resnet10t", str(tmp_path / "bomb.pt"))
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = Trainer(model, optimizer, schedule, 0, 1, tmp_path / "bomb.pt", "k")
    assert len(trainer.run(lambda _epoch, position: position.advance(1.0), lambda: 1.0)) == 1
    assert not (tmp_path / "gone-off").exists()


# No way out of archives, directories and names


@pytest.fixture
def outside(tmp_path):
    """The folder that is read; a slice that is not to be read lies beside it."""
    save_dicom(ct_dataset(np.full((4, 4), 1, np.int16), patient="OUTSIDE"), tmp_path / "secret.dcm")
    folder = tmp_path / "given"
    folder.mkdir()
    return folder


def test_members_that_name_other_places_are_members(outside, tmp_path):
    inside = save_dicom(ct_dataset(np.full((4, 4), 2, np.int16), patient="INSIDE"), tmp_path / "x.dcm").read_bytes()
    link = zipfile.ZipInfo("link.dcm")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    names = ["../secret.dcm", "../../secret.dcm", str(tmp_path / "secret.dcm"), "a/../../secret.dcm"]
    with zipfile.ZipFile(outside / "a.zip", "w") as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), inside)
        archive.writestr(link, str(tmp_path / "secret.dcm"))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    files = list_files([outside]).files
    assert files
    assert not [file.path for file in files if b"OUTSIDE" in read_file(file.path, 1 << 20)]
    slices, rejected = scan([outside])
    assert set(slices["patient_id"]) == {"INSIDE"}
    assert any("link.dcm" in path for path in rejected["path"])  # the text of a link is no DICOM file
    assert sorted(path.name for path in tmp_path.rglob("*")) == before  # nothing was unpacked


def test_paths_through_an_archive_reach_no_other_file(outside, tmp_path):
    with zipfile.ZipFile(outside / "a.zip", "w") as archive:
        archive.writestr("b.dcm", b"x")
    for name in ("../secret.dcm", "../../secret.dcm", str(tmp_path / "secret.dcm")):
        with pytest.raises(UnreadableDicomError, match="has no such file"):
            read_file(f"{outside / 'a.zip'}/{name}", 1 << 20)
    with pytest.raises(MissingFileError):
        list_files([outside / "a.zip" / ".." / "c" / "secret.dcm"])


def test_a_dicomdir_leads_to_what_lies_beside_it_alone(outside, tmp_path):
    """Its ReferencedFileID (0004,1500) may name any place; it is not followed."""
    for number in range(2):
        dataset = ct_dataset(np.full((4, 4), 3, np.int16), number=number + 1, patient="INSIDE")
        dataset.StudyDate, dataset.StudyTime, dataset.StudyID, dataset.SeriesNumber = "20200101", "120000", "1", 1
        save_dicom(dataset, tmp_path / "source" / f"{number}.dcm")
    files = FileSet()
    for path in sorted((tmp_path / "source").iterdir()):
        files.add(path)
    files.write(outside)
    del files
    with pytest.warns(ResourceWarning, match="Implicitly cleaning up"):  # here, not in whichever test runs later
        gc.collect()
    with quiet_pydicom():
        directory = pydicom.dcmread(outside / "DICOMDIR")
        images = [record for record in directory.DirectoryRecordSequence if record.DirectoryRecordType == "IMAGE"]
        images[0].ReferencedFileID = ["..", "secret.dcm"]
        directory.save_as(outside / "DICOMDIR")
    slices, _ = scan([outside / "DICOMDIR"])
    assert set(slices["patient_id"]) == {"INSIDE"}
    assert len(slices) == 2


def test_links_to_folders_are_not_followed(outside, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "secret.dcm", tmp_path / "elsewhere")
    (outside / "link").symlink_to(tmp_path / "elsewhere")
    assert list_files([outside]).files == []


@pytest.mark.parametrize("name", ["../out", "a/b", ".hidden", "a\\b", "C:x", "a\nb", " "])
def test_an_arm_names_one_folder_and_no_other_place(tmp_path, name):
    import yaml

    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"sequence": {name: {}}, "finetune": {"arm": name}}))
    with pytest.raises(ParamsError, match="can't name a folder"):
        load_params(tmp_path / "p.yaml")


def test_a_report_is_not_written_where_a_uid_leads(tmp_path):
    pytest.importorskip("highdicom")
    from ichpipe.inference.structured_report import require_reportable

    dataset = ct_dataset(np.full((4, 4), 1, np.int16))
    with pytest.warns(UserWarning, match="Invalid value for VR UI"):
        dataset.SeriesInstanceUID = "../../evil"
    with pytest.raises(DataError, match="SeriesInstanceUID is no DICOM UID"):
        require_reportable([dataset])


# Hashed identifiers

KEY = "0123456789abcdef0123456789abcdef"


def test_a_pseudonym_is_the_same_for_ever(monkeypatch):
    """By hand: HMAC-SHA-256 of "patient", a zero byte and the identifier; the first 32 digits."""
    import hashlib
    import hmac

    monkeypatch.setenv("KEY", KEY + "\n")
    hide = read_pseudonyms("env:KEY")
    assert hide("P1") == hmac.new(KEY.encode(), b"patient\0P1", hashlib.sha256).hexdigest()[:32]
    assert hide.of(["P1", "P2", "P1"]) == [hide("P1"), hide("P2"), hide("P1")]
    assert hide("P1") != Pseudonyms(b"another key, as long")("P1")
    assert KEY not in hide.mark


def test_a_key_is_read_from_where_the_parameter_says(tmp_path, monkeypatch):
    (tmp_path / "key").write_text(KEY)
    monkeypatch.setenv("KEY", KEY)
    assert read_pseudonyms(str(tmp_path / "key"))("a") == read_pseudonyms("env:KEY")("a")
    assert read_pseudonyms(None) is None
    monkeypatch.delenv("KEY")
    with pytest.raises(MissingFileError, match="the environment has no KEY"):
        read_pseudonyms("env:KEY")
    with pytest.raises(MissingFileError, match="name a file with the secret key"):
        read_pseudonyms(str(tmp_path / "none"))
    (tmp_path / "key").write_text("short")
    with pytest.raises(ParamsError, match="has 5 bytes, fewer than 16") as caught:
        read_pseudonyms(str(tmp_path / "key"))
    assert "short" not in str(caught.value)


def test_hashed_runs_hold_neither_identifier_nor_key(run, tmp_path, monkeypatch):
    """prepare with its cache of headers, and predict: the same word for the same patient."""
    monkeypatch.setenv("ICHPIPE_TEST_KEY", KEY)
    hashed = ("--set", "prepare.hash_patient_ids=env:ICHPIPE_TEST_KEY")
    other = run.fresh(tmp_path / "hashed")
    assert other(*hashed, "prepare").exit_code == 0
    plain = pd.read_parquet(run.artifacts / "index" / "slices.parquet").set_index("sop_uid")["patient_id"]
    hidden = pd.read_parquet(other.artifacts / "index" / "slices.parquet").set_index("sop_uid")["patient_id"]
    hide = Pseudonyms(KEY.encode())
    assert hidden.to_dict() == {sop: hide(patient) for sop, patient in plain.items()}
    model = run.artifacts / "finetuned"
    result = other(*hashed, "predict", run.data / "dicom", "--out", tmp_path / "out", "--model", model)
    assert result.exit_code == 0, result.output
    assert set(pd.read_csv(tmp_path / "out" / "studies.csv")["patient_id"]) <= set(hidden)
    words = {*plain, KEY}
    for path in planted.files_below(other.artifacts, tmp_path / "out"):
        for part in planted.unpacked(path.read_bytes()):
            assert not [word for word in words if word.encode() in part], path
    # The cache of another key, or of none, is not used.
    assert other("prepare").exit_code == 0
    again = pd.read_parquet(other.artifacts / "index" / "slices.parquet").set_index("sop_uid")["patient_id"]
    assert again.to_dict() == plain.to_dict()


def test_labels_of_patients_are_joined_by_hashed_identifiers_too(write_series, tmp_path, monkeypatch):
    from ichpipe.index.label_tables import join, read_labels

    monkeypatch.setenv("KEY", KEY)
    for number in range(2):
        write_series("dicom", [0.0, 5.0], series=f"1.2.{number}", patient=f"P{number}")
    (tmp_path / "labels.csv").write_text("PatientID,any\nP0,0\nP1,1\nP1,0\n")
    hide = read_pseudonyms("env:KEY")
    slices, _ = scan([tmp_path / "dicom"], pseudonyms=hide)
    labels = read_labels("folder", tmp_path / "labels.csv").hide_patients(hide)
    joined, _, counts = join(slices, labels)
    assert counts["studies_without_label"] == 0
    assert (joined.loc[joined["patient_id"] == hide("P0"), "any"] == 0).all()
    assert labels.report["contradictory_names"] == [hide("P1")]


# Coded values


def test_only_terms_of_the_standard_are_repeated():
    assert shown("MR", MODALITIES) == "'MR'"
    assert shown("DOE^JOHN", MODALITIES) == shown("DOE", RESCALE_TYPES) == "no term of the standard"
    assert body_part("Head") == "HEAD"
    assert body_part("CHEST SMITH") == "CHEST"
    assert body_part("NEUROCRANIO") == "NEURO"
    assert body_part("smith") == "OTHER"
    assert body_part("") == ""
    assert all(term == term.upper() for term in MODALITIES | BODY_PARTS)


def test_words_of_this_file_are_needed():
    """The walk above is of no use if the rooms are not there."""
    assert all(list((ROOT / room).rglob("*.py")) for room in ROOMS)
    assert sys.version_info >= (3, 11)
