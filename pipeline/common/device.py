"""Devices, mixed precision and random seeds."""

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


def choose_devices(gpu: str) -> list[torch.device]:
    """Turn ``auto``, ``cpu``, ``0`` or ``0,1`` into devices; an absent GPU is an error."""
    text = gpu.strip().lower()
    available = torch.cuda.device_count() if text != "cpu" else 0
    if text == "cpu" or (text == "auto" and available == 0):
        return [torch.device("cpu")]
    if text == "auto":
        return [torch.device("cuda", 0)]
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise IchpipeError(f"--gpu {gpu!r}: write auto, cpu, a number, or numbers with commas (0,1)")
    missing = [number for number in numbers if int(number) >= available]
    if missing:
        raise IchpipeError(f"--gpu {gpu}: no GPU {missing[0]} ({available} found); use --gpu cpu or auto")
    return [torch.device("cuda", int(number)) for number in numbers]


def choose_device(gpu: str) -> torch.device:
    """Return the device of a command that computes on one; several are an error."""
    devices = choose_devices(gpu)
    if len(devices) > 1:
        raise IchpipeError(f"--gpu {gpu}: this command uses one device, name one; ichpipe extract uses several")
    return devices[0]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the mixed-precision context: ``auto`` is fp16 on a GPU (as in the paper) and fp32 on a CPU."""
    if precision == "fp32" or (precision == "auto" and device.type == "cpu"):
        return contextlib.nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)


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
    return precision == "fp16" or (precision == "auto" and device.type == "cuda")


def derive_seed(seed: int, *parts: int | str) -> int:
    """Derive an independent 63-bit seed for one purpose (epoch, step, …) from a parameter's seed."""
    text = ":".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *parts: int | str) -> torch.Generator:
    """Return a CPU random generator for one purpose; its numbers are the same on every device."""
    return torch.Generator().manual_seed(derive_seed(seed, *parts))
