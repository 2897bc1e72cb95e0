"""``ichpipe init``: write the recipe for a run outside the checkout."""

from __future__ import annotations

from importlib.resources import files
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

import click

from ichpipe.stages.options import FOLDER

if TYPE_CHECKING:
    from pathlib import Path

_CONFIG: Final = """[core]
    analytics = false
    check_update = false
    no_scm = true
[cache]
    type = "hardlink,copy"
"""


@click.command("init")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.pass_obj
def command(_settings: object, folder: Path) -> str:
    """Write the recipe of the demo to DIR: dvc.yaml, params.yaml, .dvcignore and a DVC folder.

    Then `dvc repro` in DIR makes a phantom and runs every step. With the keys `prepare.dicom_dir` and
    `prepare.labels` it reads your own files. A stage runs again when its files, its parameters or the version of
    ichpipe change.

    \b
    Example:
      ichpipe init run && cd run && dvc repro
    """
    return run(folder)


def run(folder: Path) -> str:
    """Write the files; nothing that is there is replaced. Returns what to type next."""
    from ichpipe.common.errors import DataError
    from ichpipe.common.files import write_text

    start = files("ichpipe.recipes") / "start"
    texts = {name: (start / name).read_text("utf-8") for name in ("dvc.yaml", "params.yaml")}
    texts[".dvcignore"] = (start / "dvcignore").read_text("utf-8")
    texts[".dvc/config"] = _CONFIG
    texts[".dvc/.gitignore"] = "/config.local\n/tmp\n/cache\n"
    texts |= {f".dvc/plots/{item.name}": item.read_text("utf-8") for item in (start / "plots").iterdir()}
    for name in texts:
        if (folder / name).exists():
            raise DataError(f"{folder / name} is there already and is not replaced; name another folder")
    for name, text in texts.items():
        write_text(folder / name, text)
    lines = [f"{folder} holds the recipe. Next:", f"  cd {folder}"]
    if find_spec("dvc") is None or find_spec("dask") is None:
        lines.append("  pip install 'ichpipe[all]'")
    return "\n".join([*lines, "  dvc repro"])
