"""What Python programs import from ``ichpipe``: models applied to arrays and folders, and the embedding store.

Every error that data or files can cause is an IchpipeError. Nothing here prints or writes.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from ichpipe.cache.errors import StoreError
from ichpipe.cache.reader import EmbeddingStore
from ichpipe.common.artifacts import MODEL_FILE
from ichpipe.common.classes import CLASSES
from ichpipe.common.device import choose_device
from ichpipe.common.errors import DataError, StoreUnusableError, WeightsError
from ichpipe.common.progress import track
from ichpipe.dicom.hounsfield import AIR_HU, MAX_HU
from ichpipe.features.embedder import classify_hu, embed_hu, to_probabilities
from ichpipe.features.generations import Cache
from ichpipe.images.slice_dataset import fit_to_size, load_readable
from ichpipe.index.thin_slices import smooth_thin, stride_of
from ichpipe.index.volume import Found, Volume, find_slices, listed
from ichpipe.inference.inputs import take_in
from ichpipe.inference.predictor import IDENTIFIERS, SLICE_COLUMNS, predict_slices, score_series
from ichpipe.models.end_to_end import EndToEnd
from ichpipe.models.header import read_header, spacing_of
from ichpipe.models.weights import load_end_to_end, load_slice_cnn
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

_BATCH = 32  # slices that are looked at together


@dataclass(frozen=True)
class SeriesPrediction:
    """Probabilities of one series of n slices, each from 0 to 1; columns in the order of ``classes``."""

    slices: NDArray[np.float64]  # (n, 6)
    study: NDArray[np.float64]  # (6,), pooled over the slices
    classes: tuple[str, ...] = CLASSES


@dataclass(frozen=True)
class Prediction:
    """Probabilities of all studies below some paths, as tables; each is what ``ichpipe predict`` writes."""

    slices: pd.DataFrame  # slices.csv: identifiers, slice_index, position_mm, six probabilities
    studies: pd.DataFrame  # studies.csv: identifiers, n_slices, six probabilities
    series: pd.DataFrame  # series.csv: every series, whether it was taken, and why
    refused: pd.DataFrame  # refused.csv: studies that are no head CT, and why
    rejected: pd.DataFrame  # rejected.csv: path, reason
    classes: tuple[str, ...] = CLASSES


@dataclass(frozen=True)
class Embeddings:
    """One row a slice: ``slices`` says which slice stands in the same row of ``values``."""

    values: NDArray[np.float32]  # (n, d), no unit
    slices: pd.DataFrame  # (n rows): patient_id, study_uid, series_uid, sop_uid, slice_index, position_mm
    rejected: pd.DataFrame  # path, reason


class Model:
    """A trained model on a device. Made by `load_model`."""

    def __init__(
        self, folder: Path, network: EndToEnd | SliceCnn, device: torch.device, calibration: Calibration | None
    ) -> None:
        self.folder, self.device, self.calibration = folder, device, calibration
        self.spacing_mm = spacing_of(folder)  # distance of the slices that it was trained on, mm
        network.to(device).eval()
        self._end_to_end = network if isinstance(network, EndToEnd) else None
        self._cnn = network.cnn if isinstance(network, EndToEnd) else network

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the six classes, in the order of every column of probabilities."""
        return tuple(self._cnn.spec.classes)

    @property
    def embedding_dim(self) -> int:
        """Number d of features that `embed` gives a slice."""
        return self._cnn.embedding_dim

    @property
    def size_px(self) -> int:
        """Side of the square to which slices are resized, pixels."""
        return self._cnn.spec.size_px

    def embed(self, images: Volume | ArrayLike) -> NDArray[np.float32]:
        """Return the slice CNN's embeddings (n, d), float32, of a series or of HU (n, rows, columns).

        HU may be of any real type; rows and columns as `Volume` has them. Padded with air to a square, resized and
        windowed as in training. Raises DataError for another shape, no slice, or a value that is not finite.
        """
        return embed_hu(self._cnn, self._images(images), self.device, _BATCH).numpy()

    def embed_folder(self, paths: Paths, *, all_series: bool = False, workers: int = 1) -> Embeddings:
        """Embed the slices below ``paths`` (folder, zip, file, or several), one series a study or all of them.

        Slices that can't be decoded are in ``rejected``. Raises as `find_slices` does.
        """
        found = find_slices(paths, all_series=all_series, workers=workers)
        paths_, parts, bad = found.slices["path"].tolist(), [], []
        starts = range(0, len(paths_), _BATCH)
        for start in track(starts, "embed", len(starts)):
            hu, unreadable = load_readable(paths_[start : start + _BATCH], self.size_px)
            bad += unreadable
            if len(hu):
                parts.append(embed_hu(self._cnn, hu, self.device, _BATCH))
        rows = found.slices[~found.slices["path"].isin([path for path, _ in bad])]
        columns = [*IDENTIFIERS, "sop_uid", "slice_index", "position_mm"]
        values = torch.cat(parts) if parts else torch.empty((0, self.embedding_dim))
        return Embeddings(values.numpy(), rows[columns].reset_index(drop=True), _with(found, bad))

    def predict(
        self,
        images: Volume | ArrayLike,
        position_mm: ArrayLike | None = None,
        *,
        spacing_mm: float | None = None,
        study_score: StudyScore = "max",
    ) -> SeriesPrediction:
        """Predict one whole series: a `Volume`, or HU (n, rows, columns) with its slices from feet to head.

        An array needs ``position_mm`` (n,), not falling, or ``spacing_mm``, the one distance of its slices: a model
        trained on slices 5 mm apart is shown thin ones as several interleaved series. ``study_score`` pools slices to a
        study (``max``: Nguyen et al. 2020). Whether what comes is a head is not looked at.

        Raises DataError for another shape, a value that is not finite, or places that fall; WeightsError if the model
        is a slice CNN alone.
        """
        model = self._whole()
        hu = self._images(images)
        places = images.position_mm if isinstance(images, Volume) else _places(len(hu), position_mm, spacing_mm)
        stride = stride_of(places, self.spacing_mm)
        logits = classify_hu(model, hu, places.tolist(), self.device, _BATCH, stride)
        values = to_probabilities(logits)
        if not np.isfinite(values).all():  # fp16 can overflow
            raise DataError("a prediction is not a number: half precision overflowed; load_model(folder, gpu='cpu')")
        if self.calibration:
            values = self.calibration.apply(values)
        smooth = smooth_thin(values, places)
        study = pool(smooth, np.zeros(len(values), dtype=np.intp), 1, study_score)[0]
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
        """Predict what lies below ``paths`` (folder, zip, file, or several), one series a study or all of them.

        The same as ``ichpipe predict`` (docs/predict.md): what is no head CT is in ``refused`` unless ``force``, files
        that can't be used are in ``rejected``. Raises MissingFileError for a path that is not there, DataError where
        nothing is left.
        """
        model = self._whole()
        found = take_in(listed(paths), SelectionParams(), workers, one_per_study=not all_series, force=force)
        slices, bad = predict_slices(model, found.slices, self.device, self.spacing_mm, self.calibration)
        rejected = pd.concat([found.rejected, bad], ignore_index=True)[["path", "reason"]]
        if slices.empty:
            why = found.refused["reason"].iloc[:1].to_list() or rejected["reason"].iloc[-1:].to_list()
            raise DataError(
                f"nothing to predict: {len(rejected)} files can't be used{''.join(f'; {one}' for one in why)}"
            )
        studies = score_series(slices, study_score)
        return Prediction(slices[SLICE_COLUMNS], studies, found.series, found.refused, rejected, self.classes)

    def _whole(self) -> EndToEnd:
        if self._end_to_end is None:
            raise WeightsError(
                f"{self.folder / MODEL_FILE} is a slice CNN, which embeds; to predict, load a fine-tuned model "
                "(artifacts/finetuned)"
            )
        return self._end_to_end

    def _images(self, images: Volume | ArrayLike) -> torch.Tensor:
        stack = _as_hu(images.hu if isinstance(images, Volume) else images)
        return torch.stack([fit_to_size(one, self.size_px) for one in stack])


def load_model(folder: str | Path, *, gpu: str = "auto", calibrated: bool = True) -> Model:
    """Load a model folder that ``finetune``, ``export`` or ``fit-slices`` has written; nothing is unpickled.

    ``gpu`` is ``auto``, ``cpu`` or a number. With ``calibrated`` probabilities are taken through the calibration beside
    the model, if there is one (docs/predict.md).

    Raises MissingFileError where there is no model, WeightsError where it or its calibration is damaged or of another
    kind, IchpipeError where there is no such GPU.
    """
    folder = Path(folder)
    device = choose_device(gpu)
    kind = read_header(folder, "name a model folder (artifacts/finetuned)").kind
    if kind == "sequence":
        raise WeightsError(
            f"{folder / MODEL_FILE} is a sequence model, which reads embeddings; load the fine-tuned model or the "
            "slice CNN"
        )
    network = load_slice_cnn(folder) if kind == "slice-cnn" else load_end_to_end(folder)
    return Model(folder, network, device, read_calibration(folder) if calibrated and kind == "end-to-end" else None)


@dataclass(frozen=True)
class SeriesEmbeddings:
    """The cached rows of one series of n slices, ordered along the slice normal. The arrays are read-only."""

    series_uid: str
    sop_uids: tuple[str, ...]  # of each slice
    embedding: NDArray[np.float32]  # (n, d), kept in the store as float16
    logit: NDArray[np.float32]  # (n, 6), the slice CNN's own scores before the sigmoid


class Store:
    """The embeddings of one network, read-only. Made by `open_store`."""

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
        """Return one series.

        Raises StoreUnusableError, an IchpipeError, for an unknown UID, or a chunk that is damaged.
        """
        with _store_errors():
            found = self._rows.series(series_uid)
        embedding = found.embedding.astype(np.float32)
        embedding.flags.writeable = False
        return SeriesEmbeddings(series_uid, found.sop_uids, embedding, found.logit)

    def __iter__(self) -> Iterator[SeriesEmbeddings]:
        """Yield every series, read when its turn comes."""
        return map(self.series, self.series_uids)


def open_store(address: str | Path, model: str | Path | None = None) -> Store:
    """Open an embedding store: a folder, or an fsspec address such as ``s3://…``. Nothing is loaded yet.

    A store may hold rows of several networks: ``model`` is the folder of the slice CNN whose plain rows are wanted
    (``artifacts/slice-cnn``, or ``slice-cnn/folds/fold-F``); without it there must be one alone.

    Raises StoreUnusableError, an IchpipeError: no store there, rows of several networks, none of this one's, a format
    that is newer.
    """
    identity = None if model is None else _identity_of(Path(model))
    with _store_errors():
        return Store(EmbeddingStore(str(address), identity))


def _identity_of(model: Path) -> dict[str, Any]:
    fold = read_header(model, "name the folder of a slice CNN (artifacts/slice-cnn)").made_from.get("excluded_fold")
    return Cache(model, pd.DataFrame(), None if fold is None else int(fold)).identity()


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        text = str(error)
        if "generations" in text:
            text = f"{text}: open_store(address, model='artifacts/slice-cnn')"
        raise StoreUnusableError(text) from error


def _as_hu(images: ArrayLike) -> NDArray[np.int16]:
    values = np.asarray(images)
    if values.ndim != 3 or not values.size:
        raise DataError(f"HU must have the shape (slices, rows, columns) with at least one slice, found {values.shape}")
    if values.dtype.kind not in "iuf":
        raise DataError(f"HU must be whole or floating-point numbers, found {values.dtype}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DataError(f"HU hold values that are not finite; set what lies outside the scan to {AIR_HU}")
    if values.dtype == np.int16 and values.min() >= AIR_HU:
        return values
    hu: NDArray[np.int16] = np.clip(np.rint(values), AIR_HU, MAX_HU).astype(np.int16)
    return hu


def _places(count: int, position_mm: ArrayLike | None, spacing_mm: float | None) -> NDArray[np.float64]:
    if (position_mm is None) == (spacing_mm is None):
        raise DataError("say where the slices lie: position_mm, one number a slice, or spacing_mm, one for all")
    if position_mm is None:
        assert spacing_mm is not None  # noqa: S101 - one of both, said above
        if not 0 < spacing_mm < np.inf:
            raise DataError(f"spacing_mm must be a distance above 0, found {spacing_mm}")
        return np.arange(count, dtype=np.float64) * spacing_mm
    places = np.asarray(position_mm, dtype=np.float64)
    if places.shape != (count,):
        raise DataError(f"position_mm must hold one number for each of {count} slices, found shape {places.shape}")
    if not np.isfinite(places).all() or (np.diff(places) < 0).any():
        raise DataError(
            "position_mm must be finite and must not fall: slices go from feet to head; "
            "order = np.argsort(position_mm), then hu[order] and position_mm[order]"
        )
    return places


def _with(found: Found, more: list[tuple[str, str]]) -> pd.DataFrame:
    return pd.concat([found.rejected, pd.DataFrame(more, columns=["path", "reason"])], ignore_index=True)
