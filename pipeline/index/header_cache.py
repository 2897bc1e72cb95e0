"""Cache of headers between scans: a file of the same path, size and time is not read again.

One folder of Parquet parts. A part is written whole or not at all, so a stopped scan goes on after its last part.
Parts name the code and the codecs that made them; others are deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from ichpipe import dicom, nifti
from ichpipe.common.errors import NotOpenedError
from ichpipe.common.files import atomic_path, installed_versions
from ichpipe.dicom import archive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ichpipe.dicom.archive import ListedFile

_ROOMS: Final = [Path(str(room.__file__)).parent for room in (dicom, nifti)]
_MAKER: Final = b"ichpipe.dicom.slice_header"
_CODECS: Final = (
    "pydicom", "numpy", "imagecodecs", "pylibjpeg", "pylibjpeg-openjpeg", "pylibjpeg-libjpeg", "pylibjpeg-rle",
    "python-gdcm", "pyjpegls", "nibabel",
)  # fmt: skip
_PART: Final = "headers-{:06d}.parquet"
_PARTS: Final = "headers-*.parquet"


class HeaderCache:
    """Rows of HEADER_SCHEMA by path, size and stamp, in one folder; None keeps nothing."""

    def __init__(self, folder: Path | None, schema: pa.Schema, mark: str = "") -> None:
        """Read all parts; a damaged part, or one by other code or with another ``mark``, is deleted."""
        # What decides the content of a row: our reading code and the installed codecs.
        maker = hashlib.sha256(b"".join(path.read_bytes() for room in _ROOMS for path in sorted(room.glob("*.py"))))
        versions = dict.fromkeys(_CODECS, "none") | installed_versions(_CODECS)
        maker.update("".join(f"{name} {version}\n" for name, version in versions.items()).encode())
        self._folder = folder
        self._schema = schema.with_metadata({_MAKER: f"{maker.hexdigest()}{mark}".encode()})
        self._parts = [] if folder is None else sorted(folder.glob(_PARTS))
        self._tables = [table for path in self._parts if (table := self._read(path)) is not None]

    def split(self, files: Sequence[ListedFile]) -> tuple[pa.Table, list[ListedFile]]:
        """Return the rows of unchanged ``files``, and the files that must be read."""
        table = pa.concat_tables([self._schema.empty_table(), *self._tables])
        if not len(table):
            return table, list(files)
        rows = pa.table({"path": table["path"], "row": np.arange(len(table))})
        last = rows.group_by("path").aggregate([("row", "max")])
        matches = pc.index_in(pa.array([archive.portable(file.path) for file in files], pa.string()), last["path"])
        row = np.asarray(pc.fill_null(last["row_max"].take(matches), -1), dtype=np.int64)
        sizes, stamps = (np.array([getattr(file, name) for file in files], np.int64) for name in ("size", "stamp"))
        same = (row >= 0) & (np.asarray(table["size"])[row] == sizes) & (np.asarray(table["stamp"])[row] == stamps)
        return table.take(row[same]), [files[number] for number in np.flatnonzero(~same).tolist()]

    def add(self, table: pa.Table) -> None:
        """Write a chunk of rows to disk at once."""
        if self._folder is not None:
            number = 1 + max((int(path.stem.rpartition("-")[2]) for path in self._parts), default=0)
            self._parts.append(self._write(self._folder, number, table))

    def compact(self, table: pa.Table) -> None:
        """Put all rows that still stand for a file into one part, and delete the others."""
        if self._folder is None or self._parts == [self._folder / _PART.format(0)]:
            return
        kept = self._write(self._folder, 0, table)
        for path in self._parts:
            if path != kept:
                path.unlink(missing_ok=True)
        self._parts = [kept]

    def _write(self, folder: Path, number: int, table: pa.Table) -> Path:
        """Write all rows but those of files that could not be opened: the next scan tries these again."""
        opened = pc.invert(pc.fill_null(pc.equal(table["code"], NotOpenedError.code), fill_value=False))
        path = folder / _PART.format(number)
        with atomic_path(path) as temporary:
            parquet.write_table(table.filter(opened).cast(self._schema), temporary, compression="zstd")
        return path

    def _read(self, path: Path) -> pa.Table | None:
        with contextlib.suppress(pa.ArrowInvalid, OSError):
            table = parquet.read_table(path)
            if table.schema.equals(self._schema, check_metadata=True):
                return table
        path.unlink(missing_ok=True)
        return None
