"""Calibrates probabilities: one monotone map a class, fitted on the validation split; before it, a blend.

The blend is the weighted mean of two logits, the model's and its slice CNN's own. The weight is chosen a class.

Temperature scaling (Guo et al., ICML 2017, arXiv 1706.04599) divides the logit of a class by one number above 0; no
ranking and no AUC changes. Isotonic regression (Zadrozny & Elkan, KDD 2002) fits a rising step curve. It corrects more,
needs more cases, and ties what lies on one step. A small JSON beside the model holds the maps; nothing is unpickled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit, xlogy

from ichpipe.common.artifacts import CALIBRATION_FILE, MODEL_FILE
from ichpipe.common.classes import CLASSES, METRIC_CLIP
from ichpipe.common.errors import DataError, WeightsError
from ichpipe.common.files import digest_of_file, read_json, write_json
from ichpipe.params.schema import Probability

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Method = Literal["none", "temperature", "isotonic"]

MIN_SLICES: Final = 10  # positive, and negative, validation slices of a class that gets a map
# Patients with positive slices of a class that gets a map; with fewer, the map describes these patients. With two to
# four in a fold of CT-ICH, fitting made the held-out log loss worse in nine of ten tries (docs/predict.md).
MIN_PATIENTS: Final = {"temperature": 5, "isotonic": 20}
SHARES: Final = tuple(step / 20 for step in range(20, -1, -1))  # of the model in a blend; of equal ones the first


NO_SLICE_COLUMNS: Final = (
    "whose own probabilities predictions.parquet lacks (columns slice_…, an older ichpipe wrote it); run the command "
    "that made the model again: ichpipe finetune or ichpipe ensemble"
)


class Curve(BaseModel):
    """A rising curve through points, straight between them and level outside."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    probability: tuple[float, ...]  # as the network gives it, rising
    calibrated: tuple[float, ...]  # same length, never falling, above 0 and below 1


class Calibration(BaseModel):
    """One map a class, and what it was fitted on. A class without a map stays as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method
    model_sha256: str  # of the model file whose probabilities it maps
    patients: int = 0  # of the validation split, whom nothing else was scored on
    slices: int = 0
    temperature: dict[str, float] = Field(default_factory=dict)  # above 1: the network was too sure of itself
    isotonic: dict[str, Curve] = Field(default_factory=dict)
    as_they_are: dict[str, str] = Field(default_factory=dict)  # classes without a map, and why
    blend: dict[str, Probability] = Field(default_factory=dict)  # share of the model; the rest is its slice CNN's

    @property
    def mapped(self) -> tuple[str, ...]:
        """The classes that have a map."""
        return tuple(name for name in CLASSES if name in self.temperature or name in self.isotonic)

    @property
    def blended(self) -> dict[str, float]:
        """The classes to which the slice CNN's own probabilities contribute, with the share of the model."""
        return {name: self.blend[name] for name in CLASSES if self.blend.get(name, 1.0) < 1.0}

    def apply(self, probabilities: Floats, slice_probabilities: Floats | None = None) -> Floats:
        """Blend the model's probabilities (n, 6) with its slice CNN's own (n, 6), and calibrate the result.

        A class without a blend and without a map stays bit-identical. Without a blend ``slice_probabilities`` are not
        needed.

        ``any`` may be below a subtype, as without calibration. Raised to the largest subtype, ``any`` would lose its
        own calibration: the largest of several noisy values is too high.
        """
        result = np.array(probabilities, dtype=np.float64)
        if self.blend:
            if slice_probabilities is None:
                raise DataError(f"{CALIBRATION_FILE} blends with the slice CNN, {NO_SLICE_COLUMNS}")
            result = mix(result, slice_probabilities, self.blend)
        for column, name in enumerate(CLASSES):
            if name in self.temperature:
                result[:, column] = _cool(result[:, column], self.temperature[name])
            elif name in self.isotonic:
                curve = self.isotonic[name]
                result[:, column] = np.interp(result[:, column], curve.probability, curve.calibrated)
        return result


def fit_calibration(
    labels: Floats,
    probabilities: Floats,
    patients: NDArray[np.object_],
    method: Method,
    model_sha256: str,
    slice_probabilities: Floats | None = None,
) -> Calibration:
    """Fit one map a class to labels (n, 6; 0 or 1) and probabilities (n, 6) of the validation split.

    ``patients`` (n,) are identifiers. With ``slice_probabilities`` (n, 6), the slice CNN's own, a blend is chosen
    before the map. Classes below MIN_SLICES or MIN_PATIENTS get no map, and no blend.
    """
    facts = {"model_sha256": model_sha256, "patients": len(set(patients)), "slices": len(labels)}
    blend: dict[str, float] = {}
    if slice_probabilities is not None:
        for column, name in enumerate(CLASSES):
            if not _too_few(labels[:, column], patients, MIN_PATIENTS["temperature"]):
                own, of_cnn = probabilities[:, column], slice_probabilities[:, column]
                losses = [_log_loss(labels[:, column], _mix(own, of_cnn, share)) for share in SHARES]
                blend[name] = SHARES[int(np.argmin(losses))]
        probabilities = mix(probabilities, slice_probabilities, blend)
    if method == "none":
        return Calibration(method=method, **facts, blend=blend)
    fit = {"temperature": _fit_temperature, "isotonic": _fit_isotonic}[method]
    maps, unmapped = {}, {}
    for name, label, values in zip(CLASSES, labels.T, probabilities.T, strict=True):
        if reason := _too_few(label, patients, MIN_PATIENTS[method]):
            unmapped[name] = reason
        else:
            maps[name] = fit(label, values)
    return Calibration(method=method, **facts, **{method: maps}, as_they_are=unmapped, blend=blend)


def _too_few(label: Floats, patients: NDArray[np.object_], fewest: int) -> str:
    """Say what a class lacks of slices or patients to fit a number to; an empty text if nothing."""
    positive = label == 1
    few = min(int(positive.sum()), int((~positive).sum()))
    count = len(set(patients[positive]))
    if few < MIN_SLICES:
        kind = "positive" if positive.sum() == few else "negative"
        return f"{few} {kind} slices, fewer than {MIN_SLICES}"
    if count < fewest:
        return f"positive slices of {count} patient{'s' * (count != 1)}, fewer than {fewest}"
    return ""


def mix(probabilities: Floats, slice_probabilities: Floats, shares: Mapping[str, float]) -> Floats:
    """Blend the probabilities of two models (n, 6) by their logits; ``shares`` of the first, by class, else 1.

    A share of 1 gives the first model's probabilities bit by bit, a share of 0 the second's.
    """
    result = np.array(probabilities, dtype=np.float64)
    for column, name in enumerate(CLASSES):
        if name in shares:
            result[:, column] = _mix(result[:, column], slice_probabilities[:, column], shares[name])
    return result


def _mix(first: Floats, second: Floats, share: float) -> Floats:
    if share in (0.0, 1.0):
        return first if share else second
    pair = [logit(np.clip(values, METRIC_CLIP, 1.0 - METRIC_CLIP)) for values in (first, second)]
    mixed: Floats = np.clip(expit(share * pair[0] + (1.0 - share) * pair[1]), METRIC_CLIP, 1.0 - METRIC_CLIP)
    return mixed


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Write ``calibration.json`` beside the model; without a blend, an older ichpipe reads it too."""
    exclude = set() if calibration.blend else {"blend"}
    write_json(folder / CALIBRATION_FILE, calibration.model_dump(mode="json", exclude=exclude))


def read_calibration(folder: Path) -> Calibration | None:
    """Read ``calibration.json`` beside the model; None without one. WeightsError if damaged or of another model."""
    path = folder / CALIBRATION_FILE
    if not path.exists():
        return None
    remedy = "run: ichpipe evaluate, or leave it out with --uncalibrated"
    try:
        calibration = Calibration.model_validate(read_json(path))
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"])) or "its form"
        raise WeightsError(f"{path} is no calibration ({key}: {error.errors()[0]['msg']}); {remedy}") from error
    if calibration.model_sha256 != digest_of_file(folder / MODEL_FILE):
        raise WeightsError(f"{path} was fitted to another model than {folder / MODEL_FILE}; {remedy}")
    return calibration


def _fit_temperature(labels: Floats, probabilities: Floats) -> float:
    """Return the temperature of least log loss, to six digits: the same on every machine."""

    def loss(log_temperature: float) -> float:
        return _log_loss(labels, _cool(probabilities, float(np.exp(log_temperature))))

    best = minimize_scalar(loss, bounds=np.log((0.05, 20.0)), method="bounded", options={"xatol": 1e-8})
    return float(f"{np.exp(best.x):.6g}")


def _log_loss(labels: Floats, probabilities: Floats) -> float:
    inside = np.clip(probabilities, METRIC_CLIP, 1.0 - METRIC_CLIP)
    return float(-(xlogy(labels, inside) + xlogy(1.0 - labels, 1.0 - inside)).mean())


def _cool(probabilities: Floats, temperature: float) -> Floats:
    clipped = np.clip(probabilities, METRIC_CLIP, 1.0 - METRIC_CLIP)
    cooled: Floats = np.clip(expit(logit(clipped) / temperature), METRIC_CLIP, 1.0 - METRIC_CLIP)
    return cooled


def _fit_isotonic(labels: Floats, probabilities: Floats) -> Curve:
    """Return the isotonic curve, kept from 1 / (n + 2) to (n + 1) / (n + 2) by Laplace's rule of succession.

    The curve itself ends at 0 and 1, where one error costs infinite loss.
    """
    from sklearn.isotonic import IsotonicRegression  # noqa: PLC0415 - takes a second, and only fitting needs it

    fitted = IsotonicRegression().fit(probabilities, labels)
    least = 1.0 / (len(labels) + 2)
    calibrated = np.clip(fitted.y_thresholds_, least, 1.0 - least)
    return Curve(probability=tuple(fitted.X_thresholds_.tolist()), calibrated=tuple(calibrated.tolist()))
