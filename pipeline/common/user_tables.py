"""Tables that users bring, CSV (also gzipped) or parquet, read so that every complaint names file, line and remedy.

The kind of file is told by its first bytes, not by its name. Columns are found by name. Text is UTF-8, with or
without a byte order mark; other encodings are refused, never guessed.
"""

from __future__ import annotations

import codecs
import csv as text_csv
import gzip
import zlib
from dataclasses import dataclass
from io import TextIOWrapper
from typing import IO, TYPE_CHECKING, Any, Final, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, parquet

from ichpipe.common.errors import DataError
from ichpipe.common.files import require_file

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_REFUSED: Final = {
    b"\xff\xfe": "is UTF-16, as some spreadsheets write it; save it as CSV UTF-8",
    b"\xfe\xff": "is UTF-16, as some spreadsheets write it; save it as CSV UTF-8",
    b"PK": "is a zip archive or a spreadsheet; unpack it, or save it as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "is a spreadsheet; save it as CSV UTF-8",
}
_GZIP: Final = b"\x1f\x8b"
_PARQUET: Final = b"PAR1"
_UNREADABLE: Final = (pa.ArrowException, OSError, EOFError, zlib.error, text_csv.Error)


@dataclass(frozen=True)
class Table:
    """One table as read: CSV columns are text, parquet columns keep their types."""

    path: Path
    role: str  # what the table is to the user: "prediction", "label"
    content: pa.Table
    is_csv: bool

    @property
    def names(self) -> list[str]:
        """The columns' names, in the order of the file."""
        return list(self.content.column_names)

    @property
    def title(self) -> str:
        """How messages call the table."""
        return f"{self.role} table {self.path}"

    def text(self, name: str) -> pa.Array:
        """Return a column as text without outer white space: (rows,). Raises DataError where a cell is empty."""
        column = self._column(name)
        if not pa.types.is_string(column.type):
            column = pc.cast(column, pa.string())
        column = pc.utf8_trim_whitespace(column)
        empty = np.asarray(pc.fill_null(pc.equal(column, ""), fill_value=True))
        self.refuse(empty, f"column {name} is empty; every row needs one")
        return column

    def optional_text(self, name: str) -> pd.Series | None:
        """Return a column as text (rows,), or None where the table has none or a cell of it is empty."""
        if name not in self.names:
            return None
        column = pc.cast(self._column(name), pa.string())
        values = pd.Series(column.to_pandas())
        return None if (values.isna() | (values == "")).any() else values

    def numbers(self, name: str) -> Floats:
        """Return a column as float64 (rows,). Raises DataError at other text; only parquet has empty cells, as NaN."""
        column = self._column(name)
        try:
            values = pc.cast(pc.utf8_trim_whitespace(column) if self.is_csv else column, pa.float64())
        except pa.ArrowInvalid:
            cells = column.to_pandas()
            bad = pd.to_numeric(cells, errors="coerce").isna().to_numpy()
            self.refuse(bad, f"column {name} is not a number", cells)
            raise DataError(f"{self.title}: column {name} holds what is not a number; use a decimal point") from None
        return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.float64)

    def refuse(self, bad: NDArray[np.bool_], complaint: str, values: pd.Series | NDArray[Any] | None = None) -> None:
        """Raise DataError that names the first row marked in ``bad`` (rows,); do nothing where none is."""
        rows = np.flatnonzero(bad)
        if not rows.size:
            return
        row = int(rows[0])
        shown = "" if values is None else f": {str(np.asarray(values)[row])[:80]!r}"
        raise DataError(f"{self.title}, {self._place(row)}: {complaint}{shown} ({rows.size} such row(s))")

    def error(self, complaint: str) -> DataError:
        """Return the error to raise about the table as a whole; the message lists the columns that are there."""
        found = ", ".join(self.names[:12]) + (", …" if len(self.names) > 12 else "")
        return DataError(f"{self.title} {complaint}; its columns: {found}")

    def _column(self, name: str) -> pa.Array:
        return self.content[name].combine_chunks()

    def _place(self, row: int) -> str:
        if not self.is_csv:
            return f"row {row + 1}"
        with _open(self.path) as handle:
            filled = (number for number, line in enumerate(handle, 1) if line.strip())
            for _ in range(row + 1):
                next(filled, None)
            return f"line {next(filled, row + 2)}"


def read_table(path: Path, role: str) -> Table:
    """Read a CSV or parquet file. ``role`` is how messages call it.

    Raises MissingFileError without a file; DataError for another encoding or kind of file, a row with too many or
    too few cells, two columns of one name, or no row.
    """
    head = _head(require_file(path, f"name the {role} table"))
    for start, complaint in _REFUSED.items():
        if head.startswith(start):
            raise DataError(f"{role} table {path} {complaint}")
    is_csv = not head.startswith(_PARQUET)
    content = _read_csv(path, role) if is_csv else _read_parquet(path, role)
    table = Table(path, role, content, is_csv)
    twice = sorted({name for name in table.names if table.names.count(name) > 1})
    if twice:
        raise table.error(f"names {', '.join(twice)} twice in its heading")
    if not len(content):
        raise table.error("has a heading and no rows")
    return table


def _head(path: Path) -> bytes:
    if path.is_dir():
        raise DataError(f"{path} is a folder; name the table in it")
    with path.open("rb") as handle:
        return handle.read(4)


def _open(path: Path) -> IO[bytes]:
    if _head(path).startswith(_GZIP):
        return cast("IO[bytes]", gzip.open(path))
    return path.open("rb")


def _read_csv(path: Path, role: str) -> pa.Table:
    try:
        line = _line_that_is_not_utf8(path)
        if line is not None:
            raise DataError(f"{role} table {path}, line {line}: not UTF-8; save it as CSV UTF-8")
        table = _parse(path, use_threads=True)
    except _UNREADABLE as error:
        raise DataError(f"{role} table {path} can't be read as CSV: {_why(path, error)}") from error
    if len(table.column_names) == 1 and {";", "\t"} & set(table.column_names[0]):
        raise DataError(f"{role} table {path} is separated by semicolons or tabs; save it with commas")
    return table.rename_columns([name.strip() for name in table.column_names])


def _line_that_is_not_utf8(path: Path) -> int | None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with _open(path) as handle:
            while block := handle.read(1 << 22):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        with _open(path) as handle:
            lines = (number for number, line in enumerate(handle, 1) if "\ufffd" in line.decode(errors="replace"))
            return next(lines, 1)
    return None


def _parse(path: Path, *, use_threads: bool, wrong_rows: list[csv.InvalidRow] | None = None) -> pa.Table:
    """Read every column as text; rows with another number of cells are an error, or are put into ``wrong_rows``."""

    def note(row: csv.InvalidRow) -> str:
        if wrong_rows is None:
            return "error"
        wrong_rows.append(row)
        return "skip"

    with TextIOWrapper(_open(path), encoding="utf-8-sig") as heading:
        names = next(text_csv.reader(heading), [])
    with _open(path) as handle:
        return csv.read_csv(
            handle,
            read_options=csv.ReadOptions(use_threads=use_threads),
            parse_options=csv.ParseOptions(invalid_row_handler=note),
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
            ),
        )


def _why(path: Path, error: Exception) -> str:
    """Return the reason with its row, which Arrow only knows when it reads with one thread."""
    reason, wrong_rows = str(error), list[csv.InvalidRow]()
    try:
        _parse(path, use_threads=False, wrong_rows=wrong_rows)
    except _UNREADABLE as again:
        reason = str(again)
    if wrong_rows:
        row = wrong_rows[0]
        return f"line {row.number} has {row.actual_columns} cells where the heading has {row.expected_columns}"
    return " ".join(reason.split())[:300]


def _read_parquet(path: Path, role: str) -> pa.Table:
    try:
        table = parquet.read_table(path, partitioning=None)
        table.rename_columns(table.column_names).validate(full=True)  # names and text that are not UTF-8, too
    except (*_UNREADABLE, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{role} table {path} is no whole parquet file: {reason}; write it again") from error
    return table
