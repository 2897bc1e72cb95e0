"""Slices a second of ``extract``, from DICOM files to the finished store, beside the bare network and bare decoding.

python benchmarks/extract.py --out extract.json                                   # ResNet-50 at 512 px
python benchmarks/extract.py --backbone test_resnet --size 128 --slices 2000      # decoding dominates

One run. First, in a process of its own, the network alone as Python runs it; then in one process that keeps freed
memory as the command does, turn by turn: (a) the network on tensors that are on the device, in batches of `batch_size`
with torch's own threads, and arranged as `extract` does it (the faster counts); (b) reading, decoding and resizing the
same files, in as many threads as `extract` has lanes, and in a plain loop; (c) ``stages.extract`` itself into an empty
store. Everything is imported before. Seconds of (c) are those of the whole call, and those from its first slice on:
what lies between is starting Dask and loading the network, once a run. CPU time stands beside the clock's, for a
machine that others share.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import feeding
import kit
import pydicom
import torch

from ichpipe.common.artifacts import Artifacts
from ichpipe.common.device import autocast, choose_device
from ichpipe.dicom.decode import imagecodecs
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.features import embedder
from ichpipe.features.prefetch import Lanes, usual_loaders
from ichpipe.images.slice_dataset import load_slice, load_slices
from ichpipe.index.slice_index import read_index
from ichpipe.models.header import Framing
from ichpipe.models.slice_cnn import SliceCnn, spec_for
from ichpipe.models.weights import load_slice_cnn, save_model
from ichpipe.params.schema import PAPER_WINDOWS, Params, PhantomParams
from ichpipe.stages import extract, phantom, prepare

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

DRAWN = 100
"""Slices that the phantom draws."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--file-px", type=int, default=512)
    parser.add_argument("--slices", type=int, default=96)
    parser.add_argument("--encodings", nargs="+", default=["uncompressed", "jpeg_lossless"])
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--gpu", default="auto")
    parser.add_argument("--loaders", type=int)
    parser.add_argument("--workers", type=int, default=1, help="processes of extract; their start is timed with it")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--alone", type=Path, help="time the network below these artifacts in this process, and print it"
    )


def ratios(result: dict[str, Any]) -> dict[str, float | None]:
    """Pick the ratios; below 1 is what reading, decoding and writing cost beside the network or the decoding alone."""
    first = result["plain_forward"]["slices_per_second"]
    found = {
        f"{encoding}, over the network as Python runs it, whole call": one["slices_per_second"]["extract"] / first
        for encoding, one in result["encodings"].items()
    }
    return found | {
        f"{encoding}, over {beside} alone, {part}".replace("_", " "): one[f"extract_over_{beside}"][part]
        for encoding, one in result["encodings"].items()
        for beside in ("forward", "decode", "decode_loop")
        for part in ("whole_call", "from_first_slice", "cpu_time")
    }


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure every encoding; ratios are of this run alone."""
    device = choose_device(options.gpu)
    torch.manual_seed(0)
    cnn = SliceCnn(spec_for(options.backbone, PAPER_WINDOWS, options.size, 0.0)).eval()
    loaders = usual_loaders(device.type, options.workers) if options.loaders is None else options.loaders
    studies = -(-min(options.slices, DRAWN) // 20)
    phantom.run(PhantomParams(studies=studies, size_px=options.file_px, seed=0), folder / "phantom")
    found, plain = {}, None
    for encoding in options.encodings:
        params, artifacts = prepared(folder, encoding, options)
        save_model(artifacts.slice_cnn, cnn, {})
        if plain is None:
            plain = plainly(artifacts, options)
        found[encoding] = measure(params, artifacts, cnn, device, loaders, options)
    return {
        "threads": torch.get_num_threads(),
        "device": device.type,
        "imagecodecs": imagecodecs() is not None,
        "loaders": loaders,
        "plain_forward": plain,
        "encodings": found,
    }


def plainly(artifacts: Artifacts, options: argparse.Namespace) -> dict[str, Any]:
    """Run the network alone in a process that is as Python starts it."""
    words = ["--alone", artifacts.root, "--size", options.size, "--gpu", options.gpu, "--batch", options.batch]
    words += ["--precision", options.precision, "--rounds", options.rounds]
    line = [sys.executable, __file__, *map(str, words)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, env=kit.plain_heap())
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def alone(artifacts: Artifacts, options: argparse.Namespace) -> dict[str, Any]:
    """Run the network alone in this process."""
    device = choose_device(options.gpu)
    paths = read_index(artifacts.index)["path"].tolist()
    hu, cnn = (
        load_slices(paths, Framing(options.size)).to(device),
        load_slice_cnn(artifacts.slice_cnn).eval().to(device),
    )
    rounds = [timed(partial(forward, cnn, hu, options.batch, options.precision)) for _ in range(options.rounds)]
    return {"slices_per_second": len(paths) / min(one["seconds"] for one in rounds), "rounds": rounds}


def prepared(folder: Path, encoding: str, options: argparse.Namespace) -> tuple[Params, Artifacts]:
    """Write the files of one encoding and index them; beyond DRAWN slices the same again under other UIDs."""
    place = folder / encoding
    files = sorted((folder / "phantom" / "dicom").rglob("*.dcm"))[: min(options.slices, DRAWN)]
    for number, path in enumerate(files):
        target = place / f"0-{number}.dcm"
        if encoding == "uncompressed":
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
        else:
            feeding.encoded(path, target, feeding.ENCODINGS[encoding])
    for number in range(len(files), options.slices):
        copy, original = divmod(number, len(files))
        again(place / f"0-{original}.dcm", place / f"{copy}-{original}.dcm", copy)
    settings = {
        "prepare": {"dataset": "folder", "labels": None, "dicom_dir": str(place), "size_px": options.size},
        "extract": {"batch_size": options.batch, "precision": options.precision},
    }
    params, artifacts = Params.model_validate(settings), Artifacts(folder / f"artifacts-{encoding}")
    prepare.run(params.prepare, artifacts.index_dir)
    return params, artifacts


def again(source: Path, target: Path, copy: int) -> None:
    """Write a file under other UIDs."""
    with quiet_pydicom():
        dataset = pydicom.dcmread(source)
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            setattr(dataset, keyword, f"{dataset[keyword].value}.{copy}")
        dataset.save_as(target)


def measure(
    params: Params,
    artifacts: Artifacts,
    cnn: SliceCnn,
    device: torch.device,
    loaders: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Take turns; of each kind the round of the least CPU time counts, and all are listed."""
    paths = read_index(artifacts.index)["path"].tolist()
    hu = load_slices(paths, Framing(options.size)).to(device)
    kinds: dict[str, Callable[[], float | None]] = {
        "forward": partial(forward, cnn.to(device), hu, options.batch, options.precision),
        "forward_as_extract": partial(forward_as_extract, cnn, hu, loaders * options.workers, options.precision),
        "decode": partial(decode, paths, options.size, max(1, loaders * options.workers)),
        "decode_loop": partial(decode, paths, options.size, 1),
        "extract": partial(extracted, params, artifacts, options.gpu, loaders, options.workers),
    }
    rounds = {kind: [timed(action) for _ in range(1)] for kind, action in kinds.items()}
    for _ in range(options.rounds - 1):
        for kind, action in kinds.items():
            rounds[kind].append(timed(action))
    best = {
        name: {kind: min(one[name] for one in of_kind) for kind, of_kind in rounds.items() if name in of_kind[0]}
        for name in ("seconds", "cpu_seconds", "from_first_slice")
    }
    whole, cpu = best["seconds"], best["cpu_seconds"]
    bare = min(whole["forward"], whole["forward_as_extract"])
    running = best["from_first_slice"]["extract"]
    return {
        "slices": len(paths),
        "slices_per_second": {kind: len(paths) / seconds for kind, seconds in whole.items()}
        | {"extract_from_first_slice": len(paths) / running},
        "extract_over_forward": {"whole_call": bare / whole["extract"], "from_first_slice": bare / running}
        | {"cpu_time": min(cpu["forward"], cpu["forward_as_extract"]) / cpu["extract"]},
        **{
            f"extract_over_{kind}": {
                "whole_call": whole[kind] / whole["extract"],
                "from_first_slice": whole[kind] / running,
                "cpu_time": cpu[kind] / cpu["extract"],
            }
            for kind in ("decode", "decode_loop")
        },
        "rounds": rounds,
    }


def timed(action: Callable[[], float | None]) -> dict[str, float]:
    """Run once: seconds by the clock, of CPU, and from the moment on that the action names."""
    start, before = time.perf_counter(), cpu_seconds()
    moment = action()
    end = time.perf_counter()
    found = {"seconds": end - start, "cpu_seconds": cpu_seconds() - before}
    return found if moment is None else found | {"from_first_slice": end - moment}


def cpu_seconds() -> float:
    """Return what this process has used, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@torch.inference_mode()
def forward(cnn: SliceCnn, hu: torch.Tensor, batch: int, precision: str) -> None:
    """Run the network alone, batch by batch."""
    with autocast(hu.device, precision):
        for part in torch.split(hu, batch):
            cnn(part)
    if hu.device.type != "cpu":
        torch.accelerator.synchronize()


def forward_as_extract(cnn: SliceCnn, hu: torch.Tensor, loaders: int, precision: str) -> None:
    """Run the network alone in the lanes of a CPU; on a GPU there is one way."""
    if hu.device.type != "cpu":
        forward(cnn, hu, len(hu), precision)
        return
    lanes = Lanes(max(1, loaders))
    parts = torch.split(hu, embedder.lane_batch(hu.shape[-1], len(hu)))
    lanes.map(lambda part: forward(cnn, part, len(part), precision), parts, Lock())
    lanes.close()


def decode(paths: Sequence[str], size_px: int, threads: int) -> None:
    """Read, decode and resize, nothing else; one thread: a plain loop."""
    if threads == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        for path in paths:
            load_slice(path, Framing(size_px))
        torch.set_num_threads(before)
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.map(lambda path: load_slice(path, Framing(size_px)), paths, chunksize=16):
            pass


def extracted(params: Params, artifacts: Artifacts, gpu: str, loaders: int, workers: int) -> float:
    """Fill an empty store; return when the first slice was asked for, or the start where other processes are."""
    start = time.perf_counter()
    shutil.rmtree(artifacts.embeddings, ignore_errors=True)
    moments: list[float] = []
    original = embedder.SliceEmbedder.__call__

    def noted(self: embedder.SliceEmbedder, slices: Sequence[embedder.SliceInput]) -> Any:
        moments.append(time.perf_counter())
        return original(self, slices)

    embedder.SliceEmbedder.__call__ = noted  # type: ignore[method-assign]
    try:
        extract.run(params, artifacts, gpu, workers, loaders=loaders)
    finally:
        embedder.SliceEmbedder.__call__ = original  # type: ignore[method-assign]
    return min(moments, default=start)


BENCHMARK = kit.Benchmark(
    "the network on tensors on the device, and decoding alone", run, ratios, add_options,
    {"backbone": "test_byobnet", "size": 32, "file_px": 64, "slices": 130, "rounds": 1, "gpu": "cpu", "loaders": 2},
)  # fmt: skip

if __name__ == "__main__":
    chosen = BENCHMARK.parse(__doc__, sys.argv[1:])
    if chosen.alone:
        print(json.dumps(alone(Artifacts(chosen.alone), chosen)))
    else:
        kit.like_the_command()
        BENCHMARK.main(__file__, __doc__)
