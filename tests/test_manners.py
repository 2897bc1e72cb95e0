"""Terminal manners: completion, colour, progress, suggestions, widths."""

import contextlib
import io
import logging
import os
import pty
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner
from conftest import PROGRAM
from test_cli_help import COMMANDS

from ichpipe.common import progress
from ichpipe.common.errors import ParamsError, did_you_mean
from ichpipe.params.schema import known_keys, load_params
from ichpipe.stages.cli import cli, main

ESCAPE = "\x1b["


def output_of(command, folder=None, **environment):
    """Run a program; return its standard output, error and exit code."""
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, cwd=folder, env=os.environ | environment
    )


def on_a_terminal(*arguments, **environment):
    """Run with standard output and error on a terminal; return all that it shows."""
    mother, child = pty.openpty()
    inherited = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    environment = inherited | {"TERM": "xterm"} | environment
    command = [*PROGRAM, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=environment)
    os.close(child)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(mother, 4096):
            shown += part
    process.wait()
    os.close(mother)
    return shown.decode()


@pytest.mark.slow
def test_colour_is_for_terminals_and_no_color_is_heeded(tmp_path):
    wrong = ["--params", tmp_path / "none.yaml", "prepare"]
    assert f"{ESCAPE}31michpipe:" in on_a_terminal(*wrong)
    assert ESCAPE not in on_a_terminal(*wrong, NO_COLOR="1")
    assert ESCAPE not in on_a_terminal(*wrong, TERM="dumb")
    piped = output_of([*PROGRAM, *wrong])
    assert piped.returncode == 1
    assert piped.stderr.startswith("ichpipe: ")
    assert ESCAPE not in piped.stderr + piped.stdout


def test_the_table_is_coloured_on_a_terminal_alone(run, index, tmp_path):
    files = index.loc[index["series_uid"] == index["series_uid"].iloc[0], "path"]
    (tmp_path / "list").write_text("\n".join(files), encoding="utf-8")
    arguments = run.arguments("predict", f"@{tmp_path / 'list'}", "--threshold", "1e-9")
    assert f"{ESCAPE}31m" in on_a_terminal(*arguments)
    plain = on_a_terminal(*arguments, NO_COLOR="1")
    assert " any " in plain
    assert f"{ESCAPE}31m" not in plain
    assert ESCAPE not in output_of([*PROGRAM, *arguments]).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_what_the_shell_reads(shell):
    result = CliRunner().invoke(cli, ["completion", shell])
    assert result.exit_code == 0
    assert f"_ICHPIPE_COMPLETE={shell}_complete" in result.output


def complete(words, folder=None):
    typed = {"COMP_WORDS": f"ichpipe {words}", "COMP_CWORD": str(len(words.split(" ")))}
    result = output_of(PROGRAM, folder, _ICHPIPE_COMPLETE="bash_complete", **typed)
    assert result.returncode == 0
    return [line.partition(",")[2] for line in result.stdout.splitlines() if line]


def test_commands_options_keys_and_arms_are_completed(tmp_path):
    (tmp_path / "params.yaml").write_text("sequence: {mine: {}, other: {}}\nfinetune: {arm: mine}\n")
    assert complete("pre") == ["predict", "prepare"]
    assert complete("predict --unc") == ["--uncalibrated"]
    assert complete("fit-sequence --arm ", tmp_path) == ["mine", "other"]
    assert complete("compare --baseline o", tmp_path) == ["other"]
    assert complete("--set fit-slices.epo", tmp_path) == ["fit-slices.epochs="]
    assert complete("--set sequence.mine.hid", tmp_path) == ["sequence.mine.hidden="]


def test_completion_is_silent_where_the_parameters_are_wrong(tmp_path):
    (tmp_path / "params.yaml").write_text("nonsense: 1\n")
    assert complete("fit-sequence --arm ", tmp_path) == []


def test_a_bash_that_reads_it_completes():
    script = """
        eval "$(ichpipe completion bash)"
        COMP_WORDS=(ichpipe expo); COMP_CWORD=1; _ichpipe_completion ichpipe; echo "${COMPREPLY[@]}"
    """
    folder = os.path.dirname(sys.executable)  # noqa: PTH120
    result = output_of(["bash", "-c", script], PATH=f"{folder}{os.pathsep}{os.environ['PATH']}")
    assert (result.returncode, result.stdout.split()) == (0, ["export"])


def test_commands_and_options_that_are_nearly_right_are_named():
    assert "Did you mean 'predict'?" in CliRunner().invoke(cli, ["predct"]).output
    assert "--out" in CliRunner().invoke(cli, ["predict", "--ouut", "x"]).output.partition("Did you mean")[2]


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("fit-slice.epochs=3", "did you mean fit-slices?"),
        ("fit-slices.epoch=3", "did you mean epochs?"),
        ("sequence.paper.hiden=3", "did you mean hidden?"),
        ("prepare.selection.min_slice=3", "did you mean min_slices?"),
        ("finetune.bootstrap_samples=3", "it is a key of evaluate"),
        ("evaluate.zzz=1", "there are bootstrap_samples, confidence"),
        ("finetune.arm=papre", "did you mean paper?"),
        ("evaluate.baseline=papre", "did you mean paper?"),
    ],
)
def test_keys_and_arms_that_are_nearly_right_are_named(tmp_path, override, hint):
    with pytest.raises(ParamsError) as caught:
        load_params(tmp_path / "none.yaml", (override,))
    assert hint in str(caught.value)


def test_an_arm_that_is_nearly_right_is_named(run, capsys):
    assert "did you mean paper?" in run.error(capsys, "fit-sequence", "--arm", "papre")
    assert "did you mean paper?" in run.error(capsys, "compare", "--baseline", "papre")


def test_what_is_near_nothing_gets_no_suggestion():
    assert did_you_mean("zzz", ["paper"]) == ""


def test_known_keys_are_taken_by_set(tmp_path):
    keys = known_keys()
    assert {"fit-slices.epochs", "sequence.ARM.hidden", "prepare.selection.min_slices"} <= set(keys)
    assert "sequence.ARM.average" not in keys  # a section
    for key in set(keys) - {"fit-slices.source_weights"}:  # no other key has a mapping as its value
        with pytest.raises(ParamsError) as caught:
            load_params(tmp_path / "none.yaml", (f"{key.replace('ARM', 'paper')}={{}}",))
        assert "unknown key" not in str(caught.value)


@pytest.mark.parametrize("path", [(), *COMMANDS], ids=lambda path: " ".join(path) or "ichpipe")
def test_help_fits_80_columns(path):
    text = CliRunner().invoke(cli, [*path, "--help"], terminal_width=80).output
    assert max(len(line) for line in text.splitlines() if "ichpipe --params" not in line) <= 80


@pytest.fixture
def lines(caplog, monkeypatch):
    log = logging.getLogger("ichpipe")
    monkeypatch.setattr(log, "propagate", True)
    before = log.level
    log.setLevel(logging.INFO)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr("tqdm.std.time", lambda: 20.0 * len(ticks))
    ticks.clear()
    yield caplog
    log.setLevel(before)


ticks = []  # the clock of the tests below: 20 s for each entry


def test_long_work_in_a_pipe_says_rate_and_time_left_now_and_then(lines):
    ticks.extend(progress.track(range(6), "predict", 6, "series"))
    assert lines.messages == [
        "predict: 2/6 [00:40<01:20, 20.00s/series]",
        "predict: 4/6 [01:20<00:40, 20.00s/series]",
        "predict: 6/6 [02:00<00:00, 20.00s/series]",
        "predict: 6/6 [02:00<00:00, 20.00s/series]",
    ]


def test_a_note_is_added_to_the_lines_and_made_only_for_them(lines):
    made = []
    counter = progress.Counter("epoch 1", 6, "slice", lambda: made.append(1) or f"loss 0.{len(made)}")
    for _ in range(3):
        ticks.append(1)
        counter.add(2)
    counter.close()
    assert lines.messages == [
        "epoch 1: 4/6 [00:40<00:20, 10.00s/slice, loss 0.1]",
        "epoch 1: 6/6 [01:00<00:00, 10.00s/slice, loss 0.1]",
    ]
    assert made == [1]


def test_short_work_in_a_pipe_says_nothing(lines, monkeypatch):
    monkeypatch.setattr("tqdm.std.time", lambda: 1.0)
    assert list(progress.track(range(3), "predict", 3)) == [0, 1, 2]
    assert lines.messages == []


def test_quiet_silences_the_lines(lines, monkeypatch):
    logging.getLogger("ichpipe").setLevel(logging.WARNING)
    list(progress.track(range(9), "predict", 9))
    assert lines.messages == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_with_rate_and_time_left_that_goes_away(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(logging.getLogger("ichpipe"), "isEnabledFor", lambda _level: True)
    monkeypatch.setattr(progress, "NOTE_S", 0.0)
    counter = progress.Counter("extract", 40, "slice", lambda: "loss 0.1")
    counter.ncols, counter.dynamic_ncols = 80, None
    counter.add(10)
    counter.refresh()
    bar = shown.getvalue().split("\r")[-1]
    assert re.search(r"extract:  25%.*10/40 \[.*<.*slice/s, loss 0.1\]", bar), bar
    assert len(bar) <= 80
    counter.close()
    assert shown.getvalue().split("\r")[-1].strip() == ""


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "dumb")
    assert not progress.on_terminal()


def test_an_error_is_one_message_with_its_remedy(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--artifacts", str(tmp_path), "predict", str(tmp_path)])
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("ichpipe: ")
    assert "run: ichpipe finetune" in message
