"""What tests share: few threads, skips by machine, a writer of small DICOM files, and one run of the whole recipe."""

import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from click.testing import CliRunner
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.stages.cli import cli, main

PROGRAM = (sys.executable, "-c", "from ichpipe.stages.cli import main; main()")
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
AXIAL = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]

# torch is imported later, by the tests; numpy's arrays are small here, and its threads don't matter.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

# A suite started in the background of a script, or by nohup, ignores these, and so would all programs that it starts.
for _name in ("SIGINT", "SIGHUP"):
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, _name), signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not has_cuda():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "run" in item.fixturenames:  # the fixture trains the whole recipe
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("real_data") and not os.environ.get("ICHPIPE_REAL_DATA"):
            item.add_marker(pytest.mark.skip(reason="ICHPIPE_REAL_DATA names no folder"))


def pytest_sessionfinish():
    # Folders of the checkout install as parts of ichpipe; under their own names they would be second copies.
    strays = {"pipeline", "stages", "cache"} & set(sys.modules)
    assert not strays, f"imported under the folder's name instead of ichpipe's: {sorted(strays)}"


def has_cuda():
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def real_data() -> Path:
    return Path(os.environ["ICHPIPE_REAL_DATA"])


def ct_dataset(pixels, *, series="1.2.3.1", number=1, z=0.0, patient="P1"):
    """One CT slice with the tags that matter; ``pixels`` (rows, columns) are stored as they are."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = CT_IMAGE, f"{series}.{number}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = f"{series}.0.1", series
    dataset.PatientID, dataset.Modality, dataset.ImageType = patient, "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.InstanceNumber = number
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [-100.0, -100.0, float(z)], AXIAL
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    bits = pixels.dtype.itemsize * 8
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


def save_dicom(dataset, path, transfer_syntax=ExplicitVRLittleEndian):
    """Write ``dataset`` as a DICOM file; tags set to None are left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet_pydicom():
        if getattr(dataset, "file_meta", None) is None:
            dataset.file_meta = FileMetaDataset()
            dataset.file_meta.TransferSyntaxUID = transfer_syntax
        dataset.file_meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID") or CT_IMAGE
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.get("SOPInstanceUID") or "1.2.3"
        dataset.save_as(path, enforce_file_format=True)
    return path


def compress(path, syntax):
    """Compress the pixels of a file in place."""
    with quiet_pydicom():
        dataset = pydicom.dcmread(path)
        dataset.compress(syntax, generate_instance_uid=False)
        dataset.save_as(path)
    return path


@pytest.fixture
def write_ct(tmp_path):
    """A function that writes one small CT slice and returns its path.

    Further keywords are DICOM keywords to set, or to remove with None.
    """

    def write(name="slice.dcm", pixels=None, *, series="1.2.3.1", number=1, z=0.0, patient="P1", **tags):
        if pixels is None:
            pixels = np.full((4, 6), 1000 + number, dtype=np.int16)
        syntax = tags.pop("transfer_syntax", ExplicitVRLittleEndian)
        with quiet_pydicom():
            dataset = ct_dataset(pixels, series=series, number=number, z=z, patient=patient)
            for keyword, value in tags.items():
                if value is None:
                    del dataset[keyword]
                else:
                    setattr(dataset, keyword, value)
        return save_dicom(dataset, tmp_path / name, syntax)

    return write


@pytest.fixture
def write_series(write_ct):
    """A function that writes one slice for each position (mm), in that order, into ``folder``."""

    def write(folder, positions, *, series="1.2.3.1", patient="P1", **tags):
        common = {"series": series, "patient": patient, **tags}
        return [write_ct(f"{folder}/{series}-{n}", number=n, z=z, **common) for n, z in enumerate(positions, 1)]

    return write


TINY = """
phantom: {studies: 16, size_px: 48, seed: 3}
prepare: {dicom_dir: DATA/dicom, labels: DATA/stage_2_train.csv, size_px: 48, val_fraction: 0.2, test_fraction: 0.3,
  folds: 2}
fit-slices: {backbone: resnet10t, epochs: 2, batch_size: 32, precision: fp32}
extract: {chunk_rows: 100, batch_size: 50}
sequence:
  paper: {cell: lstm, hidden: 8, layers: 2, epochs: 2, dropout: 0.1}
  gru-logits: {cell: gru, hidden: 8, layers: 1, epochs: 2, inputs: [embedding, logits], seeds: 2}
  floor: {cell: average, inputs: [logits]}
finetune: {arm: paper, epochs: 1, chunk_slices: 9}
evaluate: {bootstrap_samples: 50}
"""


def set_options(*values):
    """Return the words of ``--set`` for each KEY=VALUE."""
    return [word for value in values for word in ("--set", value)]


class Run:
    """One folder of parameters and artifacts."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.params = folder / "params.yaml"
        self.artifacts = folder / "artifacts"
        folder.mkdir(parents=True, exist_ok=True)
        self.point_to(data)

    def point_to(self, data):
        self.params.write_text(TINY.replace("DATA", str(data)))

    def fresh(self, folder, data=None):
        """Another run without artifacts, of the same data unless told."""
        return Run(folder, data or self.data)

    def arguments(self, *rest):
        return ["--params", str(self.params), "--artifacts", str(self.artifacts), *map(str, rest)]

    def __call__(self, *rest):
        return CliRunner().invoke(cli, self.arguments(*rest), catch_exceptions=False)

    def steps(self, *commands):
        """Run commands, each a name or a tuple of arguments, of which none may fail."""
        for command in commands:
            result = self(*([command] if isinstance(command, str) else command))
            assert result.exit_code == 0, result.output
        return self

    def whole(self):
        return self.steps(*STEPS)

    def copy(self, folder):
        other = Run(folder, self.data)
        shutil.copytree(self.artifacts, other.artifacts)
        return other

    def error(self, capsys, *rest):
        """Run through the outermost door; return the one message of a failure."""
        with pytest.raises(SystemExit) as stop:
            main(self.arguments(*rest))
        assert stop.value.code == 1
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    def metrics(self):
        return (self.artifacts / "metrics" / "evaluate.json").read_bytes()


STEPS = ("prepare", "fit-slices", "extract", "fit-sequence", "finetune", "evaluate")


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = folder / "phantom"
    return Run(folder / "one", data).steps(("phantom", "--out", data), *STEPS)


@pytest.fixture
def branch(run, tmp_path):
    """A copy of the finished run, for a test that changes it."""
    return run.copy(tmp_path / "branch")


@pytest.fixture(scope="session")
def index(run):
    from ichpipe.index.slice_index import read_index

    return read_index(run.artifacts / "index" / "slices.parquet")


@pytest.fixture(scope="module")
def client():
    """A Dask client with one worker in this process, for stores of `store_kit`."""
    import cloudpickle
    import store_kit

    from ichpipe.features.dask_client import connect

    cloudpickle.register_pickle_by_value(store_kit)  # worker processes can't import the tests
    with connect(1, None) as dask_client:
        yield dask_client
    cloudpickle.unregister_pickle_by_value(store_kit)
