"""``ichpipe phantom``: make the synthetic data set of the demo."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from ichpipe.params.schema import PhantomParams


def run(params: PhantomParams, out: Path) -> None:
    """Write ``out/dicom/*.dcm`` and ``out/stage_2_train.csv`` as ``params`` say."""
    from ichpipe.phantom import write_dataset

    made = write_dataset(out, params.studies, params.size_px, params.seed)
    logging.getLogger("ichpipe").info(
        "phantom: %d studies of %d patients, %d slices, %d with haemorrhage, %d mimics",
        made.n_studies, made.n_patients, made.n_slices, made.n_positive["any"], made.n_mimics,
    )  # fmt: skip
