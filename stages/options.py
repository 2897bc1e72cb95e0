"""Options that several commands share, and the settings that stand before every command."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from ichpipe.common.artifacts import Artifacts
    from ichpipe.params.schema import Params


@dataclass(frozen=True)
class Settings:
    """The options that stand before the command."""

    params_file: Path
    params_named: bool
    overrides: tuple[str, ...]
    artifacts_root: Path

    def params(self) -> Params:
        """Read the parameters; only now, since validating them imports pydantic."""
        from ichpipe.params.schema import load_params

        return load_params(self.params_file, self.overrides, must_exist=self.params_named)

    def lock_stage(self, stage: str, *outputs: str) -> AbstractContextManager[None]:
        """Keep other processes from the same stage of this run; ``outputs`` are its files below the artifacts."""
        from ichpipe.common.files import hold_lock

        root = self.artifacts_root
        return hold_lock(root / ".locks", stage, [root / output for output in outputs], root / ".resume")

    def artifacts(self) -> Artifacts:
        """Return where the run's files lie."""
        from ichpipe.common.artifacts import Artifacts

        return Artifacts(self.artifacts_root)


def find_params(path: Path) -> Path:
    """Return the file of parameters that ``--params`` names: a user's own, or one that installs with the package.

    Raises click.BadParameter for a name that is neither.
    """
    if path.exists() or path.suffix or len(path.parts) > 1:
        return path
    packaged = Path(str(files("ichpipe.recipes")))
    if (packaged / f"{path}.yaml").is_file():
        return packaged / f"{path}.yaml"
    names = ", ".join(sorted(file.stem for file in packaged.glob("*.yaml")))
    raise click.BadParameter(f"no file {path}; files that are installed go by these names: {names}")


class Verdict(NamedTuple):
    """The result of a command that judges: the text to print, and whether all is well (exit code 0, else 1)."""

    text: str
    sound: bool


FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
PROBABILITY = click.FloatRange(0, 1)

gpu_option = click.option(
    "--gpu", default="auto", envvar="ICHPIPE_GPU", show_default=True, metavar="auto|cpu|N[,N]", help="Where to compute."
)


def _make_workers_option(*variables: str) -> Callable[[Any], Any]:
    return click.option(
        "--workers",
        type=click.IntRange(min=0),
        default=0,
        envvar=variables,
        show_default=True,
        help="Processes that read and decode files; 0: this process reads them.",
    )


workers_option = _make_workers_option("ICHPIPE_WORKERS")
# The older name of the variable; in `extract` it sets --loaders.
training_workers_option = _make_workers_option("ICHPIPE_WORKERS", "ICHPIPE_LOADERS")
pixels_option = click.option(
    "--pixel-cache",
    type=FOLDER,
    envvar="ICHPIPE_PIXEL_CACHE",
    help="Folder for decoded slices; pays where files are compressed (JPEG, JPEG 2000).",
)


def model_folder(params: Params, artifacts: Artifacts) -> Path:
    """Return the folder of the run's model that predicts: fine-tuned, or the ensemble where ``predict.ensemble``."""
    from ichpipe.common.artifacts import MODEL_FILE
    from ichpipe.common.files import require_file

    if not params.predict.ensemble:
        return artifacts.finetuned
    remedy = "run: ichpipe ensemble, or set predict.ensemble to false"
    return require_file(artifacts.ensemble / MODEL_FILE, remedy).parent


def lock_folder(folder: Path | None, command: str) -> AbstractContextManager[None]:
    """Keep other processes of the same command out of a folder that the user named; None locks nothing."""
    if folder is None:
        return nullcontext()
    from ichpipe.common.files import hold_lock

    return hold_lock(folder, command)


def complete_arm(context: click.Context, _option: click.Parameter, start: str) -> list[CompletionItem]:
    """Complete the name of an arm of the parameter file."""
    return [CompletionItem(name) for name in _arms(context) if name.startswith(start)]


def complete_key(context: click.Context, _option: click.Parameter, start: str) -> list[CompletionItem]:
    """Complete ``SECTION.KEY=`` of ``--set``, with the arms of the parameter file."""
    from ichpipe.params.schema import known_keys

    arms = _arms(context)
    keys = [key.replace(".ARM", f".{arm}") for key in known_keys() for arm in (arms if ".ARM" in key else ("",))]
    return [CompletionItem(f"{key}=") for key in keys if key.startswith(start)]


def _arms(context: click.Context) -> list[str]:
    from ichpipe.common.errors import IchpipeError
    from ichpipe.params.schema import load_params

    params_file = context.find_root().params.get("params_file")
    try:
        return list(load_params(find_params(params_file) if params_file else Path("params.yaml")).sequence)
    except (IchpipeError, click.BadParameter):
        return []  # a shell that completes shows no messages; the command itself reports the error
