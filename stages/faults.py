"""Messages for faults of the machine: a lost GPU, too little memory, a killed process.

Libraries raise these as their own errors. This module imports no library; it looks at the loaded modules.
"""

from __future__ import annotations

import re
import sys

# PyTorch's two texts: of a Mac's GPU, and of any other kind.
_LACKING = re.compile(
    r"operator '(?P<name>[\w:.]+)' is not currently implemented for the MPS device"
    r"|Could not run '(?P<other>[\w:.]+)' with arguments from the '(?P<kind>\w+)' backend"
)
KEPT = "what was finished is kept, and the same command goes on from there"


def message_of(error: BaseException) -> str | None:  # noqa: PLR0911 - a line for each fault
    """Return the message for an error that the machine caused; None for any other error, a fault of this program."""
    if _is(error, "distributed", "scheduler", "KilledWorker"):
        return f"Dask workers were killed again and again, perhaps for want of memory; use fewer --workers; {KEPT}"
    # torch 2 has classes for a full and for a lost GPU. Of cuBLAS, cuDNN, CPU memory, shared memory and workers it
    # raises a plain RuntimeError: the text alone tells them apart.
    text = str(error)
    if isinstance(error, NotImplementedError) and (lacking := _LACKING.search(text)):
        if lacking["name"]:
            fallback = "set PYTORCH_ENABLE_MPS_FALLBACK=1, which computes it on the CPU, or use --gpu cpu"
            return f"PyTorch has no {lacking['name']} for this GPU (MPS); {fallback}; {KEPT}"
        return f"PyTorch has no {lacking['other']} for {lacking['kind']}; use --gpu cpu; {KEPT}"
    if _is(error, "torch", "OutOfMemoryError") or "MPS backend out of memory" in text:
        return (
            "the GPU's memory is full; lower batch_size (with a higher accumulate), finetune.chunk_slices, or take "
            f"another GPU with --gpu; {KEPT}"
        )
    if _is(error, "torch", "AcceleratorError") or "CUDA error" in text:
        first = text.strip().partition("\n")[0]
        return f"the GPU failed ({first}); see nvidia-smi, or take another one with --gpu; {KEPT}"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"there is not enough memory; run again with fewer --workers or a smaller batch_size; {KEPT}"
    if isinstance(error, RuntimeError) and any(mark in text for mark in ("shared memory", "</torch_", "Bus error")):
        cause = "there is not enough shared memory (/dev/shm) for decoding processes"
        return f"{cause}; give the container more (docker run --shm-size 2g), or use --workers 0; {KEPT}"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return f"a process that decodes slices was killed, perhaps for want of memory; use fewer --workers; {KEPT}"
    return None


def _is(error: BaseException, module: str, *names: str) -> bool:
    kind: object = sys.modules.get(module)
    for name in names:
        kind = getattr(kind, name, None)
    return isinstance(kind, type) and isinstance(error, kind)
