"""Slices a second from files of three encodings and from the pixel cache, on one core.

python benchmarks/feeding.py --out feeding.json               # phantom slices of 512 px
python benchmarks/feeding.py --dicom SERIES                   # a series of your own (uncompressed files)

The same slices, uncompressed, as JPEG lossless and as JPEG 2000 lossless (written by GDCM), read in one random order,
resized to the size of the model. The cache reads the same whatever the encoding; filling it costs one decoding.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gdcm
import kit
import numpy as np
import pandas as pd
import torch

from ichpipe.common.files import digest_of_file
from ichpipe.images.pixel_cache import fill_pixel_cache
from ichpipe.images.slice_dataset import load_slice
from ichpipe.models.header import Framing
from ichpipe.params.schema import PhantomParams
from ichpipe.stages import phantom

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

ENCODINGS = {
    "jpeg_lossless": gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    "jpeg_2000_lossless": gdcm.TransferSyntax.JPEG2000Lossless,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--dicom", type=Path)
    parser.add_argument("--file-px", type=int, default=512)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 256])
    parser.add_argument("--slices", type=int, default=120)


def ratios(result: dict[str, Any]) -> dict[str, float | None]:
    """Pick the ratios; above 1 the cache is faster."""
    return {
        f"{encoding}, {one['size_px']} px": value
        for one in result["sizes"]
        for encoding, value in one["cache_over_decoding"].items()
    }


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure each encoding and the cache at each size; ratios are cache over decoding."""
    torch.set_num_threads(1)
    files = {"uncompressed": originals(folder, options)}
    for name, syntax in ENCODINGS.items():
        files[name] = [
            encoded(path, folder / name / f"{number}.dcm", syntax) for number, path in enumerate(files["uncompressed"])
        ]
    sizes = []
    for size in options.sizes:
        rates = {
            name: rate(lambda path, size=size: load_slice(path, Framing(size)), paths) for name, paths in files.items()
        }
        index = pd.DataFrame({"path": [str(path) for path in files["uncompressed"]]})
        index["file_digest"] = [digest_of_file(path) for path in files["uncompressed"]]
        start = time.perf_counter()
        cache = fill_pixel_cache(folder / "cache", index, Framing(size))
        filled = time.perf_counter() - start
        cached = rate(lambda path, cache=cache: cache.read(str(path)), files["uncompressed"])
        disk = sum(path.stat().st_size for path in cache.folder.rglob("*") if path.is_file())
        sizes.append(
            {
                "size_px": size,
                "slices_per_second": rates | {"pixel_cache": cached},
                "cache_over_decoding": {name: cached / found for name, found in rates.items()},
                "fill_seconds_per_slice": filled / len(index),
                "kilobytes_per_slice": disk / len(index) / 1024,
            }
        )
    return {"slices": len(files["uncompressed"]), "sizes": sizes}


def originals(folder: Path, options: argparse.Namespace) -> list[Path]:
    """Return uncompressed files: the user's, or those of a phantom."""
    if options.dicom is None:
        studies = -(-options.slices // 20)
        phantom.run(PhantomParams(studies=studies, size_px=options.file_px, seed=0), folder / "phantom")
    source = options.dicom or folder / "phantom" / "dicom"
    return sorted(path for path in source.rglob("*.dcm"))[: options.slices]


def encoded(source: Path, target: Path, syntax: int) -> Path:
    """Write a file again in another transfer syntax."""
    target.parent.mkdir(exist_ok=True)
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(source))
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    if not reader.Read():
        raise RuntimeError(f"{source} can't be read")
    change.SetInput(reader.GetImage())
    if not change.Change():
        raise RuntimeError(f"{source} can't be written as {syntax}")
    writer.SetFileName(str(target))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    if not writer.Write():
        raise RuntimeError(f"{target} can't be written")
    return target


def rate(read: Any, paths: Sequence[Path]) -> float:
    """Return slices a second over all files in a random order, the better of two rounds."""
    order = np.random.default_rng(0).permutation(len(paths))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        for number in order:
            read(paths[number])
        seconds.append(time.perf_counter() - start)
    return len(paths) / min(seconds)


BENCHMARK = kit.Benchmark(
    "decoding the files of each encoding", run, ratios, add_options,
    {"file_px": 64, "sizes": [32], "slices": 20},
)  # fmt: skip

if __name__ == "__main__":
    BENCHMARK.main(__file__, __doc__)
