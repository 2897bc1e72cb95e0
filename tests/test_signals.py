"""Ctrl-C, SIGTERM, a closed terminal, SIGKILL: soon, in one line, with the shell's exit code, and no process left."""

import os
import signal
import subprocess
import sys
import time

import pytest
from test_benchmarks import FOLDER, load

BEGIN = """
import sys, time, threading
from ichpipe.stages import stopping
from ichpipe.stages.stopping import Stopped, stop_cleanly
def begun():
    print("begun", flush=True)
"""
LINE = "ichpipe: stopped by {}; the same command goes on\n"


def start(*command, **options):
    """Start a program that has installed its handlers when this returns."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    assert process.stdout.readline() == "begun\n"
    return process


def end_of(body, *signals, **options):
    """Send signals to a program; return its exit code, standard output and error."""
    process = start("-c", BEGIN + body, **options)
    for number, name in enumerate(signals):
        time.sleep(0.3 * bool(number))
        process.send_signal(getattr(signal, name))
    output, error = process.communicate(timeout=20)
    return process.returncode, output, error


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_the_work_with_one_line_and_its_exit_code(name, code):
    body = "with stop_cleanly():\n    begun()\n    time.sleep(60)"
    assert end_of(body, name) == (code, "", LINE.format(name))


def test_what_a_library_makes_of_the_signal_is_not_shown():
    """A DataLoader whose worker got the signal, too, raises an error of its own."""
    body = """
with stop_cleanly():
    try:
        begun()
        time.sleep(60)
    except BaseException:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")
"""
    assert end_of(body, "SIGTERM") == (143, "", LINE.format("SIGTERM"))


STUCK = """
with stop_cleanly():
    while True:
        try:
            begun()
            time.sleep(60)
        except Stopped:
            time.sleep(60)
"""


def test_a_second_signal_ends_what_does_not_end():
    assert end_of(STUCK, "SIGTERM", "SIGINT") == (130, "", LINE.format("SIGINT"))


def test_what_does_not_end_by_itself_is_ended():
    assert end_of("stopping.GRACE_S = 0.3\n" + STUCK, "SIGTERM") == (143, "", LINE.format("SIGTERM"))


def test_a_signal_that_is_ignored_stays_ignored():
    """As under nohup, and in a shell's background."""
    body = "with stop_cleanly():\n    begun()\n    time.sleep(1)\nprint('whole')"
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    assert end_of(body, "SIGINT", **ignore) == (0, "whole\n", "")


def test_handlers_are_as_before_afterwards():
    from ichpipe.stages.stopping import stop_cleanly

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_cleanly():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


POOL = """
import os
from ichpipe.common.processes import process_pool
if __name__ == "__main__":
    with stop_cleanly(), process_pool(2) as pool:
        list(pool.map(abs, range(8)))
        begun()
        list(pool.map(time.sleep, [60, 60]))
"""


@pytest.fixture
def error_of_killed(tmp_path, monkeypatch):
    """A function that runs a script, kills it, demands that no process is left, and returns its standard error."""
    monkeypatch.syspath_prepend(FOLDER)
    killing = load("killing")

    def kill(text, number):
        (tmp_path / "script.py").write_text(text)
        with start(tmp_path / "script.py", start_new_session=True) as process:
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            process.wait(timeout=20)
            assert killing.strays_of(process.pid) == 0
            return process.stderr.read()

    return kill


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_of_a_pool_end_with_their_parent(number, error_of_killed):
    error = error_of_killed(BEGIN + POOL, number)
    assert "Traceback" not in error
    if number != signal.SIGKILL:  # then only Python's own tracker of semaphores is left to say that it tidies up
        assert error == LINE.format(signal.Signals(number).name)


LOADING = """
import numpy as np
from ichpipe.images.slice_dataset import SliceDataset, batch_loader
from ichpipe.models.header import Framing
if __name__ == "__main__":
    slices = SliceDataset(["a"] * 4, np.zeros((4, 6), np.float32), Framing(32))
    loading = iter(batch_loader(slices, [[0], [1]], 1))
    print("begun", flush=True)
    next(loading)
"""


@pytest.mark.slow
def test_a_decoding_process_that_is_still_importing_ends_with_its_parent(error_of_killed):
    error_of_killed(LOADING, signal.SIGKILL)


BLOCKED = """
from pathlib import Path
from ichpipe.features.dask_client import connect
def blocked():
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("SigBlk"))
    return bool(int(line.split()[1], 16) & 1 << 1)  # signal 2
if __name__ == "__main__":
    with connect(2, None) as client:
        print(sorted(client.run(blocked).values()), blocked())
"""


@pytest.mark.slow
def test_dask_workers_leave_ctrl_c_to_the_command(tmp_path):
    """A terminal sends it to all of a command's processes, and a worker would show a traceback of its own."""
    (tmp_path / "blocked.py").write_text(BLOCKED)
    done = subprocess.run([sys.executable, tmp_path / "blocked.py"], capture_output=True, text=True, check=True)
    assert done.stdout == "[True, True] False\n"


@pytest.mark.soak
def test_stages_ended_at_random_moments_go_on_to_the_same_bytes(tmp_path, monkeypatch):
    """A few here; benchmarks/stage_kills.py --kills 100 is the whole."""
    monkeypatch.syspath_prepend(FOLDER)
    result = load("stage_kills").run(tmp_path, 5, 1, ["prepare", "fit-slices"])
    assert result["wrong"] == []
    assert result["resumed_to_the_same_bytes"] == result["kills"] >= 5
