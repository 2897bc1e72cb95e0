"""Terminals, pipes, clusters and file systems that are not as usual."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import filelock
import pytest
import store_kit as kit
from click.testing import CliRunner
from conftest import PROGRAM, set_options

from ichpipe.cache.location import StoreLocation
from ichpipe.common.errors import DataError, ParamsError
from ichpipe.common.files import decode_text, hold_lock
from ichpipe.common.processes import launched_rank
from ichpipe.params.schema import load_params
from ichpipe.stages.cli import cli
from ichpipe.stages.faults import message_of

pytestmark = pytest.mark.slow  # each starts processes
SOAK = pytest.mark.soak


def ichpipe(*words, encoding="utf-8"):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    return subprocess.run([*PROGRAM, *map(str, words)], capture_output=True, check=False, env=environment)


@pytest.mark.parametrize(
    "encoding", ["cp437", "latin-1", "ascii", pytest.param("cp1252", marks=SOAK), pytest.param("utf-8", marks=SOAK)]
)
def test_a_terminal_shows_what_it_can(tmp_path, encoding):
    folder = tmp_path / "Müller-Ω-頭"
    folder.mkdir()
    done = ichpipe("--set", f"prepare.dicom_dir={folder}", "--set", "prepare.labels=null", "prepare", encoding=encoding)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert "ichpipe: no file in".encode(encoding) in done.stderr
    if encoding != "ascii":  # click writes UTF-8 there
        assert folder.name.encode(encoding, "replace") in done.stderr


@pytest.mark.parametrize(
    "closed", ["2>&-", pytest.param("1>&-", marks=SOAK), pytest.param("0<&-", marks=SOAK), "0<&- 1>&- 2>&-"]
)
def test_streams_may_be_closed(tmp_path, closed):
    command = " ".join(f"'{word}'" for word in [*PROGRAM, "phantom", "--out", str(tmp_path / "p"), "--studies", "1"])
    done = subprocess.run(["bash", "-c", f"{command} --size 32 {closed}"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "p" / "dicom").iterdir())


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (0, 1)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1)),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, (1, 2)),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "h"}, (0, 1)),
    ],
)
def test_ranks_count_only_with_an_address(monkeypatch, environment, expected):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_rank() == expected


@pytest.mark.slow
def test_waiting_for_other_ranks_ends_at_sigterm():
    code = "from ichpipe.training import distributed\nprint('begin', flush=True)\nwith distributed.processes(): pass"
    names = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **names}, **streams) as process:
        assert process.stdout.readline() == b"begin\n"
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == -signal.SIGTERM


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_no_error(tmp_path, monkeypatch, number):
    def refuse(*_arguments, **_options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with hold_lock(tmp_path / "locks", "stage"), StoreLocation(str(tmp_path / "store")).writing():
        (tmp_path / "written").touch()
    assert (tmp_path / "written").exists()


def test_other_errors_of_a_lock_are_not_hidden(tmp_path, monkeypatch):
    def refuse(*_arguments, **_options):
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(OSError, match="I/O error"), hold_lock(tmp_path / "locks", "stage"):
        pass


@pytest.mark.parametrize("text", ["2013_05_10", "007", "no", "1e5", "2013-05-10", "12:30"])
def test_a_value_that_yaml_reads_otherwise_gets_quotes(tmp_path, text):
    with pytest.raises(ParamsError, match=f"YAML reads {text} as .*--set 'prepare.dicom_dir=\"{text}\"'"):
        load_params(tmp_path / "none.yaml", (f"prepare.dicom_dir={text}",))
    assert load_params(tmp_path / "none.yaml", (f'prepare.dicom_dir="{text}"',)).prepare.dicom_dir == text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_of_the_user_in_any_usual_encoding(tmp_path, encoding):
    assert decode_text("dir/Müller\n".encode(encoding), "list") == "dir/Müller\n"
    path = tmp_path / "params.yaml"
    path.write_bytes("prepare: {dicom_dir: Müller}\n".encode(encoding))
    assert load_params(path).prepare.dicom_dir == "Müller"


def test_another_encoding_is_named_with_its_line(tmp_path):
    with pytest.raises(DataError, match=r"list.txt, line 2: neither UTF-8 nor UTF-16.*save it as UTF-8"):
        decode_text("a\nMüller\n".encode("latin-1"), "list.txt")
    path = tmp_path / "params.yaml"
    path.write_bytes("prepare: {dicom_dir: Müller}\n".encode("latin-1"))
    with pytest.raises(ParamsError, match=r"parameter file .*line 1: neither"):
        load_params(path)
    (tmp_path / "list.txt").write_bytes("Müller\n".encode("latin-1"))
    for words in (["--list", tmp_path / "list.txt"], [f"@{tmp_path / 'list.txt'}"]):
        done = ichpipe("predict", *words)
        assert done.returncode == 1
        assert b"neither UTF-8 nor UTF-16" in done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
        "unable to write to file </torch_7_1_0>: No space left on device (28)",
        "unable to allocate shared memory(shm) for file </torch_7>: Resource temporarily unavailable (11)",
    ],
)
def test_a_small_shared_memory_is_named(text):
    assert "--shm-size" in message_of(RuntimeError(text))


def test_weights_that_share_memory_are_no_fault_of_the_machine():
    text = "Some tensors share memory … https://huggingface.co/docs/safetensors/torch_shared_tensors"
    assert message_of(RuntimeError(text)) is None


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), pytest.param(0o027, 0o640, marks=SOAK)])
def test_files_follow_the_umask(tmp_path, mask, mode):
    code = (
        f"import os; os.umask({mask}); import torch\nfrom pathlib import Path\n"
        "from safetensors.torch import save_file\nfrom ichpipe.common.files import atomic_path, write_json\n"
        "write_json(Path('table.json'), {})\n"
        "with atomic_path(Path('model')) as path: save_file({'a': torch.ones(1)}, path)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    for name in ("table.json", "model"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "table.json"]


def test_tables_of_patients_are_as_private_as_the_umask_says(tmp_path, write_series):
    for patient in range(4):
        write_series(f"dicom/{patient}", [0.0, 5.0], series=f"1.2.{patient}", patient=f"P{patient}")
    former = os.umask(0o077)
    try:
        settings = set_options(
            f"prepare.dicom_dir={tmp_path / 'dicom'}", "prepare.labels=null", "prepare.dataset=folder"
        )
        done = CliRunner().invoke(cli, ["--artifacts", str(tmp_path / "artifacts"), *settings, "prepare"])
    finally:
        os.umask(former)
    assert done.exit_code == 0, done.output
    written = [path for path in (tmp_path / "artifacts").rglob("*") if path.is_file()]
    assert tmp_path / "artifacts" / "index" / "slices.parquet" in written
    assert [str(path) for path in written if path.stat().st_mode & 0o077] == []


def test_files_of_others_in_the_output_folder_stay(tmp_path):
    others = [tmp_path / name for name in (".studies.csv.abc1de_3.tmp", ".tmp3Qx2Lm", "x.tmp", ".hidden")]
    for path in others:
        path.write_text("mine")
    with hold_lock(tmp_path, "predict"):
        pass
    assert all(path.exists() for path in others)


@pytest.mark.parametrize("finished", [False, True])
def test_repair_waits_for_a_writer(tmp_path, client, finished):
    """It judges what the writer leaves: a chunk that was missing before may be there."""
    store = tmp_path / "store"
    kit.write(store, kit.Slices(), client)
    chunk = kit.chunk_files(store)[0]
    content = chunk.read_bytes()
    kit.replace(chunk, content[:-1])
    results, command = [], ["cache", "verify", str(store), "--repair"]
    thread = threading.Thread(target=lambda: results.append(CliRunner().invoke(cli, command)))
    with StoreLocation(str(store)).writing():
        thread.start()
        thread.join(2.0)
        assert thread.is_alive()
        assert chunk.exists()
        if finished:
            kit.replace(chunk, content)
    thread.join(30.0)
    assert results[0].exit_code == (0 if finished else 1), results[0].output
    assert chunk.exists() == finished


@pytest.mark.parametrize(
    ("command", "variables", "workers", "loaders"),
    [
        ("extract", {"ICHPIPE_LOADERS": "6"}, 0, 6),
        ("extract", {"ICHPIPE_WORKERS": "2"}, 2, None),
        ("fit-slices", {"ICHPIPE_LOADERS": "6"}, 6, None),
        ("finetune", {"ICHPIPE_LOADERS": "6", "ICHPIPE_WORKERS": "2"}, 2, None),
        ("prepare", {"ICHPIPE_LOADERS": "6"}, 0, None),
    ],
)
def test_each_variable_counts_where_it_did(monkeypatch, command, variables, workers, loaders):
    for name in ("ICHPIPE_WORKERS", "ICHPIPE_LOADERS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    params = cli.get_command(None, command).make_context(command, []).params
    assert params["workers"] == workers
    assert params.get("loaders") == loaders


@pytest.mark.parametrize(("own", "policy"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_without_spinning_unless_the_user_says_otherwise(own, policy):
    """Spinning threads made training up to 11 times slower beside another process."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = """
import os, sys
from ichpipe.stages.cli import main
sys.argv = ["ichpipe", "--version"]
try:
    main()
finally:
    print("policy", os.environ["OMP_WAIT_POLICY"], "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | ({"OMP_WAIT_POLICY": own} if own else {}), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"policy {policy} False" in done.stdout
