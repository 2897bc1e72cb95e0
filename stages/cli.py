"""The command line: options before the command, the list of commands, and errors as one message.

Only this file prints and exits. A command's file is imported when the command is looked up (click's LazyGroup).
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from click.exceptions import NoSuchCommand

from ichpipe.cache.errors import StoreError
from ichpipe.common.errors import IchpipeError
from ichpipe.common.malloc import keep_freed_memory
from ichpipe.stages.faults import message_of
from ichpipe.stages.options import FILE, FOLDER, Settings, Verdict, complete_key, find_params
from ichpipe.stages.stopping import stop_cleanly

COMMANDS = (
    "cache", "compare", "completion", "cross-validate", "ensemble", "evaluate", "explain", "export", "extract",
    "finetune", "fit-sequence", "fit-slices", "info", "init", "phantom", "predict", "prepare", "report", "run",
    "schema", "score",
)  # fmt: skip


OPTIONAL = frozenset(
    {"dask", "distributed", "iterstrat", "jinja2", "markupsafe", "matplotlib", "PIL", "pytorch_grad_cam"}
)
"""Packages that the small core leaves out, by the name that is imported."""
EXTRAS = {"explain": "explain", "report": "report"}
"""The extra that a command needs, where it isn't ``train``."""


class LazyGroup(click.Group):
    """Commands that lie in one file each, ``stages/NAME.py``, as its attribute ``command``."""

    def list_commands(self, _context: click.Context) -> list[str]:
        """Return the names of all commands."""
        return list(COMMANDS)

    def get_command(self, _context: click.Context, cmd_name: str) -> click.Command | None:
        """Import the file of a command; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"ichpipe.stages.{cmd_name.replace('-', '_')}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find the command as click does; the error for an unknown name suggests names from the whole list."""
        try:
            return super().resolve_command(ctx, args)
        except NoSuchCommand as error:
            raise NoSuchCommand(error.command_name, possibilities=COMMANDS, ctx=ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a package that an extra installs and that is missing becomes one message."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in OPTIONAL:
                raise
            name = ctx.invoked_subcommand or ""
            extra = EXTRAS.get(name, "train")
            message = f"{name} needs the package {package}; run: pip install 'ichpipe[{extra}]'"
            raise IchpipeError(message) from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="ichpipe")
@click.option(
    "--params",
    "params_file",
    type=FILE,
    help="Parameter file, or the name of one that is installed (paper, best, small); params.yaml in this folder if "
    "there is one, else the built-in defaults.",
)
@click.option(
    "--set",
    "overrides",
    metavar="SECTION.KEY=VALUE",
    multiple=True,
    shell_complete=complete_key,
    help="Change one parameter; wins over the file; may be repeated.",
)
@click.option(
    "--artifacts",
    "artifacts_root",
    type=FOLDER,
    default=Path("artifacts"),
    envvar="ICHPIPE_ARTIFACTS",
    show_default=True,
    help="Folder of all outputs.",
)
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.option("--quiet", is_flag=True, help="No progress, no log lines.")
@click.pass_context
def cli(
    context: click.Context, params_file: Path | None, overrides: tuple[str, ...], artifacts_root: Path, quiet: bool
) -> None:
    """Find intracranial haemorrhage on head CT: slice CNN, cached embeddings, LSTM, end to end.

    \b
    Example:
      ichpipe phantom --out data/phantom && dvc repro
    """
    log = logging.getLogger("ichpipe")
    log.handlers[:] = [logging.StreamHandler()]
    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    if _without_colour():
        context.color = False
    named = find_params(params_file) if params_file else Path("params.yaml")
    context.obj = Settings(named, params_file is not None, overrides, artifacts_root)


@cli.result_callback()
def _print_result(result: str | Verdict | None, **_options: Any) -> None:
    if isinstance(result, Verdict):
        click.echo(result.text)
        sys.exit(0 if result.sound else 1)
    if result is not None:
        click.echo(result)


def _without_colour() -> bool:
    """Say whether the user wants no colour even on a terminal (no-color.org)."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; exit code 0 done, 1 input, data or machine wrong, 2 wrong usage, 128 + n signal n."""
    if arguments is None:  # a process of our own
        _require_streams()
        keep_freed_memory()
        # Threads that wait by spinning take the cores of every other process. Read once, when torch loads.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with stop_cleanly(leaving=arguments is None):
        words = sys.argv[1:] if arguments is None else arguments
        try:
            return cli.main(words, prog_name="ichpipe")
        except Exception as error:
            message = _message(error)
            if message is None or "--debug" in words:
                raise
            color = False if _without_colour() else None
            click.echo(f"{click.style('ichpipe:', fg='red')} {message}", err=True, color=color)
            sys.exit(1)


def _require_streams() -> None:
    """Replace characters that the terminal or pipe can't show; give absent streams (``2>&-``) a place to write to."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, so that no file of ours gets it
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115, PTH123
        elif name != "stdin":
            stream.reconfigure(errors="replace")


def _message(error: Exception) -> str | None:
    """Return one line for an error of input, data or machine; None for a fault in this program."""
    if isinstance(error, (IchpipeError, StoreError)):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    return message_of(error)


if __name__ == "__main__":
    main()
