"""Options that several commands share, and what they make of the options before the command."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
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

    def alone(self, what: str, *outputs: str) -> AbstractContextManager[None]:
        """Hold the stage ``what`` of this run against other processes; its outputs are these below the artifacts."""
        from ichpipe.common.run_lock import hold_lock

        root = self.artifacts_root
        return hold_lock(root / ".locks", what, [root / output for output in outputs], root / ".resume")

    def artifacts(self) -> Artifacts:
        """Return where the run's files lie."""
        from ichpipe.common.artifacts import Artifacts

        return Artifacts(self.artifacts_root)


class Verdict(NamedTuple):
    """What a command that judges returns: text to print, and whether all is well (exit code 0, else 1)."""

    text: str
    sound: bool


gpu_option = click.option(
    "--gpu",
    default="auto",
    envvar="ICHPIPE_GPU",
    show_default=True,
    metavar="auto|cpu|N[,N]",
    help="Device to compute on.",
)
loaders_option = click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    envvar="ICHPIPE_LOADERS",
    show_default=True,
    help="Decoding processes; 0 decodes in this one.",
)
ahead_option = click.option(
    "--loaders",
    type=click.IntRange(min=0),
    default=None,
    envvar="ICHPIPE_LOADERS",
    help="Of each worker: batches side by side on a CPU, decoding processes beside a GPU [all cores].",
)
pixels_option = click.option(
    "--pixel-cache",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="ICHPIPE_PIXEL_CACHE",
    help="Folder for decoded slices; pays where files are compressed (JPEG, JPEG 2000).",
)
workers_option = click.option(
    "--workers", type=click.IntRange(min=1), default=1, envvar="ICHPIPE_WORKERS", show_default=True, help="Processes."
)


def alone_in(folder: Path | None, what: str) -> AbstractContextManager[None]:
    """Hold a folder that the user named against other processes of the same command; None holds nothing."""
    if folder is None:
        return nullcontext()
    from ichpipe.common.run_lock import hold_lock

    return hold_lock(folder, what)


def complete_arm(context: click.Context, _option: click.Parameter, start: str) -> list[CompletionItem]:
    """Complete the name of an arm of the parameter file."""
    return [CompletionItem(name) for name in _arms(context) if name.startswith(start)]


def complete_key(context: click.Context, _option: click.Parameter, start: str) -> list[CompletionItem]:
    """Complete ``SECTION.KEY=`` of ``--set``, with the arms that there are."""
    from ichpipe.params.schema import known_keys

    arms = _arms(context)
    keys = [key.replace(".ARM", f".{arm}") for key in known_keys() for arm in (arms if ".ARM" in key else ("",))]
    return [CompletionItem(f"{key}=") for key in keys if key.startswith(start)]


def _arms(context: click.Context) -> list[str]:
    from ichpipe.common.errors import IchpipeError
    from ichpipe.params.schema import load_params

    named = context.find_root().params.get("params_file")
    try:
        return list(load_params(named or Path("params.yaml")).sequence)
    except IchpipeError:
        return []  # a shell that completes is no place for messages; the command itself says what is wrong
