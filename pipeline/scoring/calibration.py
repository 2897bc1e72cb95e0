"""Probabilities taken nearer to their word: one monotone map a class, fitted on the validation split.

Temperature scaling (Guo et al., ICML 2017, arXiv 1706.04599) divides the logit of a class by one number above 0; it
changes no ranking, so no AUC. Isotonic regression (Zadrozny & Elkan, KDD 2002) fits a rising step curve; it can mend
more, needs more cases, and ties what lies on one step. Maps are kept as a small JSON beside the model: `predict` needs
nothing else, and nothing is unpickled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit, xlogy

from ichpipe.common.artifacts import CALIBRATION_FILE, MODEL_FILE
from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import WeightsError
from ichpipe.common.files import digest_of_file, read_json, write_json

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Method = Literal["none", "temperature", "isotonic"]

MIN_SLICES: Final = 10
"""A class with fewer positive or negative validation slices than this stays as it is."""

MIN_PATIENTS: Final = {"temperature": 5, "isotonic": 20}
"""… or whose positive ones come from fewer patients: the map would describe them, not the class.

On 55 patients of CT-ICH, where each fold validates on two to four positive ones, fitting all the same made the
held-out log loss worse in nine of ten tries (docs/predict.md).
"""

RANGE: Final = (0.05, 20.0)
"""Temperatures looked at."""

_CLIP: Final = 1e-15  # as in the metric: the logit of 0 or 1 is not finite


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

    @property
    def mapped(self) -> tuple[str, ...]:
        """The classes that have a map."""
        return tuple(name for name in CLASSES if name in self.temperature or name in self.isotonic)

    def apply(self, probabilities: Floats) -> Floats:
        """Return the calibrated probabilities (n, 6); a class without a map comes back bit by bit as it was.

        ``any`` may come out below a subtype, as it may without: each class is calibrated for itself. To raise ``any``
        to its largest subtype would undo its own calibration, since the largest of several noisy values is too high.
        """
        result = np.array(probabilities, dtype=np.float64)
        for column, name in enumerate(CLASSES):
            if name in self.temperature:
                result[:, column] = _cooled(result[:, column], self.temperature[name])
            elif name in self.isotonic:
                curve = self.isotonic[name]
                result[:, column] = np.interp(result[:, column], curve.probability, curve.calibrated)
        return result


def fit_calibration(
    labels: Floats, probabilities: Floats, patients: NDArray[np.object_], method: Method, model_sha256: str
) -> Calibration:
    """Fit one map a class to labels (n, 6; 0 or 1) and probabilities (n, 6) of the validation split.

    ``patients`` (n,) are identifiers. A class with less than MIN_SLICES positive or negative slices, or with positive
    ones of less than MIN_PATIENTS patients, gets none.
    """
    facts = {"model_sha256": model_sha256, "patients": len(set(patients)), "slices": len(labels)}
    if method == "none":
        return Calibration(method=method, **facts)
    reasons = {
        name: _too_little(labels[:, column], patients, MIN_PATIENTS[method]) for column, name in enumerate(CLASSES)
    }
    fitted = {
        name: (labels[:, column], probabilities[:, column]) for column, name in enumerate(CLASSES) if not reasons[name]
    }
    maps = {"temperature": _temperature, "isotonic": _isotonic}[method]
    return Calibration(
        method=method,
        **facts,
        **{method: {name: maps(*pair) for name, pair in fitted.items()}},
        as_they_are={name: reason for name, reason in reasons.items() if reason},
    )


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Write ``calibration.json`` beside the model."""
    write_json(folder / CALIBRATION_FILE, calibration.model_dump(mode="json"))


def read_calibration(folder: Path) -> Calibration | None:
    """Read what lies beside the model; None where nothing does.

    Raises WeightsError for a file that is damaged or was fitted to another model.
    """
    path = folder / CALIBRATION_FILE
    if not path.exists():
        return None
    remedy = "run: ichpipe evaluate, or leave it out with --uncalibrated"
    try:
        found = Calibration.model_validate(read_json(path))
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"])) or "its form"
        raise WeightsError(f"{path} is no calibration ({place}: {error.errors()[0]['msg']}); {remedy}") from error
    if found.model_sha256 != digest_of_file(folder / MODEL_FILE):
        raise WeightsError(f"{path} was fitted to another model than {folder / MODEL_FILE}; {remedy}")
    return found


def _too_little(labels: Floats, patients: NDArray[np.object_], fewest: int) -> str:
    positive = labels == 1
    few = min(int(positive.sum()), int((~positive).sum()))
    if few < MIN_SLICES:
        kind = "positive" if positive.sum() == few else "negative"
        return f"{few} {kind} slices, fewer than {MIN_SLICES}"
    if (owners := len(set(patients[positive]))) < fewest:
        return f"positive slices of {owners} patient{'s' * (owners != 1)}, fewer than {fewest}"
    return ""


def _temperature(labels: Floats, probabilities: Floats) -> float:
    """Return the temperature of least log loss, to six digits: the same on every machine."""

    def loss(log_temperature: float) -> float:
        found = _cooled(probabilities, float(np.exp(log_temperature)))
        return float(-(xlogy(labels, found) + xlogy(1.0 - labels, 1.0 - found)).mean())

    best = minimize_scalar(loss, bounds=np.log(RANGE), method="bounded", options={"xatol": 1e-8})
    return float(f"{np.exp(best.x):.6g}")


def _cooled(probabilities: Floats, temperature: float) -> Floats:
    clipped = np.clip(probabilities, _CLIP, 1.0 - _CLIP)
    cooled: Floats = np.clip(expit(logit(clipped) / temperature), _CLIP, 1.0 - _CLIP)
    return cooled


def _isotonic(labels: Floats, probabilities: Floats) -> Curve:
    """Return the isotonic curve, kept from 1 / (n + 2) to (n + 1) / (n + 2).

    At its ends it would say 0 and 1, which a single error makes infinitely wrong. After n slices without an exception
    the rule of succession (Laplace) expects the next one to be one with 1 / (n + 2); more can't be known from n.
    """
    from sklearn.isotonic import IsotonicRegression  # noqa: PLC0415 - takes a second, and only fitting needs it

    fitted = IsotonicRegression().fit(probabilities, labels)
    least = 1.0 / (len(labels) + 2)
    calibrated = np.clip(fitted.y_thresholds_, least, 1.0 - least)
    return Curve(probability=tuple(fitted.X_thresholds_.tolist()), calibrated=tuple(calibrated.tolist()))
