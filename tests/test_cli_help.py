"""`--help` is instant: a fresh interpreter loads no heavy library for it; and each command shows an example."""

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ichpipe.stages.cli import cli

HEAVY = ("torch", "timm", "dask", "distributed", "zarr", "pandas", "pydicom", "matplotlib", "sklearn", "scipy")

HELP_AND_MODULES = """
import sys
from ichpipe.stages.cli import main
try:
    main(sys.argv[1:])
finally:
    print("modules:", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def fresh_help(*arguments):
    """Run in a fresh interpreter: standard output, and the top-level modules that were loaded."""
    done = subprocess.run(
        [sys.executable, "-c", HELP_AND_MODULES, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, set(done.stderr.rpartition("modules:")[2].split())


def all_commands(group=cli, path=()):
    context = click.Context(group)
    for name in group.list_commands(context):
        yield (*path, name)
        if isinstance(command := group.get_command(context, name), click.Group):
            yield from all_commands(command, (*path, name))


COMMANDS = list(all_commands())
STAGES = Path(__file__).parents[1] / "stages"
NO_COMMAND = {"--init--", "cli", "options", "faults", "stopping"}


def test_help_names_every_command_and_loads_nothing_heavy():
    text, modules = fresh_help("--help")
    assert "click" in modules  # the list is seen at all
    assert not modules & set(HEAVY)
    for path in COMMANDS:
        if len(path) == 1:
            assert path[0] in text


def test_a_command_lies_in_the_file_of_its_name():
    files = {path.stem.replace("_", "-") for path in STAGES.glob("*.py")} - NO_COMMAND
    assert {path[0] for path in COMMANDS} == files


@pytest.mark.parametrize("arguments", [("--version",), *((*path, "--help") for path in COMMANDS)], ids=" ".join)
def test_help_of_a_command_and_version_load_nothing_heavy(arguments):
    text, modules = fresh_help(*arguments)
    assert "ichpipe" in text
    assert not modules & set(HEAVY)


@pytest.mark.parametrize("path", [(), *COMMANDS], ids=lambda path: " ".join(path) or "ichpipe")
def test_each_help_shows_an_example(path):
    result = CliRunner().invoke(cli, [*path, "--help"], prog_name="ichpipe")
    assert result.exit_code == 0
    assert "ichpipe " in result.output.partition("Example")[2]


@pytest.mark.parametrize(
    "name", ["phantom", "prepare", "fit-slices", "extract", "fit-sequence", "finetune", "evaluate", "predict"]
)
def test_each_step_of_the_recipe_is_a_command(name):
    assert (name,) in COMMANDS
