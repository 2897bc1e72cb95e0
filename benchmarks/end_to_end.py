"""Memory and time of the exact two-pass gradient beside plain backpropagation, for series of several lengths.

python benchmarks/end_to_end.py --out end_to_end.json         # ResNet-50 at 512 px; 10 GB of memory for the plain one

Each measurement is a process of its own, so that its peak is its own. On a CPU memory is what the process holds at its
highest above what it held with the model loaded; on a GPU what PyTorch had allocated. Pixels are random, none decoded.
"""

from __future__ import annotations

import functools
import json
import resource
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import kit
import torch

from ichpipe.common.device import autocast, choose_device
from ichpipe.models.end_to_end import EndToEnd, backward_in_chunks
from ichpipe.models.header import SequenceSpec
from ichpipe.models.sequence import build_sequence
from ichpipe.models.slice_cnn import SliceCnn, spec_for
from ichpipe.params.schema import PAPER_WINDOWS
from ichpipe.training.trainer import weighted_bce

if TYPE_CHECKING:
    import argparse
    from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--slices", type=int, nargs="+", default=[8, 16, 32, 60])
    parser.add_argument("--plain", type=int, nargs="*", default=[8, 16], help="lengths for plain backpropagation")
    parser.add_argument("--chunk", type=int, default=4)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "SLICES"), help="measure one in this process, and print it")


def ratios(result: dict[str, Any]) -> dict[str, float | None]:
    """Pick the ratios."""
    found: dict[str, float | None] = {"largest over smallest peak of memory": result["largest_over_smallest_peak"]}
    for one in result["ratios"]:
        found[f"{one['slices']} slices, memory of plain"] = one["memory_of_plain_over_chunked"]
        found[f"{one['slices']} slices, seconds, times as long"] = one["seconds_of_chunked_over_plain"]
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all lengths; ratios are to the same run's shortest series, and to plain backpropagation."""
    found = [apart("chunked", slices, options) for slices in options.slices]
    plain = [apart("plain", slices, options) for slices in options.plain]
    of_length = {one["slices"]: one for one in found}
    ratios = [
        {
            "slices": one["slices"],
            "memory_of_plain_over_chunked": one["peak_mb"] / of_length[one["slices"]]["peak_mb"],
            "seconds_of_chunked_over_plain": of_length[one["slices"]]["seconds"] / one["seconds"],
        }
        for one in plain
    ]
    peaks = [one["peak_mb"] for one in found]
    return {
        "threads": torch.get_num_threads(),
        "chunked": found,
        "plain": plain,
        "largest_over_smallest_peak": max(peaks) / min(peaks),
        "ratios": ratios,
    }


def apart(kind: str, slices: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process of its own."""
    words = ["--backbone", options.backbone, "--size", options.size, "--chunk", options.chunk]
    words += ["--precision", options.precision, "--one", kind, slices]
    line = [sys.executable, __file__, *map(str, words)]
    heap = kit.own_heap() if kind == "chunked" else None  # as the command; plain as Python runs it
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=heap)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(kind: str, slices: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return peak memory (MB above the loaded model) and seconds of the second of two gradients."""
    device = choose_device("auto")
    torch.manual_seed(0)
    cnn = SliceCnn(spec_for(options.backbone, PAPER_WINDOWS, options.size, 0.0))
    spec = SequenceSpec(
        cell="lstm", hidden=512, layers=2, bidirectional=True, dropout=0.0, inputs=("embedding",),
        embedding_dim=cnn.embedding_dim,
    )  # fmt: skip
    model = EndToEnd(cnn, build_sequence(spec)).to(device).train()
    for parameter in model.parameters():  # gradients are there whatever the length
        parameter.grad = torch.zeros_like(parameter)
    hu = torch.randint(-1000, 1000, (slices, 1, options.size, options.size), dtype=torch.int16)
    labels, places = torch.zeros(slices, 6, device=device), torch.arange(slices, device=device) * 5.0
    step = functools.partial(gradient, kind, model, hu, labels, places, options, device)
    before, seconds = held(device), 0.0
    for _ in range(2):
        start = time.perf_counter()
        step()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - start
    return {"slices": slices, "peak_mb": round(peak(device) - before), "seconds": round(seconds, 2)}


def gradient(
    kind: str,
    model: EndToEnd,
    hu: torch.Tensor,
    labels: torch.Tensor,
    places: torch.Tensor,
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    """Add one gradient of a series, in chunks or with one graph over everything."""
    context = functools.partial(autocast, device, options.precision)
    if kind == "plain":
        with context():
            loss = weighted_bce(model(hu.to(device), places).float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return
    starts = range(0, len(hu), options.chunk)
    chunks = [lambda start=start: hu[start : start + options.chunk].to(device) for start in starts]
    backward_in_chunks(
        model, chunks, places, lambda logits: weighted_bce(logits.float(), labels), context=context, seed=0
    )


def held(device: torch.device) -> float:
    """Return the memory held now, MB."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        return torch.accelerator.memory_allocated() / 2**20
    return kit.status_mb()


def peak(device: torch.device) -> float:
    """Return the most memory held so far, MB."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_all(_folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all lengths."""
    return run(options)


BENCHMARK = kit.Benchmark(
    "plain backpropagation through the whole series", measure_all, ratios, add_options,
    {"backbone": "resnet10t", "size": 64, "slices": [4, 12], "plain": [12]},
)  # fmt: skip

if __name__ == "__main__":
    options = BENCHMARK.parse(__doc__, sys.argv[1:])
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options)))
    else:
        BENCHMARK.main(__file__, __doc__)
