"""Which device is taken and what differs between GPUs, on machines that PyTorch is told to find."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ichpipe.common.device import (
    autocast,
    choose_device,
    choose_devices,
    device_name,
    double_type,
    free_memory,
    needs_scaling,
    pins_memory,
    random_states,
    restore_random_states,
    usual_precision,
)
from ichpipe.common.errors import IchpipeError
from ichpipe.models.sequence import moving_average_logits
from ichpipe.stages.faults import message_of
from ichpipe.training import distributed
from ichpipe.training.run_record import write_record

MPS_LACKS = (
    "The operator 'aten::_pack_padded_sequence' is not currently implemented for the MPS device. If you want this op "
    "to be considered for addition please comment on … As a temporary fix, you can set the environment variable "
    "`PYTORCH_ENABLE_MPS_FALLBACK=1` to use the CPU as a fallback for this op."
)


class Module:
    """What PyTorch has for a kind of device with two GPUs."""

    def __init__(self):
        self.states = {number: torch.tensor([number], dtype=torch.uint8) for number in range(2)}

    def get_rng_state(self, device):
        return self.states[device.index].clone()

    def set_rng_state(self, state, device):
        self.states[device.index] = state

    def get_device_name(self, device):
        return f"Graphics {device.index}"

    def mem_get_info(self, device):
        return 600 + device.index, 1000


@pytest.fixture
def find(monkeypatch):
    """A function that lets PyTorch find GPUs of a kind; returns the kind's module."""

    def install(kind, count=1):
        module, ask = Module(), torch.get_device_module
        found = None if kind is None else torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: found)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(
            torch, "get_device_module", lambda device: module if torch.device(device).type == kind else ask(device)
        )
        return module

    return install


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_auto_takes_the_first_gpu_of_any_kind_and_numbers_count_them(find, kind):
    find(kind, 2)
    assert choose_devices("auto") == [torch.device(kind, 0)]
    assert choose_devices(" 0, 1 ") == [torch.device(kind, 0), torch.device(kind, 1)]
    assert choose_devices("cpu") == [torch.device("cpu")]
    assert choose_device("1") == torch.device(kind, 1)
    with pytest.raises(IchpipeError, match=r"--gpu 0,1: this command uses one device"):
        choose_device("0,1")
    with pytest.raises(IchpipeError, match=r"--gpu 2: no GPU 2 \(2 found\); use --gpu cpu or auto"):
        choose_device("2")
    with pytest.raises(IchpipeError, match=f"'{kind}': write auto, cpu, a number"):
        choose_device(kind)


def test_without_a_gpu_it_is_the_cpu(find):
    find(None, 0)
    assert choose_device("auto") == torch.device("cpu")
    assert not pins_memory()
    assert random_states() == []
    restore_random_states([torch.zeros(1)])  # of a checkpoint from a machine with a GPU
    with pytest.raises(IchpipeError, match="no GPU 0"):
        choose_device("0")


@pytest.mark.parametrize(
    ("kind", "usual", "scaled"),
    [("cuda", "fp16", True), ("xpu", "bf16", False), ("mps", "fp32", False), ("cpu", "fp32", False)],
)
def test_the_usual_precision_is_what_the_device_offers(kind, usual, scaled):
    device = torch.device(kind)
    assert usual_precision(device) == usual
    assert needs_scaling(device, "auto") == scaled
    assert needs_scaling(device, "fp16")
    assert not needs_scaling(device, "bf16")
    assert not needs_scaling(device, "fp32")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("auto", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_mixed_precision_of_a_cpu(precision, dtype):
    with autocast(torch.device("cpu"), precision):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


@pytest.mark.parametrize("has_fp64", [True, False])
def test_double_precision_only_where_there_is_any(monkeypatch, has_fp64):
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _device: SimpleNamespace(has_fp64=has_fp64))
    assert double_type(torch.device("xpu", 0)) == (torch.float64 if has_fp64 else torch.float32)
    assert double_type(torch.device("mps", 0)) == torch.float32
    assert double_type(torch.device("cpu")) == double_type(torch.device("cuda", 0)) == torch.float64
    assert moving_average_logits(torch.zeros(1, 3, 6), torch.tensor([3]), 3).dtype == torch.float64


@pytest.mark.parametrize(("kind", "pinned"), [("cuda", True), ("xpu", True), ("mps", False)])
def test_names_memory_and_random_states_are_asked_of_the_kind(find, tmp_path, kind, pinned):
    module = find(kind, 2)
    device = torch.device(kind, 1)
    assert pins_memory() == pinned
    assert device_name(device) == "Graphics 1"
    assert device_name(torch.device("cpu")) == "cpu"
    states = random_states()
    module.states = {0: torch.zeros(1), 1: torch.zeros(1)}
    restore_random_states(states[:1])  # of a machine with one GPU
    assert [float(state) for state in module.states.values()] == [0, 0]
    restore_random_states(states)
    assert [int(state) for state in module.states.values()] == [0, 1]
    write_record(tmp_path, stage="s", params={}, device=device, seconds=1.0, facts={})
    assert '"Graphics 1"' in (tmp_path / "record.json").read_text()
    if kind != "mps":
        assert free_memory(device) == 601


def test_the_memory_of_a_mac_is_what_the_system_recommends(monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 1000)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 400)
    assert free_memory(torch.device("mps", 0)) == 600


def test_a_kind_without_names_has_its_own(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda _device: SimpleNamespace())
    assert device_name(torch.device("mps", 0)) == "mps"


@pytest.mark.parametrize(
    ("kind", "backend", "own"),
    [("cuda", "nccl", "1"), ("xpu", "xccl", "1"), ("mps", "gloo", "cpu"), (None, "gloo", "auto")],
)
def test_processes_that_train_together_meet_by_the_backend_of_their_gpus(find, monkeypatch, kind, backend, own):
    find(kind, 0 if kind is None else 2)
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
        "LOCAL_RANK": "1",
    }.items():
        monkeypatch.setenv(name, value)
    started = []
    monkeypatch.setattr(torch.distributed, "init_process_group", started.append)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with distributed.processes():
        assert started == [backend]
    assert distributed.local_gpu("auto") == own
    assert distributed.local_gpu("0") == "0"


def test_an_operator_that_a_gpu_lacks_is_one_message():
    told = message_of(NotImplementedError(MPS_LACKS))
    assert told.startswith(
        "PyTorch has no aten::_pack_padded_sequence for this GPU (MPS); set PYTORCH_ENABLE_MPS_FALLBACK=1"
    )
    assert "--gpu cpu" in told
    other = "Could not run 'aten::grid_sampler_2d' with arguments from the 'XPU' backend. This could be because …"
    assert "no aten::grid_sampler_2d for XPU; use --gpu cpu" in message_of(NotImplementedError(other))
    assert message_of(NotImplementedError("ours")) is None
    assert "GPU's memory is full" in message_of(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB, …)"))


def test_no_other_file_names_a_kind_of_gpu():
    root = Path(__file__).parents[1]
    named = re.compile(r"torch\.(cuda|mps|xpu)\b|[\"']cuda[\"']")
    found = [
        path.relative_to(root).as_posix()
        for room in ("pipeline", "stages", "cache")
        for path in (root / room).rglob("*.py")
        if named.search(path.read_text(encoding="utf-8"))
    ]
    assert found == ["pipeline/common/device.py"]
