"""Three ways to cache embeddings that a user might take instead, written from their published descriptions.

``npz``: a torch DataLoader, and ``numpy.savez`` per split (RSNA 2019, 2nd place). ``memmap``: one float16 memory map
and a table that says which slice lies in which row (i-pan). ``monai``: MONAI's PersistentDataset, the network its last
transform, an item a series; without that, it would keep images and run the network in every epoch.

All are given our slice CNN (channels-last, windows on the device), our resizing, our sequence network (packed), float16
in the cache, and as many loading processes as there are threads. None checks what made a cache, nor what is in it.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pydicom
import torch
from torch.utils.data import DataLoader, Dataset

from ichpipe.common.classes import CLASSES
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.images.framing import fit_to_size
from ichpipe.models.header import SequenceSpec
from ichpipe.models.sequence import POSITION, build_sequence
from ichpipe.models.weights import load_slice_cnn
from ichpipe.training.trainer import weighted_bce

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SPLITS = {"train": 0.6, "val": 0.15, "test": 0.25}
BATCH_SLICES, BATCH_SERIES = 64, 8


def read_hu(path: str) -> np.ndarray:
    """Return Hounsfield units as pydicom's own means give them."""
    dataset = pydicom.dcmread(path)
    return (dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)).astype(np.int16)


class SliceFiles(Dataset):
    """Files as int16 HU (1, size, size)."""

    def __init__(self, paths: list[str], size_px: int) -> None:
        self.paths, self.size_px = paths, size_px

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        """Read one."""
        with quiet_pydicom():
            return fit_to_size(read_hu(self.paths[row]), self.size_px)


def read_table(dicom: Path, labels: Path) -> pd.DataFrame:
    """Return one row a slice, series by series along the slice normal, with labels and a split by patient."""
    rows = []
    with quiet_pydicom():
        for path in sorted(dicom.rglob("*.dcm")):
            header = pydicom.dcmread(path, stop_before_pixels=True)
            across, down = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
            place = float(np.cross(across, down) @ np.array(header.ImagePositionPatient, float))
            rows.append((str(path), str(header.PatientID), str(header.SeriesInstanceUID), path.stem, place))
    table = pd.DataFrame(rows, columns=["path", "patient", "series", "sop", "place"])
    named = pd.read_csv(labels)
    named[["sop", "class"]] = named["ID"].str.rsplit("_", n=1, expand=True)
    wide = named.drop_duplicates("ID").pivot_table(index="sop", columns="class", values="Label")[list(CLASSES)]
    table = table.join(wide, on="sop").sort_values(["series", "place"], ignore_index=True)
    patients = np.random.default_rng(0).permutation(table["patient"].unique())
    ends = np.round(np.cumsum([*SPLITS.values()])[:-1] * len(patients)).astype(int)
    parts = zip(SPLITS, np.split(patients, ends), strict=True)
    return table.assign(split=table["patient"].map({who: name for name, part in parts for who in part}))


class Npz:
    """A DataLoader, and one npz file a split, read whole."""

    def __init__(self, folder: Path, model: Path, threads: int) -> None:
        self.folder, self.model, self.threads = folder, model, threads

    def fill(self, table: pd.DataFrame) -> None:
        """Embed each split and save it with its labels."""
        cnn = load_slice_cnn(self.model).eval()
        for split, part in table.groupby("split", sort=False):
            rows = np.concatenate([*embedded(cnn, part["path"].tolist(), self.threads)])
            names = part["series"].to_numpy().astype(str)
            np.savez(
                self.folder / f"{split}.npz", rows=rows, labels=part[list(CLASSES)].to_numpy(np.float32), names=names
            )

    def series(self, split: str) -> Dataset:
        """Load a split."""
        with np.load(self.folder / f"{split}.npz") as file:
            rows, labels, names = file["rows"], file["labels"], file["names"]
        return Ranges(rows, labels, names)


class Memmap(Npz):
    """One memory map of all rows, and a table of what they are."""

    def fill(self, table: pd.DataFrame) -> None:
        """Embed all slices into the map."""
        cnn = load_slice_cnn(self.model).eval()
        rows = np.memmap(self.folder / "rows.dat", np.float16, "w+", shape=(len(table), cnn.embedding_dim))
        at = 0
        for part in embedded(cnn, table["path"].tolist(), self.threads):
            rows[at : at + len(part)] = part
            at += len(part)
        rows.flush()
        table.drop(columns="path").to_csv(self.folder / "rows.csv", index_label="row")

    def series(self, split: str) -> Dataset:
        """Open the map; a split's series are ranges of rows."""
        table = pd.read_csv(self.folder / "rows.csv", dtype={"series": str})
        rows = np.memmap(self.folder / "rows.dat", np.float16, "r").reshape(len(table), -1)
        there = table["split"] == split
        labels = table[list(CLASSES)].to_numpy(np.float32)
        return Ranges(rows, labels, table["series"].to_numpy(), np.flatnonzero(there))


class Monai(Npz):
    """A file for each series, written by PersistentDataset where it is first asked for."""

    def fill(self, table: pd.DataFrame) -> None:
        """List the series, and ask for each once, in as many processes as there are threads."""
        items: dict[str, list[Any]] = {name: [] for name in SPLITS}
        for (split, _), part in table.groupby(["split", "series"], sort=False):
            items[split].append({"paths": part["path"].tolist(), "labels": part[list(CLASSES)].to_numpy().tolist()})
        (self.folder / "items.json").write_text(json.dumps(items))
        for split in SPLITS:
            for _ in DataLoader(self.series(split), batch_size=None, num_workers=self.threads):
                pass

    def series(self, split: str) -> Dataset:
        """Open a split."""
        from monai.data import PersistentDataset  # noqa: PLC0415 - not a dependency
        from monai.transforms import Transform  # noqa: PLC0415

        model, size = self.model, BATCH_SLICES

        class Embed(Transform):
            cnn: Any = None

            @torch.inference_mode()
            def __call__(self, item: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
                if self.cnn is None:  # once a process
                    type(self).cnn = load_slice_cnn(model).eval()
                files = SliceFiles(item["paths"], self.cnn.spec.size_px)
                hu = torch.stack([files[row] for row in range(len(files))])
                rows = torch.cat([self.cnn(part)[0].half() for part in hu.split(size)])
                return rows.clone(), torch.tensor(item["labels"])

        items = json.loads((self.folder / "items.json").read_text())[split]
        found: Dataset = PersistentDataset(items, [Embed()], cache_dir=self.folder / "monai")
        return found


CONTENDERS: dict[str, Callable[[Path, Path, int], Npz]] = {"npz": Npz, "memmap": Memmap, "monai": Monai}


class Ranges(Dataset):
    """Series as runs of rows: float16 (n, D) and labels (n, 6)."""

    def __init__(
        self, rows: np.ndarray, labels: np.ndarray, names: np.ndarray, chosen: np.ndarray | None = None
    ) -> None:
        self.rows, self.labels = rows, labels
        chosen = np.arange(len(names)) if chosen is None else chosen
        runs = pd.Series(chosen).groupby(names[chosen], sort=False)
        self.runs = [(int(run.iloc[0]), int(run.iloc[-1]) + 1) for _, run in runs]

    def __len__(self) -> int:
        """Return the number of series."""
        return len(self.runs)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read one series."""
        start, stop = self.runs[number]
        return torch.from_numpy(np.array(self.rows[start:stop])), torch.from_numpy(self.labels[start:stop])


@torch.inference_mode()
def embedded(cnn: Any, paths: list[str], threads: int) -> Any:
    """Yield float16 rows batch by batch, decoded by processes ahead of the network."""
    loader = DataLoader(SliceFiles(paths, cnn.spec.size_px), batch_size=BATCH_SLICES, num_workers=threads)
    for hu in loader:
        yield cnn(hu)[0].half().numpy()


def padded(items: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Join series to (B, T, D) float32, labels (B, T, 6) and lengths (B,)."""
    rows, labels = (torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in zip(*items, strict=True))
    return rows.float(), labels, torch.tensor([len(one) for one, _ in items])


def train(contender: Npz, hidden: int, embedding_dim: int) -> dict[str, float]:
    """Train one epoch of the paper's BiLSTM and validate; return both losses."""
    torch.manual_seed(0)
    spec = SequenceSpec(
        cell="lstm", hidden=hidden, layers=2, bidirectional=True, dropout=0.0, inputs=("embedding",),
        embedding_dim=embedding_dim,
    )  # fmt: skip
    model = build_sequence(spec)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-2)
    losses = {}
    for split in ("train", "val"):
        model.train(split == "train")
        loader = DataLoader(
            contender.series(split), batch_size=BATCH_SERIES, shuffle=split == "train", collate_fn=padded
        )
        total = n = 0.0
        for rows, labels, lengths in loader:
            with torch.set_grad_enabled(split == "train"):
                logits = model({"embedding": rows, POSITION: torch.zeros(rows.shape[:2])}, lengths)
                there = torch.arange(rows.shape[1]) < lengths[:, None]
                loss = weighted_bce(logits[there], labels[there])
            if split == "train":
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
            total, n = total + float(loss.detach()) * int(lengths.sum()), n + int(lengths.sum())
        losses[split] = total / n
    torch.save(model.state_dict(), contender.folder / f"sequence-{hidden}.pt")
    return losses


def first(contender: Npz, dicom: Path, labels: Path, hidden: int) -> dict[str, Any]:
    """Go from files to the end of the first epoch."""
    start = time.perf_counter()
    table = read_table(dicom, labels)
    listed = time.perf_counter()
    contender.fill(table)
    filled = time.perf_counter()
    losses = train(contender, hidden, load_slice_cnn(contender.model).embedding_dim)
    return {
        "list": listed - start,
        "fill": filled - listed,
        "epoch": time.perf_counter() - filled,
        "losses": losses,
        "mean_magnitude": magnitude(contender),
    }


def magnitude(contender: Npz) -> float:
    """Return the mean absolute value of all that is cached, to show that all contenders computed the same."""
    parts = [contender.series(split) for split in SPLITS]
    sums = [
        (float(rows.double().abs().sum()), rows.numel())
        for part in parts
        for rows, _ in (part[n] for n in range(len(part)))
    ]
    return sum(one for one, _ in sums) / sum(n for _, n in sums)
