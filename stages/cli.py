"""The front door: reads the command line, calls one stage, and turns errors into one message.

Only this file prints and exits. Stages are imported inside their commands, so that ``--help`` is instant.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ichpipe.cache.errors import StoreError
from ichpipe.common.errors import IchpipeError
from ichpipe.common.malloc import keep_freed_memory
from ichpipe.stages.cache_command import cache
from ichpipe.stages.completion_command import complete_arm, complete_key, completion
from ichpipe.stages.explain_command import explain
from ichpipe.stages.export_command import export
from ichpipe.stages.faults import message_of
from ichpipe.stages.options import (
    Settings,
    Verdict,
    ahead_option,
    alone_in,
    gpu_option,
    loaders_option,
    pixels_option,
    workers_option,
)
from ichpipe.stages.predict_command import predict
from ichpipe.stages.report_command import report
from ichpipe.stages.score_command import score
from ichpipe.stages.stopping import stop_cleanly

if TYPE_CHECKING:
    from collections.abc import Callable


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="ichpipe")
@click.option(
    "--params",
    "params_file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Parameter file; params.yaml in this folder if there is one, else the built-in defaults.",
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
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("artifacts"),
    envvar="ICHPIPE_ARTIFACTS",
    show_default=True,
    help="Folder of all outputs.",
)
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.option("--quiet", is_flag=True, help="No progress, no log lines.")
@click.pass_context
def cli(
    context: click.Context,
    params_file: Path | None,
    overrides: tuple[str, ...],
    artifacts_root: Path,
    quiet: bool,
) -> None:
    """Find intracranial haemorrhage on head CT: slice CNN, cached embeddings, LSTM, end to end.

    \b
    Example:
      ichpipe phantom --out data/phantom && dvc repro
    """
    _set_up_logging(quiet)
    if _plain():
        context.color = False
    context.obj = Settings(params_file or Path("params.yaml"), params_file is not None, overrides, artifacts_root)


@cli.result_callback()
def _say(said: str | Verdict | None, **_options: Any) -> None:
    if isinstance(said, Verdict):
        click.echo(said.text)
        sys.exit(0 if said.sound else 1)
    if said is not None:
        click.echo(said)


def _plain() -> bool:
    """Say whether colour is unwanted even on a terminal (no-color.org); elsewhere there is none anyway."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def _quiet(_context: click.Context, _option: click.Parameter, quiet: bool) -> None:
    if quiet:
        _set_up_logging(quiet=True)


def command(name: str) -> Callable[[Callable[..., str | None]], click.Command]:
    """Register a command that may also be silenced behind its name; text that it returns is printed."""

    def register(function: Callable[..., str | None]) -> click.Command:
        silenced = click.option("--quiet", is_flag=True, expose_value=False, callback=_quiet, help="No progress.")(
            function
        )
        return cli.command(name)(click.pass_obj(silenced))

    return register


@command("phantom")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to write to.")
@click.option(
    "--studies", type=click.IntRange(min=1), default=None, help="Number of studies [params: phantom.studies]."
)
@click.option("--size", type=click.IntRange(32, 1024), default=None, help="Pixels per side [params: phantom.size_px].")
@click.option("--seed", type=click.IntRange(min=0), default=None, help="Seed [params: phantom.seed].")
def phantom(settings: Settings, out: Path, studies: int | None, size: int | None, seed: int | None) -> None:
    """Make a synthetic head-CT data set: DICOM series and a label table in the RSNA 2019 layout.

    \b
    Example:
      ichpipe phantom --out data/phantom --studies 40 --size 128
    """
    from ichpipe.stages.phantom import run

    given = {"studies": studies, "size_px": size, "seed": seed}
    changes = {key: value for key, value in given.items() if value is not None}
    params = settings.params().phantom.model_copy(update=changes)
    with alone_in(out, "phantom"):
        run(params, out)


@command("prepare")
@workers_option
def prepare(settings: Settings, workers: int) -> None:
    """Scan DICOM files, order slices, join labels, split by patient.

    \b
    Example:
      ichpipe --set prepare.dicom_dir=data/phantom/dicom prepare
    """
    from ichpipe.stages.prepare import run

    params, artifacts = settings.params().prepare, settings.artifacts()
    with settings.alone("prepare", "index", ".resume/prepare"):
        run(params, artifacts.index_dir, workers, artifacts.resume("prepare"))


@command("fit-slices")
@gpu_option
@loaders_option
@pixels_option
def fit_slices(settings: Settings, gpu: str, workers: int, pixel_cache: Path | None) -> None:
    """Stage one: train the slice CNN. Goes on where it was stopped.

    \b
    Example:
      ichpipe --set fit-slices.epochs=3 fit-slices --gpu 0
    """
    from ichpipe.stages.fit_slices import run

    params = settings.params()
    with settings.alone("fit-slices", "slice-cnn"):
        run(params, settings.artifacts(), gpu, workers, pixel_cache)


@command("extract")
@gpu_option
@workers_option
@ahead_option
@click.option("--scheduler", metavar="ADDRESS", default=None, help="Dask scheduler that is there, tcp://HOST:PORT.")
def extract(settings: Settings, gpu: str, workers: int, loaders: int | None, scheduler: str | None) -> None:
    """Write one embedding per slice to the Zarr store, with Dask. Goes on where it was stopped.

    \b
    Example:
      ichpipe extract --gpu 0
    """
    from ichpipe.stages.extract import run

    run(settings.params(), settings.artifacts(), gpu, workers, scheduler, loaders)


@command("fit-sequence")
@gpu_option
@click.option(
    "--arm", default=None, shell_complete=complete_arm, help="One arm of params: sequence; all of them if not given."
)
def fit_sequence(settings: Settings, gpu: str, arm: str | None) -> None:
    """Stage two: train a sequence model on the cached embeddings.

    \b
    Example:
      ichpipe --set sequence.paper.hidden=256 fit-sequence --arm paper
    """
    from ichpipe.stages.fit_sequence import choose_arm, run

    params = settings.params()
    for name in [arm] if arm else list(params.sequence):
        choose_arm(params, name)
        with settings.alone(f"fit-sequence.{name}", f"sequence/{name}"):
            run(params, settings.artifacts(), name, gpu)


@command("finetune")
@gpu_option
@loaders_option
@pixels_option
def finetune(settings: Settings, gpu: str, workers: int, pixel_cache: Path | None) -> None:
    """Unfreeze slice CNN and sequence model and train end to end. Never ends worse than it began.

    \b
    Example:
      ichpipe --set finetune.chunk_slices=8 finetune --gpu 0
    """
    from ichpipe.stages.finetune import run

    params = settings.params()
    with settings.alone("finetune", "finetuned"):
        run(params, settings.artifacts(), gpu, workers, pixel_cache)


@command("evaluate")
@click.option("--gpu", default="auto", envvar="ICHPIPE_GPU", hidden=True, expose_value=False)
def evaluate(settings: Settings) -> None:
    """Score slice CNN, sequence models and the fine-tuned model on the same held-out patients.

    \b
    Example:
      ichpipe evaluate
    """
    from ichpipe.stages.evaluate import run

    params = settings.params()
    with settings.alone("evaluate", "metrics", "plots", "predictions"):
        click.echo(run(params, settings.artifacts()))


@command("compare")
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option(
    "--baseline",
    metavar="ARM",
    default=None,
    shell_complete=complete_arm,
    help="Arm to compare with [params: evaluate.baseline].",
)
def compare(settings: Settings, runs: tuple[Path, ...], baseline: str | None) -> str:
    """Put the arms of stage two beside each other: seeds, paired differences, and what of it is noise.

    RUNS are artifacts folders; without any, this run's own.

    \b
    Example:
      ichpipe compare --baseline paper
    """
    from ichpipe.stages.compare import run

    return run(settings.params(), settings.artifacts(), runs, baseline)


@command("cross-validate")
@gpu_option
@click.option("--arms-only", is_flag=True, help="No fine-tuning: the arms of stage two alone, compared.")
def cross_validate(settings: Settings, gpu: str, *, arms_only: bool) -> str:
    """Run every step once per fold of patients, and score the pooled held-out predictions.

    What was trained on the same inputs with the same parameters is kept.

    \b
    Example:
      ichpipe --params params/ct-ich.yaml cross-validate
    """
    from ichpipe.stages.cross_validate import run

    params = settings.params()
    with settings.alone("cross-validate", "cv"):
        return run(params, settings.artifacts(), gpu, arms_only=arms_only)


command("export")(export)
command("explain")(gpu_option(workers_option(explain)))
command("predict")(gpu_option(workers_option(predict)))
command("report")(gpu_option(report))
command("score")(score)
command("completion")(completion)


cli.add_command(cache)


def _set_up_logging(quiet: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("ichpipe")
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.INFO)


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; exit code 0 done, 1 input, data or machine wrong, 2 wrong usage, 128 + n signal n."""
    if arguments is None:  # a process of our own
        keep_freed_memory()
    with stop_cleanly(leaving=arguments is None):
        return _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> Any:
    try:
        return cli.main(arguments, prog_name="ichpipe")
    except Exception as error:
        message = _message(error)
        if message is None or "--debug" in arguments:
            raise
        _complain(message)


def _message(error: Exception) -> str | None:
    """Return the one line for what input, data or machine caused; None for a mistake in this program."""
    if isinstance(error, (IchpipeError, StoreError)):
        return _without_traceback(str(error))
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}"
    return message_of(error)


def _complain(message: str) -> NoReturn:
    click.echo(f"{click.style('ichpipe:', fg='red')} {message}", err=True, color=False if _plain() else None)
    sys.exit(1)


def _without_traceback(message: str) -> str:
    """Torch puts the traceback of a decoding process into the error's text; the last line says what is wrong."""
    return message.strip().rpartition("\n")[2].partition(": ")[2] if "\nOriginal Traceback" in message else message


if __name__ == "__main__":
    main()
