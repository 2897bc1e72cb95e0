"""The Python interface: models applied to arrays and folders, and the embedding store.

Every error that data or files can cause is an IchpipeError. Nothing here prints or writes files.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from ichpipe.cache.errors import SeveralGenerationsError, StoreError
from ichpipe.cache.reader import EmbeddingStore
from ichpipe.common.artifacts import MODEL_FILE
from ichpipe.common.classes import CLASSES
from ichpipe.common.constants import MAX_HU, MIN_HU, SPACINGS_MM
from ichpipe.common.device import choose_device
from ichpipe.common.errors import DataError, StoreUnusableError, WeightsError
from ichpipe.common.progress import track
from ichpipe.features.embedder import classify_hu, embed_hu, to_probabilities
from ichpipe.features.generations import GenerationSpec
from ichpipe.images.framing import frame
from ichpipe.images.slice_dataset import load_readable
from ichpipe.index.slice_index import index_neighbours, neighbour_rows, slice_files
from ichpipe.index.thin_slices import smooth_thin, stride_of
from ichpipe.index.volume import Volume, find_slices, listed
from ichpipe.inference.inputs import collect_inputs
from ichpipe.inference.predictor import IDENTIFIERS, SLICE_COLUMNS, predict_slices, score_series
from ichpipe.models.end_to_end import EndToEnd, Ensemble
from ichpipe.models.header import read_header, spacing_of
from ichpipe.models.weights import load_predictor, load_slice_cnn
from ichpipe.params.schema import SelectionParams
from ichpipe.scoring.calibration import read_calibration
from ichpipe.scoring.pooling import pool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike, NDArray

    from ichpipe.index.volume import Paths
    from ichpipe.models.slice_cnn import SliceCnn
    from ichpipe.scoring.calibration import Calibration
    from ichpipe.scoring.pooling import StudyScore

_BATCH = 32  # slices in one pass of the network


@dataclass(frozen=True)
class SeriesPrediction:
    """Probabilities of one series of n slices, 0 to 1; columns in the order of ``classes``."""

    slices: NDArray[np.float64]  # (n, 6)
    study: NDArray[np.float64]  # (6,), pooled over the slices
    classes: tuple[str, ...] = CLASSES


@dataclass(frozen=True)
class Prediction:
    """Probabilities of all studies below some paths, as the tables that ``ichpipe predict`` writes."""

    slices: pd.DataFrame  # slices.csv: identifiers, slice_index, position_mm, six probabilities
    studies: pd.DataFrame  # studies.csv: identifiers, n_slices, six probabilities
    series: pd.DataFrame  # series.csv: every series, whether it was chosen, and why
    refused: pd.DataFrame  # refused.csv: studies that are not plain head CT, and why
    rejected: pd.DataFrame  # rejected.csv: path, reason
    classes: tuple[str, ...] = CLASSES


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of n slices; row k of ``slices`` identifies row k of ``values``."""

    values: NDArray[np.float32]  # (n, d), no unit
    slices: pd.DataFrame  # (n rows): patient_id, study_uid, series_uid, sop_uid, slice_index, position_mm
    rejected: pd.DataFrame  # path, reason


class Model:
    """A trained model on a device, as `load_model` returns it."""

    def __init__(
        self,
        folder: Path,
        network: EndToEnd | Ensemble | SliceCnn,
        device: torch.device,
        calibration: Calibration | None,
    ) -> None:
        self.folder, self.device, self.calibration = folder, device, calibration
        self.spacing_mm = spacing_of(folder)  # slice distance of the training data, mm
        self._network = network.to(device).eval()
        self._cnn = network.cnn if isinstance(network, EndToEnd | Ensemble) else network

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the six classes, in the order of every column of probabilities."""
        return tuple(self._cnn.spec.classes)

    @property
    def embedding_dim(self) -> int:
        """Number d of features of a slice's embedding."""
        return self._cnn.embedding_dim

    @property
    def size_px(self) -> int:
        """Side of the square to which slices are resized, pixels."""
        return self._cnn.spec.size_px

    def embed(self, images: Volume | ArrayLike, *, pixel_mm: tuple[float, float] | None = None) -> NDArray[np.float32]:
        """Compute the slice CNN's embeddings of one series.

        Parameters
        ----------
        images : Volume or array_like of shape (n, rows, columns)
            Hounsfield units of any real type. Slices are framed (docs/data.md, Framing) and windowed as in training.
        pixel_mm : tuple of two floats, optional
            Distance of the rows and of the columns of an array, mm; a Volume has its own. A model of heads at one
            scale (`prepare.crop: head`) needs it; without it the whole image is fitted.

        Returns
        -------
        ndarray of float32, shape (n, d)
            One embedding a slice, no unit.

        Raises
        ------
        DataError
            The array has another shape, no slice, or a value that is not finite.
        WeightsError
            The model is an ensemble.

        """
        cnn, hu = self._require_single(), _require_hu(images)
        position_mm = images.position_mm if isinstance(images, Volume) else np.arange(len(hu), dtype=np.float64)
        framed = self._frame(hu, images, pixel_mm, neighbour_rows(position_mm, cnn.spec.neighbours))
        return embed_hu(cnn, framed, self.device, _BATCH).numpy()

    def embed_folder(self, paths: Paths, *, all_series: bool = False, workers: int = 1) -> Embeddings:
        """Embed the slices below some paths.

        Parameters
        ----------
        paths : path or sequence of paths
            Folder, zip archive or file, or several of them.
        all_series : bool
            Embed every series of a study instead of the one chosen by the rules of ``ichpipe predict``.
        workers : int
            Processes that read headers, at least 1.

        Returns
        -------
        Embeddings
            Slices that can't be decoded are in ``rejected``.

        Raises
        ------
        MissingFileError
            A path does not exist.
        DataError
            No slice is usable.
        WeightsError
            The model is an ensemble.

        """
        cnn = self._require_single()
        scan = find_slices(paths, all_series=all_series, workers=workers)
        paths, rows = scan.slices["path"].tolist(), index_neighbours(scan.slices, self._cnn.spec.neighbours)
        files, parts, undecodable = slice_files(paths, rows), [], []
        starts = range(0, len(files), _BATCH)
        for start in track(starts, "embed", len(starts)):
            hu, bad = load_readable(files[start : start + _BATCH], self._cnn.spec.framing)
            undecodable += bad
            if len(hu):
                parts.append(embed_hu(cnn, hu, self.device, _BATCH))
        rejected = pd.DataFrame(undecodable, columns=["path", "reason"])
        slices = scan.slices[~scan.slices["path"].isin(rejected["path"])]
        columns = [*IDENTIFIERS, "sop_uid", "slice_index", "position_mm"]
        values = torch.cat([torch.empty((0, self.embedding_dim)), *parts])
        rejected = pd.concat([scan.rejected, rejected], ignore_index=True)
        return Embeddings(values.numpy(), slices[columns].reset_index(drop=True), rejected)

    def predict(
        self,
        images: Volume | ArrayLike,
        position_mm: ArrayLike | None = None,
        *,
        spacing_mm: float | None = None,
        pixel_mm: tuple[float, float] | None = None,
        study_score: StudyScore = "max",
    ) -> SeriesPrediction:
        """Predict one whole series. Whether it shows a head is not checked.

        Parameters
        ----------
        images : Volume or array_like of shape (n, rows, columns)
            Hounsfield units, slices from feet to head.
        position_mm : array_like of shape (n,), optional
            Position of each slice along the slice normal, mm, not falling. An array needs this or ``spacing_mm``,
            because the sequence model sees a thin series as several interleaved ones.
        spacing_mm : float, optional
            Distance of neighbouring slices, mm, above 0.
        pixel_mm : tuple of two floats, optional
            Distance of the rows and of the columns of an array, mm, as for `embed`.
        study_score : {"max", "mean", "mean-of-top-3", "noisy-or"}
            How slices are pooled to a study (``max``: Nguyen et al. 2020).

        Returns
        -------
        SeriesPrediction
            Calibrated probabilities where the model has a calibration.

        Raises
        ------
        DataError
            Another shape, a value that is not finite, falling positions, or overflow in half precision.
        WeightsError
            The model is a slice CNN alone.

        """
        model = self._require_end_to_end()
        hu = _require_hu(images)
        positions = images.position_mm if isinstance(images, Volume) else _positions(len(hu), position_mm, spacing_mm)
        stride = stride_of(positions, self.spacing_mm)
        framed = self._frame(hu, images, pixel_mm, neighbour_rows(positions, self._cnn.spec.neighbours, stride))
        both = classify_hu(model, framed, positions.tolist(), self.device, _BATCH, stride)
        values, of_cnn = (to_probabilities(logits) for logits in both)
        if not np.isfinite(values).all():  # fp16 can overflow
            raise DataError("a prediction is not a number: half precision overflowed; load_model(folder, gpu='cpu')")
        if self.calibration:
            values = self.calibration.apply(values, of_cnn)
        study = pool(smooth_thin(values, positions), np.zeros(len(values), dtype=np.intp), 1, study_score)[0]
        return SeriesPrediction(values, study, self.classes)

    def predict_folder(
        self,
        paths: Paths,
        *,
        all_series: bool = False,
        force: bool = False,
        workers: int = 1,
        study_score: StudyScore = "max",
    ) -> Prediction:
        """Predict the studies below some paths, as ``ichpipe predict`` does (docs/predict.md).

        Parameters
        ----------
        paths : path or sequence of paths
            Folder, zip archive or file, or several of them.
        all_series : bool
            Predict every series of a study instead of one chosen by rule.
        force : bool
            Also predict series that are not plain head CT.
        workers : int
            Processes that read headers, at least 1.
        study_score : {"max", "mean", "mean-of-top-3", "noisy-or"}
            How slices are pooled to a study.

        Returns
        -------
        Prediction
            Unless ``force``, studies that are not plain head CT are in ``refused``; unusable files are in ``rejected``.

        Raises
        ------
        MissingFileError
            A path does not exist.
        DataError
            Nothing is left to predict.
        WeightsError
            The model is a slice CNN alone.

        """
        model = self._require_end_to_end()
        inputs = collect_inputs(listed(paths), SelectionParams(), workers, one_per_study=not all_series, force=force)
        slices, bad = predict_slices(model, inputs.slices, self.device, self.spacing_mm, self.calibration)
        rejected = pd.concat([inputs.rejected, bad], ignore_index=True)[["path", "reason"]]
        if slices.empty:
            reasons = inputs.refused["reason"].iloc[:1].to_list() or rejected["reason"].iloc[-1:].to_list()
            raise DataError("; ".join([f"nothing to predict: {len(rejected)} files can't be used", *reasons]))
        studies = score_series(slices, study_score)
        return Prediction(slices[SLICE_COLUMNS], studies, inputs.series, inputs.refused, rejected, self.classes)

    def _require_end_to_end(self) -> EndToEnd | Ensemble:
        if isinstance(self._network, EndToEnd | Ensemble):
            return self._network
        raise WeightsError(
            f"{self.folder / MODEL_FILE} is a slice CNN, which embeds; to predict, load a fine-tuned model "
            "(artifacts/finetuned)"
        )

    def _require_single(self) -> SliceCnn:
        if not isinstance(self._network, Ensemble):
            return self._cnn
        raise WeightsError(
            f"{self.folder / MODEL_FILE} is an ensemble, which has no single embedding; to embed, load a slice CNN "
            "(artifacts/slice-cnn) or a fine-tuned model"
        )

    def _frame(
        self,
        hu: NDArray[np.int16],
        images: Volume | ArrayLike,
        pixel_mm: tuple[float, float] | None,
        rows: NDArray[np.intp],
    ) -> torch.Tensor:
        """Fit each slice of ``hu`` with its neighbours' ``rows`` to the network: (n, slices, size, size)."""
        if isinstance(images, Volume):
            pixel_mm = None if np.isnan(images.pixel_mm).any() else images.pixel_mm
        least, most = SPACINGS_MM
        if pixel_mm is not None and not all(least <= distance <= most for distance in pixel_mm):
            raise DataError(f"pixel_mm must be two distances of {least} to {most} mm, not {pixel_mm}")
        framing = self._cnn.spec.framing
        return torch.stack([frame([(hu[row], pixel_mm) for row in beside], framing) for beside in rows.tolist()])


def load_model(folder: str | Path, *, gpu: str = "auto", calibrated: bool = True) -> Model:
    """Load a model folder of ``finetune``, ``ensemble``, ``export`` or ``fit-slices``; nothing is unpickled.

    Parameters
    ----------
    folder : path
        Folder with ``model.safetensors``.
    gpu : str
        ``auto``, ``cpu`` or the number of a GPU.
    calibrated : bool
        Apply the calibration beside the model, if there is one (docs/predict.md).

    Returns
    -------
    Model
        The model on its device, ready to predict or to embed.

    Raises
    ------
    MissingFileError
        The folder holds no model.
    WeightsError
        The model or its calibration is damaged or of another kind.
    IchpipeError
        There is no such GPU.

    """
    folder = Path(folder)
    device = choose_device(gpu)
    kind = read_header(folder, "name a model folder (artifacts/finetuned)").kind
    if kind == "sequence":
        raise WeightsError(
            f"{folder / MODEL_FILE} is a sequence model, which reads embeddings; load the fine-tuned model or the "
            "slice CNN"
        )
    network = load_slice_cnn(folder) if kind == "slice-cnn" else load_predictor(folder)
    return Model(folder, network, device, read_calibration(folder) if calibrated and kind != "slice-cnn" else None)


@dataclass(frozen=True)
class SeriesEmbeddings:
    """Cached embeddings of one series of n slices, ordered along the slice normal. The arrays are read-only."""

    series_uid: str
    sop_uids: tuple[str, ...]  # of each slice
    embedding: NDArray[np.float32]  # (n, d), kept in the store as float16
    logit: NDArray[np.float32]  # (n, 6), the slice CNN's own scores before the sigmoid


class Store:
    """The embeddings of one network, read-only, as `open_store` returns them."""

    def __init__(self, rows: EmbeddingStore) -> None:
        self._rows = rows

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self._rows)

    @property
    def series_uids(self) -> list[str]:
        """SeriesInstanceUID of every series."""
        return self._rows.series_uids

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the columns of ``logit``."""
        return self._rows.classes

    @property
    def embedding_dim(self) -> int:
        """Number d of features of a slice."""
        return self._rows.embedding_dim

    def series(self, series_uid: str) -> SeriesEmbeddings:
        """Read one series.

        Parameters
        ----------
        series_uid : str
            SeriesInstanceUID (0020,000E).

        Returns
        -------
        SeriesEmbeddings

        Raises
        ------
        StoreUnusableError
            The UID is unknown, or a chunk is damaged.

        """
        with _store_errors():
            rows = self._rows.series(series_uid)
        embedding = rows.embedding.astype(np.float32)
        embedding.flags.writeable = False
        return SeriesEmbeddings(series_uid, rows.sop_uids, embedding, rows.logit)

    def __iter__(self) -> Iterator[SeriesEmbeddings]:
        """Read and yield the series one by one."""
        return map(self.series, self.series_uids)


def open_store(address: str | Path, model: str | Path | None = None) -> Store:
    """Open an embedding store. Embeddings are read later, series by series.

    Parameters
    ----------
    address : str or path
        Folder, or fsspec address such as ``s3://…``.
    model : path, optional
        Folder of the slice CNN that computed the embeddings (``artifacts/slice-cnn``, or
        ``slice-cnn/folds/fold-F``). It may be left out if the store holds the embeddings of one network only.

    Returns
    -------
    Store

    Raises
    ------
    StoreUnusableError
        There is no store, its format is newer, it holds several networks and ``model`` is not given, or none of
        its embeddings are from ``model``.

    """
    identity = None
    if model is not None:
        header = read_header(Path(model), "name the folder of a slice CNN (artifacts/slice-cnn)")
        fold = header.made_from.get("excluded_fold")
        identity = GenerationSpec(Path(model), pd.DataFrame(), None if fold is None else int(fold)).identity()
    with _store_errors():
        return Store(EmbeddingStore(str(address), identity))


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except SeveralGenerationsError as error:
        raise StoreUnusableError(f"{error}: open_store(address, model='artifacts/slice-cnn')") from error
    except StoreError as error:
        raise StoreUnusableError(str(error)) from error


def _require_hu(images: Volume | ArrayLike) -> NDArray[np.int16]:
    hu = np.asarray(images.hu if isinstance(images, Volume) else images)
    if hu.ndim != 3 or not hu.size:
        raise DataError(f"HU must have the shape (slices, rows, columns) with at least one slice, found {hu.shape}")
    if hu.dtype.kind not in "iuf":
        raise DataError(f"HU must be whole or floating-point numbers, found {hu.dtype}")
    if hu.dtype.kind == "f" and not np.isfinite(hu).all():
        raise DataError(f"HU hold values that are not finite; set what lies outside the scan to {MIN_HU}")
    if hu.dtype != np.int16 or hu.min() < MIN_HU:
        hu = np.clip(np.rint(hu), MIN_HU, MAX_HU).astype(np.int16)
    return hu


def _positions(count: int, position_mm: ArrayLike | None, spacing_mm: float | None) -> NDArray[np.float64]:
    if spacing_mm is not None and position_mm is None:
        if not 0 < spacing_mm < np.inf:
            raise DataError(f"spacing_mm must be a distance above 0, found {spacing_mm}")
        return np.arange(count, dtype=np.float64) * spacing_mm
    if position_mm is None or spacing_mm is not None:
        raise DataError("say where the slices lie: position_mm, one number a slice, or spacing_mm, one for all")
    positions = np.asarray(position_mm, dtype=np.float64)
    if positions.shape != (count,):
        raise DataError(f"position_mm must hold one number for each of {count} slices, found shape {positions.shape}")
    if not np.isfinite(positions).all() or (np.diff(positions) < 0).any():
        raise DataError(
            "position_mm must be finite and must not fall: slices go from feet to head; "
            "order = np.argsort(position_mm), then hu[order] and position_mm[order]"
        )
    return positions
