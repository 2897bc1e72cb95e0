"""Devices, mixed precision and random seeds.

A GPU is what `torch.accelerator` finds: CUDA (ROCm has the same name), MPS, XPU. What differs between them is here.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from typing import TYPE_CHECKING

import torch

from ichpipe.common.errors import IchpipeError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

log = logging.getLogger("ichpipe")


def accelerator_type() -> str | None:
    """Return the type of the GPUs that this process can use (``cuda``, ``mps``, ``xpu``); None without any."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


def choose_devices(gpu: str) -> list[torch.device]:
    """Turn ``auto``, ``cpu``, ``0`` or ``0,1`` into devices; an absent GPU is an error."""
    text = gpu.strip().lower()
    kind = accelerator_type() if text != "cpu" else None
    available = torch.accelerator.device_count() if kind is not None else 0
    if text == "cpu" or (text == "auto" and kind is None):
        return [torch.device("cpu")]
    if text == "auto":
        return [torch.device(str(kind), 0)]
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise IchpipeError(f"--gpu {gpu!r}: write auto, cpu, a number, or numbers with commas (0,1)")
    missing = [number for number in numbers if int(number) >= available]
    if missing:
        raise IchpipeError(f"--gpu {gpu}: no GPU {missing[0]} ({available} found); use --gpu cpu or auto")
    return [torch.device(str(kind), int(number)) for number in numbers]


def choose_device(gpu: str) -> torch.device:
    """Return the device of a command that computes on one; several are an error."""
    devices = choose_devices(gpu)
    if len(devices) > 1:
        raise IchpipeError(f"--gpu {gpu}: this command uses one device, name one; ichpipe extract uses several")
    return devices[0]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the mixed-precision context; for ``auto`` see `usual_precision`."""
    precision = usual_precision(device) if precision == "auto" else precision
    if precision == "fp32":
        return contextlib.nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)


def usual_precision(device: torch.device) -> str:
    """Return what ``auto`` means: fp16 on CUDA and ROCm (the paper's), bf16 on XPU, fp32 on MPS and on a CPU.

    The first Macs with MPS have no bf16 instructions, and a loss scale is tried on CUDA alone. fp32 works everywhere.
    """
    return {"cuda": "fp16", "xpu": "bf16"}.get(device.type, "fp32")


def training_precision(device: torch.device, precision: str) -> str:
    """Return the precision to train in: bf16 becomes fp32 on a CPU without bf16 instructions, with a warning.

    PyTorch imitates bf16 there: `tf_efficientnet_lite0` at 192 px trained 13 times as slowly as in fp32.
    """
    if precision == "bf16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        log.warning("precision bf16: this CPU has no bf16 instructions; training in fp32, which is faster here")
        return "fp32"
    return precision


def needs_scaling(device: torch.device, precision: str) -> bool:
    """Say whether gradients need a loss scale: they underflow in fp16."""
    return "fp16" in {precision, usual_precision(device) if precision == "auto" else ""}


def double_type(device: torch.device) -> torch.dtype:
    """Return float64, or float32 where the device has none: MPS, and some XPU."""
    if device.type == "mps":
        return torch.float32
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return torch.float32
    return torch.float64


def pins_memory() -> bool:
    """Say whether batches are copied through pinned memory: where there is a GPU, but not on MPS, which has none."""
    return accelerator_type() not in {None, "mps"}


def device_name(device: torch.device) -> str:
    """Return the name of the GPU's model where PyTorch tells it, else the type of the device."""
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if name is None else str(name(device))


def free_memory(device: torch.device) -> int:
    """Return the bytes of a GPU's memory that are free."""
    if device.type == "mps":  # its memory is the system's
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return int(torch.get_device_module(device).mem_get_info(device)[0])


def random_states() -> list[torch.Tensor]:
    """Return the state of random numbers of each GPU; none without a GPU."""
    kind = accelerator_type()
    if kind is None:
        return []
    module = torch.get_device_module(kind)
    return [module.get_rng_state(torch.device(kind, number)) for number in range(torch.accelerator.device_count())]


def restore_random_states(states: list[torch.Tensor]) -> None:
    """Restore what `random_states` returned, unless the number of GPUs has changed."""
    kind = accelerator_type()
    if kind is None or len(states) != torch.accelerator.device_count():
        return
    for number, state in enumerate(states):
        torch.get_device_module(kind).set_rng_state(state, torch.device(kind, number))


def derive_seed(seed: int, *parts: int | str) -> int:
    """Derive an independent 63-bit seed for one purpose (epoch, step, …) from a parameter's seed."""
    text = ":".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *parts: int | str) -> torch.Generator:
    """Return a CPU random generator for one purpose; its numbers are the same on every device."""
    return torch.Generator().manual_seed(derive_seed(seed, *parts))
