"""Where each stage writes and the next one reads: one place for every path of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MODEL_FILE = "model.safetensors"
RECORD_FILE = "record.json"
HISTORY_FILE = "history.json"
PREDICTIONS_FILE = "predictions.parquet"
FOLDS_FILE = "folds.json"
CALIBRATION_FILE = "calibration.json"


@dataclass(frozen=True)
class Artifacts:
    """Paths below one artifacts folder (``artifacts/`` unless the user says otherwise)."""

    root: Path

    @property
    def index_dir(self) -> Path:
        """Folder of slices.parquet, rejected.csv and summary.json."""
        return self.root / "index"

    @property
    def index(self) -> Path:
        """One row a slice."""
        return self.index_dir / "slices.parquet"

    @property
    def slice_cnn(self) -> Path:
        """Folder of the slice CNN."""
        return self.root / "slice-cnn"

    @property
    def fold_cnns(self) -> Path:
        """Folder of the slice CNNs that each left out one fold of the train patients, and of folds.json.

        Always there, as DVC wants of an output; nothing in it depends on wall time, as `extract` wants of an input.
        """
        return self.slice_cnn / "folds"

    def fold_cnn(self, fold: int) -> Path:
        """Folder of the slice CNN that never saw fold number ``fold``."""
        return self.fold_cnns / f"fold-{fold}"

    @property
    def embeddings(self) -> Path:
        """The embedding store."""
        return self.root / "embeddings.zarr"

    @property
    def arms(self) -> Path:
        """Folder of all sequence models."""
        return self.root / "sequence"

    def sequence(self, arm: str) -> Path:
        """Folder of one sequence model."""
        return self.arms / arm

    @property
    def comparison(self) -> Path:
        """Folder of the table of arms."""
        return self.root / "compare"

    @property
    def finetuned(self) -> Path:
        """Folder of the end-to-end model."""
        return self.root / "finetuned"

    @property
    def metrics(self) -> Path:
        """Scores of all models on the held-out patients."""
        return self.root / "metrics" / "evaluate.json"

    @property
    def plots(self) -> Path:
        """Folder of plot data (JSON, for DVC) and pictures (PNG)."""
        return self.root / "plots"

    @property
    def predictions(self) -> Path:
        """Folder of held-out predictions, one parquet a model."""
        return self.root / "predictions"

    def resume(self, stage: str) -> Path:
        """What an interrupted stage left to go on from; never read by another stage."""
        return self.root / ".resume" / stage
