"""The path of every file that a run writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MODEL_FILE = "model.safetensors"
RECORD_FILE = "record.json"
HISTORY_FILE = "history.json"
PREDICTIONS_FILE = "predictions.parquet"
FOLDS_FILE = "folds.json"
CALIBRATION_FILE = "calibration.json"


class Artifacts:
    """Paths below one artifacts folder (``artifacts/`` by default)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.index_dir = root / "index"  # slices.parquet, rejected.csv, summary.json
        self.index = self.index_dir / "slices.parquet"
        self.slice_cnn = root / "slice-cnn"
        # The slice CNNs that each left out one fold of the train patients, and folds.json. DVC wants the folder in
        # every run. Nothing in it depends on the time of day, since `extract` reads it.
        self.fold_cnns = self.slice_cnn / "folds"
        self.embeddings = root / "embeddings.zarr"
        self.arms = root / "sequence"  # a folder for each sequence model
        self.comparison = root / "compare"
        self.finetuned = root / "finetuned"
        self.ensemble = root / "ensemble"
        self.metrics = root / "metrics" / "evaluate.json"
        self.plots = root / "plots"  # JSON for DVC, and PNG
        self.predictions = root / "predictions"  # held-out predictions, a parquet file for each model

    def fold_cnn(self, fold: int) -> Path:
        """Return the folder of the slice CNN that was not trained on ``fold``."""
        return self.fold_cnns / f"fold-{fold}"

    def sequence(self, arm: str) -> Path:
        """Return the folder of one sequence model."""
        return self.arms / arm

    def resume(self, stage: str) -> Path:
        """Return the folder from which an interrupted stage resumes; no other stage reads it."""
        return self.root / ".resume" / stage
