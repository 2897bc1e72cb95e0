"""Slices a second and peak memory of training and of fine-tuning on random pixels, for `gpu.py`; prints JSON.

python benchmarks/gpu_training.py train
python benchmarks/gpu_training.py finetune --tiny
"""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ichpipe.common.device import choose_device
from ichpipe.images.slice_dataset import SliceDataset
from ichpipe.models.end_to_end import EndToEnd
from ichpipe.models.header import Framing, SequenceSpec
from ichpipe.models.sequence import build_sequence
from ichpipe.models.slice_cnn import SliceCnn, spec_for
from ichpipe.params.schema import PAPER_WINDOWS, FinetuneParams, SliceParams
from ichpipe.training.end_to_end_trainer import EndToEndFitting, ImageSeries
from ichpipe.training.slice_trainer import SliceFitting, Slices
from ichpipe.training.trainer import Position

if TYPE_CHECKING:
    from collections.abc import Callable


def measure_training(*, tiny: bool) -> dict[str, Any]:
    """Train stage one on random pixels: slices a second after the first step, and peak memory, of each precision."""
    device, found = choose_device("auto"), {}
    backbone, size_px, batch, steps = ("test_byobnet", 32, 4, 3) if tiny else ("resnet50", 512, 32, 20)
    pixels = torch.randint(-1000, 1000, (batch, 1, size_px, size_px), dtype=torch.int16)
    rows = range(batch * steps)
    labels = np.zeros((len(rows), 6), np.float32)
    dataset = SliceDataset(list(rows), labels, Framing(size_px), lambda row: pixels[row % batch])
    for precision in ("auto", "bf16"):
        section = SliceParams(backbone=backbone, batch_size=batch, precision=precision)
        cnn = SliceCnn(spec_for(backbone, PAPER_WINDOWS, size_px, 0.0)).to(device)
        slices = Slices(dataset, dataset, ["series"] * len(rows))
        fitting = SliceFitting(cnn, section, device, 0, slices, rows, 0)
        found[precision] = measure_epoch(fitting.train_epoch, batch, device)
    return found


def measure_finetuning(*, tiny: bool) -> dict[str, Any]:
    """Train end to end on series of random pixels: slices a second after the first step, and peak memory."""
    device, found = choose_device("auto"), {}
    backbone, size_px, length, steps = ("test_byobnet", 32, 6, 3) if tiny else ("resnet50", 512, 36, 8)
    pixels = torch.randint(-1000, 1000, (1, size_px, size_px), dtype=torch.int16)
    names = [str(number) for number in range(length)]
    series = [ImageSeries(names, torch.zeros(length, 6), torch.arange(length) * 5.0) for _ in range(steps)]
    for precision in ("auto", "bf16"):
        cnn = SliceCnn(spec_for(backbone, PAPER_WINDOWS, size_px, 0.0))
        spec = SequenceSpec(
            cell="lstm", hidden=512, layers=2, bidirectional=True, dropout=0.0, inputs=("embedding",),
            embedding_dim=cnn.embedding_dim,
        )  # fmt: skip
        model = EndToEnd(cnn, build_sequence(spec)).to(device)
        section = FinetuneParams(batch_series=1, precision=precision)
        fitting = EndToEndFitting(model, section, device, series, series, 0, lambda _files: pixels)
        found[precision] = measure_epoch(fitting.train_epoch, length, device)
    return found


def measure_epoch(train_epoch: Callable[[int, Position], None], slices: int, device: torch.device) -> dict[str, Any]:
    """Train one epoch; seconds from the end of the first step on, and the most memory that PyTorch had allocated."""
    moments: list[float] = []

    def after_step() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        moments.append(time.perf_counter())

    counts_memory = device.type not in {"cpu", "mps"}
    if counts_memory:
        torch.accelerator.reset_peak_memory_stats()
    train_epoch(1, Position(0.0, after_step))
    peak = torch.accelerator.max_memory_allocated() / 2**20 if counts_memory else None
    steps = len(moments) - 1
    return {"slices_per_second": steps * slices / (moments[-1] - moments[0]), "steps": steps, "peak_mb": peak}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", choices=("train", "finetune"))
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    print(json.dumps((measure_training if options.part == "train" else measure_finetuning)(tiny=options.tiny)))
