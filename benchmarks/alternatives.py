"""From DICOM files to the end of the first epoch of stage two, and a second arm, beside what a user might take instead.

python benchmarks/alternatives.py --out alternatives.json                            # a phantom
python benchmarks/alternatives.py --dicom FOLDER --labels stage_2_train.csv          # files of your own, RSNA's layout

The others are in contenders.py. Each way is a process of its own, in turns, and its time is that of the whole process,
start and imports included; ours is `prepare`, `extract` and `fit-sequence` with all their checks, digests, checkpoints,
records and predictions of what is held out. The second arm has another width, and is a new process for all.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kit

if TYPE_CHECKING:
    import argparse

OURS, OTHERS = "ichpipe", ("npz", "memmap", "monai")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--dicom", type=Path)
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--studies", type=int, default=36, help="of the phantom")
    parser.add_argument("--file-px", type=int, default=512, help="of the phantom")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--hidden", type=int, nargs=2, default=[512, 256], help="of the first arm and the second")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="of ichpipe extract")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("NAME", "ARM"), help="run one in this process, in --folder")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run all of them in turns; the fastest of the rounds counts."""
    prepare_inputs(folder, options)
    names = [OURS, *(name for name in OTHERS if name != "monai" or importlib.util.find_spec("monai"))]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in names if number % 2 == 0 else reversed(names):
            rounds[name].append(one_round(folder, name, options))
    return {
        "slices": len(list(Path((folder / "dicom.txt").read_text()).rglob("*.dcm"))),
        "rounds": rounds,
        "seconds": {
            name: {arm: min(one[arm]["seconds"] for one in found) for arm in ("first", "second")}
            for name, found in rounds.items()
        },
    }


def prepare_inputs(folder: Path, options: argparse.Namespace) -> None:
    """Make the files and the network that all share."""
    import torch  # noqa: PLC0415

    from ichpipe.models.slice_cnn import SliceCnn, spec_for  # noqa: PLC0415
    from ichpipe.models.weights import save_model  # noqa: PLC0415
    from ichpipe.params.schema import PAPER_WINDOWS, PhantomParams  # noqa: PLC0415
    from ichpipe.stages import phantom  # noqa: PLC0415

    if options.dicom is None:
        made = PhantomParams(studies=options.studies, size_px=options.file_px, seed=0)
        phantom.run(made, folder / "phantom")
    source = options.dicom or folder / "phantom" / "dicom"
    for path in source.rglob("*.dcm"):
        path.read_bytes()  # into memory, for all alike
    (folder / "dicom.txt").write_text(str(source))
    (folder / "labels.txt").write_text(str(options.labels or folder / "phantom" / "stage_2_train.csv"))
    torch.manual_seed(0)
    save_model(folder / "slice-cnn", SliceCnn(spec_for(options.backbone, PAPER_WINDOWS, options.size, 0.0)), {})


def one_round(folder: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run both arms of one way, each as a process; what it left is removed afterwards."""
    own = folder / name
    own.mkdir()
    found = {}
    for arm in ("first", "second"):
        words = ["--folder", folder, "--one", name, arm, "--hidden", *options.hidden, "--threads", options.threads]
        words += ["--workers", options.workers, "--size", options.size]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, *map(str, words)], stdout=subprocess.PIPE, text=True, check=True,
            env=kit.own_heap() if name == OURS else None,  # as the command gives it to itself
        )  # fmt: skip
        found[arm] = {"seconds": round(time.perf_counter() - start, 2), **json.loads(done.stdout.splitlines()[-1])}
    cache = own / "embeddings.zarr" if name == OURS else own
    files = [path for path in cache.rglob("*") if path.is_file() and not path.name.startswith("sequence-")]
    found["cache"] = {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}
    shutil.rmtree(own)
    return found


def run_one(options: argparse.Namespace) -> dict[str, Any]:
    """Run one way in this process; seconds of its parts."""
    import torch  # noqa: PLC0415

    torch.set_num_threads(options.threads)
    name, arm = options.one
    folder = options.folder
    dicom, labels = (Path((folder / f"{what}.txt").read_text()) for what in ("dicom", "labels"))
    if name == OURS:
        return ours(folder, dicom, labels, arm, options)
    import contenders  # noqa: PLC0415

    other = contenders.CONTENDERS[name](folder / name, folder / "slice-cnn", options.threads)
    if arm == "first":
        return contenders.first(other, dicom, labels, options.hidden[0])
    start = time.perf_counter()
    losses = contenders.train(other, options.hidden[1], contenders.load_slice_cnn(other.model).embedding_dim)
    return {"epoch": time.perf_counter() - start, "losses": losses}


def ours(folder: Path, dicom: Path, labels: Path, arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run the stages as the commands do."""
    from ichpipe.common.artifacts import Artifacts  # noqa: PLC0415
    from ichpipe.common.files import digest_of_file  # noqa: PLC0415
    from ichpipe.models.weights import load_slice_cnn, save_model  # noqa: PLC0415
    from ichpipe.params.schema import Params  # noqa: PLC0415
    from ichpipe.stages import extract, fit_sequence, prepare  # noqa: PLC0415

    recipe = {"epochs": 1, "cell": "lstm", "layers": 2}
    arms = {word: recipe | {"hidden": width} for word, width in zip(("first", "second"), options.hidden, strict=True)}
    data = {"dicom_dir": str(dicom), "labels": str(labels), "size_px": options.size}
    params = Params.model_validate({"prepare": data, "sequence": arms, "finetune": {"arm": "first"}})
    artifacts, times = Artifacts(folder / OURS), [time.perf_counter()]
    if arm == "first":
        prepare.run(params.prepare, artifacts.index_dir, 1, artifacts.resume("prepare"))
        made_from = {"index": digest_of_file(artifacts.index)}  # as fit-slices would have left it
        save_model(artifacts.slice_cnn, load_slice_cnn(folder / "slice-cnn"), made_from)
        times.append(time.perf_counter())
        extract.run(params, artifacts, "cpu", options.workers)
        times.append(time.perf_counter())
    fit_sequence.run(params, artifacts, arm, "cpu")
    times.append(time.perf_counter())
    parts = dict(zip(("list", "fill", "epoch") if arm == "first" else ("epoch",), _steps(times), strict=True))
    return parts | ({"mean_magnitude": _magnitude(artifacts)} if arm == "first" else {})


def _steps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def _magnitude(artifacts: Any) -> float:
    import numpy as np  # noqa: PLC0415

    from ichpipe.cache.reader import EmbeddingStore  # noqa: PLC0415

    store = EmbeddingStore(artifacts.embeddings)
    rows = np.concatenate([store.embedding(uid) for uid in store.series_uids])
    return float(np.abs(rows.astype(np.float64)).mean())


def ratios(result: dict[str, Any]) -> dict[str, float | None]:
    """Pick the ratios: times as long as ours."""
    found: dict[str, float | None] = {}
    for name in OTHERS:
        for arm, words in (("first", "to the end of the first epoch"), ("second", "second arm")):
            there = result["seconds"].get(name)
            found[f"{name}, {words}"] = there[arm] / result["seconds"][OURS][arm] if there else None
    return found


BENCHMARK = kit.Benchmark(
    "ichpipe prepare, extract and fit-sequence", measure, ratios, add_options,
    {"studies": 10, "file_px": 64, "backbone": "resnet10t", "size": 32, "hidden": [16, 8], "rounds": 1},
)  # fmt: skip

if __name__ == "__main__":
    options = BENCHMARK.parse(__doc__, sys.argv[1:])
    if options.one:
        print(json.dumps(run_one(options)))
    else:
        BENCHMARK.main(__file__, __doc__)
