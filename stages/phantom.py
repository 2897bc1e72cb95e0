"""``ichpipe phantom``: write the synthetic data set of the demo."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import click

from ichpipe.stages.options import FOLDER, lock_folder

if TYPE_CHECKING:
    from pathlib import Path

    from ichpipe.params.schema import PhantomParams
    from ichpipe.stages.options import Settings


@click.command("phantom")
@click.option("--out", type=FOLDER, required=True, help="Folder to write to.")
@click.option("--studies", type=click.IntRange(min=1), help="Number of studies [params: phantom.studies].")
@click.option("--size", type=click.IntRange(32, 1024), help="Pixels per side [params: phantom.size_px].")
@click.option("--seed", type=click.IntRange(min=0), help="Seed [params: phantom.seed].")
@click.pass_obj
def command(settings: Settings, out: Path, studies: int | None, size: int | None, seed: int | None) -> None:
    """Make a synthetic head-CT data set: DICOM series and a label table in the RSNA 2019 layout.

    \b
    Example:
      ichpipe phantom --out data/phantom --studies 40 --size 128
    """
    given = {"studies": studies, "size_px": size, "seed": seed}
    changes = {key: value for key, value in given.items() if value is not None}
    params = settings.params().phantom.model_copy(update=changes)
    with lock_folder(out, "phantom"):
        run(params, out)


def run(params: PhantomParams, out: Path) -> None:
    """Write ``out/dicom/*.dcm`` and ``out/stage_2_train.csv`` as ``params`` say."""
    from ichpipe.phantom import write_dataset

    made = write_dataset(out, params.studies, params.size_px, params.seed)
    logging.getLogger("ichpipe").info(
        "phantom: %d studies of %d patients, %d slices, %d with haemorrhage, %d mimics",
        made.n_studies, made.n_patients, made.n_slices, made.n_positive["any"], made.n_mimics,
    )  # fmt: skip
