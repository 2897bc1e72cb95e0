"""The machine fails: a full disk, a folder that takes nothing, a lost worker or GPU, two runs at once."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ichpipe.common import files
from ichpipe.common.device import choose_device, choose_devices
from ichpipe.common.errors import BusyError, IchpipeError, OutputError
from ichpipe.common.files import hold_lock
from ichpipe.stages import faults
from ichpipe.training import slice_trainer

ROOT = Path(__file__).parents[1]
OUTPUTS = {
    "prepare": "index", "fit-slices": "slice-cnn", "extract": "embeddings.zarr", "fit-sequence": "sequence",
    "finetune": "finetuned", "evaluate": "plots", "report": "report", "export": "export",
}  # fmt: skip


@pytest.fixture
def disk():
    """A function that mounts a file system in memory over a folder, with mount's options."""
    mounted = []

    def mount(folder, options):
        folder.mkdir(parents=True, exist_ok=True)
        line = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.name == "nt" or shutil.which("mount") is None or subprocess.run(line, check=False).returncode:
            pytest.skip("no file system may be mounted here")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


# Disks


@pytest.mark.parametrize("stage", OUTPUTS)
@pytest.mark.slow
def test_a_full_disk_is_one_message_and_nothing_half_written(branch, disk, capsys, stage):
    folder = branch.artifacts / OUTPUTS[stage]
    shutil.rmtree(folder, ignore_errors=True)
    disk(folder, "size=4k")
    message = branch.error(capsys, stage).strip()
    told = message.splitlines()[-1]
    assert str(folder) in told
    assert "No space left on device" in told
    assert "kept" in told
    assert not [path for path in folder.rglob("*") if path.name.endswith(("tmp", ".partial"))]
    assert not list(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("stage", OUTPUTS)
@pytest.mark.slow
def test_a_folder_that_can_only_be_read_is_named(branch, disk, capsys, stage):
    folder = branch.artifacts / OUTPUTS[stage]
    shutil.rmtree(folder, ignore_errors=True)
    disk(folder, "ro,size=1m")
    told = branch.error(capsys, stage).strip().splitlines()[-1]
    assert str(folder) in told
    assert "Read-only file system" in told


def test_artifacts_and_outputs_that_can_only_be_read_are_named(branch, disk, capsys, tmp_path):
    disk(tmp_path / "out", "ro,size=1m")
    told = branch.error(capsys, "predict", branch.data / "dicom", "--out", tmp_path / "out")
    assert f"nothing can be written in {tmp_path / 'out'} (Read-only file system)" in told
    disk(branch.artifacts / ".locks", "ro,size=1m")
    told = branch.error(capsys, "finetune")
    assert f"nothing can be written in {branch.artifacts / '.locks'} (Read-only file system)" in told


@pytest.mark.slow
def test_training_goes_on_once_there_is_room(run, branch, disk, capsys):
    """Both epochs are in the checkpoint: nothing is trained twice."""
    folder = branch.artifacts / "slice-cnn"
    wanted = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    disk(folder, "size=4k")
    branch.error(capsys, "fit-slices")
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    result = branch("fit-slices")
    assert result.exit_code == 0
    assert "going on after epoch 2" in result.output
    assert (folder / "model.safetensors").read_bytes() == wanted


LIMITED = """
import resource, signal, sys
from pathlib import Path
import numpy, pandas, torch
from safetensors.torch import save_file
from ichpipe.common import files
from ichpipe.common.errors import OutputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
big = {"a": torch.zeros(5000)}

def save_checkpoint(path):  # as Trainer does
    with path.open("wb") as file:
        torch.save(big, file)

writers = {
    "text": lambda path: path.write_text("x" * 5000),
    "safetensors": lambda path: save_file(big, path),
    "checkpoint": save_checkpoint,
    "table": lambda path: pandas.DataFrame({"a": range(5000)}).to_parquet(path),
    "csv": lambda path: pandas.DataFrame({"a": range(5000)}).to_csv(path),
}
for name, write in writers.items():
    try:
        with files.atomic_path(Path(sys.argv[1]) / name) as temporary:
            write(temporary)
    except OutputError as error:
        print(error)
"""


@pytest.mark.slow
def test_every_library_that_writes_is_understood(tmp_path):
    """No mount needed: no file of the process may grow beyond 100 bytes."""
    for name in ("text", "safetensors", "checkpoint", "table", "csv"):
        (tmp_path / name).write_text("former")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name, line in zip(("text", "safetensors", "checkpoint", "table", "csv"), done, strict=True):
        assert re.match(rf"{re.escape(str(tmp_path / name))} can't be written \(", line)
        assert (tmp_path / name).read_text() == "former"
    assert len(list(tmp_path.iterdir())) == 5


def test_other_errors_are_not_taken_for_the_disk(tmp_path):
    with pytest.raises(FileNotFoundError), files.atomic_path(tmp_path / "a"):
        (tmp_path / "absent").read_bytes()
    with pytest.raises(ValueError, match="mine"), files.atomic_path(tmp_path / "a"):
        raise ValueError("mine")
    assert list(tmp_path.iterdir()) == []


def test_bytes_and_name_are_synced_before_and_after_the_renaming(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(files, "sync", lambda path: steps.append(("sync", path.name, (tmp_path / "a").exists())))
    files.write_text(tmp_path / "a", "x")
    (first, second) = steps
    assert first == ("sync", "a", False)
    assert second == ("sync", tmp_path.name, True)


def test_every_output_goes_through_one_door():
    """What writes a file by itself is listed here, with the reason."""
    allowed = {
        "pipeline/common/files.py": "the door",
        "pipeline/phantom/dataset.py": "a folder that is renamed when it is whole",
        "stages/cli.py": "the null device",
        "cache/worker.py": "a chunk, synced and renamed by itself",
    }
    writes = re.compile(
        r"\.(write_text|write_bytes)\(|\.to_(csv|parquet)\((?!index|\))|open\([^)]*[\"'][wax]|\.savefig\(|\.save_as\("
        r"|save_file\(|torch\.save\(|onnx\.save\(|write_table\([a-z]+\.|copyfile\(|\.dump\("
    )
    bare = set()
    for room in ("pipeline", "stages", "cache"):
        for path in (ROOT / room).rglob("*.py"):
            lines = path.read_text(encoding="utf-8").splitlines()
            for number, line in enumerate(lines):
                if writes.search(line) and "temporary" not in line and "buffer" not in line:
                    near = "\n".join(lines[max(0, number - 6) : number + 16])
                    if "temporary" not in near:
                        bare.add(str(path.relative_to(ROOT)))
    assert bare <= set(allowed), bare - set(allowed)


# Workers and devices


@pytest.mark.soak
def test_a_dask_worker_that_vanishes_is_replaced(branch, tmp_path):
    """Killed in the midst of its work; the rest ends with the bytes of a run that had no such trouble."""
    line = ["--set", "extract.chunk_rows=20", "extract"]
    store = branch.artifacts / "embeddings.zarr"
    shutil.rmtree(store)
    assert branch(*line).exit_code == 0
    wanted = bytes_of(store)
    shutil.rmtree(store)
    process = subprocess.Popen(
        [sys.executable, "-m", "ichpipe.stages.cli", *branch.arguments(*line, "--workers", "2")],
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list(store.glob("*/segment-*/embedding/c/*/0")):
        time.sleep(0.002)
    killed = [worker for worker in children_of(process.pid) if b"spawn_main" in command_of(worker)]
    os.kill(killed[0], signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert len(killed) == 2
    assert bytes_of(store) == wanted
    assert "Traceback" not in said


def bytes_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def children_of(parent):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (entry / "stat").exists():
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent:
                found.append(int(entry.name))
    return found


def command_of(process):
    return Path(f"/proc/{process}/cmdline").read_bytes()


@pytest.mark.slow
def test_a_lost_gpu_is_one_message_and_the_checkpoint_stays(run, branch, capsys, monkeypatch):
    shutil.rmtree(branch.artifacts / "slice-cnn")
    train = slice_trainer.SliceFitting.train_epoch

    def lost(self, epoch, position):
        if epoch == 2:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be …")
        train(self, epoch, position)

    with monkeypatch.context() as change:
        change.setattr(slice_trainer.SliceFitting, "train_epoch", lost)
        told = branch.error(capsys, "fit-slices").strip().splitlines()[-1]
    assert told.startswith("ichpipe: the GPU failed (CUDA error: unspecified launch failure); see nvidia-smi")
    result = branch("fit-slices")
    assert "going on after epoch 1" in result.output
    name = "slice-cnn/model.safetensors"
    assert (branch.artifacts / name).read_bytes() == (run.artifacts / name).read_bytes()


def test_faults_of_the_machine_have_words_and_mistakes_of_ours_have_none():
    from distributed.scheduler import KilledWorker

    assert "GPU's memory is full" in faults.message_of(torch.OutOfMemoryError("CUDA out of memory"))
    assert "not enough memory" in faults.message_of(MemoryError())
    assert "not enough memory" in faults.message_of(RuntimeError("DefaultCPUAllocator: can't allocate memory: you …"))
    worker = RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly")
    assert "a process that decodes slices was killed" in faults.message_of(worker)
    assert "Dask workers were killed" in faults.message_of(KilledWorker("task", None, 3))
    assert faults.message_of(KeyError("ours")) is None
    assert faults.message_of(RuntimeError("shapes differ")) is None


@pytest.mark.gpu
def test_a_real_error_of_a_gpu_is_understood():
    """In another process: afterwards the context of this one would be of no use."""
    code = """
import torch
from ichpipe.stages.faults import message_of
try:
    torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")].sum().item()
except Exception as error:
    print(message_of(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("the GPU failed (CUDA error: device-side assert triggered")


def test_no_result_depends_on_the_clock():
    """It may go backwards: what waits or measures uses a clock that does not, and no file holds a date."""
    clocks = re.compile(r"time\.time\(|time\.ctime|time\.localtime|datetime\.(now|today|utcnow)|date\.today|gmtime")
    found = [
        str(path.relative_to(ROOT))
        for room in ("pipeline", "stages", "cache")
        for path in (ROOT / room).rglob("*.py")
        if clocks.search(path.read_text(encoding="utf-8"))
    ]
    assert found == []


# Two at once

HOLDER = """
import sys, time
from pathlib import Path
from ichpipe.common.files import hold_lock
with hold_lock(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder():
    """A function that lets another process hold a stage."""
    started = []

    def start(folder, what):
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), what], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_run_in_one_folder_is_refused_and_told_the_first(branch, holder, capsys):
    first = holder(branch.artifacts / ".locks", "finetune")
    told = branch.error(capsys, "finetune")
    assert f"process {first.pid} is running finetune" in told
    assert f"kill {first.pid}" in told
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    with hold_lock(branch.artifacts / ".locks", "finetune"):  # freed by the kernel, whatever file is left
        pass


def test_outputs_that_the_user_names_are_held_too(branch, holder, capsys, tmp_path):
    first = holder(tmp_path / "out", "predict")
    told = branch.error(capsys, "predict", branch.data / "dicom", "--out", tmp_path / "out")
    assert f"process {first.pid} is running predict" in told


def test_arms_train_side_by_side(branch, holder):
    holder(branch.artifacts / ".locks", "fit-sequence.paper")
    assert branch("fit-sequence", "--arm", "floor").exit_code == 0


def test_processes_of_one_training_share_a_folder(tmp_path, holder, monkeypatch):
    """torchrun numbers them: the first one holds the folder for all."""
    holder(tmp_path, "fit-slices")
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    with hold_lock(tmp_path, "fit-slices"):
        pass
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(BusyError), hold_lock(tmp_path, "fit-slices"):
        pass


def test_the_lock_is_free_after_an_error_and_leaves_no_number(tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match="mine"), hold_lock(tmp_path, "prepare"):
            raise ValueError("mine")
    assert not list(tmp_path.glob("*.pid"))


def test_two_threads_of_one_program_are_two(tmp_path):
    held, go, told = threading.Event(), threading.Event(), []

    def first():
        with hold_lock(tmp_path, "x"):
            held.set()
            go.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    held.wait(10)
    try:
        with hold_lock(tmp_path, "x"):
            pass
    except BusyError as error:
        told.append(str(error))
    go.set()
    thread.join()
    assert told


def test_what_a_killed_run_left_half_written_is_removed_and_nothing_else(tmp_path):
    folder, resume = tmp_path / "slice-cnn", tmp_path / ".resume"
    names = [
        folder / ".model.safetensors.0123abcd.ichpipe-tmp",
        folder / "folds" / ".folds.json.0123abcd.ichpipe-tmp",
        resume / ".fit-slices.pt.0123abcd.ichpipe-tmp",
    ]
    kept = [folder / "model.tmp", folder / ".model.safetensors.abc1de_3.tmp", folder / ".tmp3Qx2Lm"]
    kept += [resume / ".finetune.pt.0123abcd.ichpipe-tmp"]
    for path in names + kept:
        path.mkdir(parents=True)
        (path / "part").write_text("half")
    with hold_lock(tmp_path / ".locks", "fit-slices", [folder], resume):
        assert [path.exists() for path in names] == [False] * 3
        assert all(path.exists() for path in kept)


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="nothing can be written in"), hold_lock(tmp_path / "file", "prepare"):
        pass


def test_several_gpus_for_a_command_that_uses_one_are_an_error(monkeypatch):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    assert [str(device) for device in choose_devices("0,1")] == ["cuda:0", "cuda:1"]
    assert str(choose_device("1")) == "cuda:1"
    with pytest.raises(IchpipeError, match=r"--gpu 0,1: this command uses one device"):
        choose_device("0,1")
