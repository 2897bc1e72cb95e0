"""Readers of the user's tables, CSV (also gzipped) or parquet; errors name file, line and remedy.

The first bytes of a file tell its format, not its name. Columns are found by name. Text must be UTF-8, with or without
a byte order mark.
"""

from __future__ import annotations

import codecs
import csv as text_csv
import difflib
import gzip
import re
import zlib
from dataclasses import dataclass
from io import TextIOWrapper
from typing import IO, TYPE_CHECKING, Any, Final, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, parquet

from ichpipe.common.constants import ABBREVIATIONS
from ichpipe.common.errors import DataError
from ichpipe.common.files import require_file

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

_OTHER_FORMATS: Final = {
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), "is UTF-16, as some spreadsheets write it; save it as CSV UTF-8"),
    b"PK": "is a zip archive or a spreadsheet; unpack it, or save it as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "is a spreadsheet; save it as CSV UTF-8",
    **dict.fromkeys((b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd"), "is compressed, not by gzip; unpack it"),
}
NEAR: Final = 0.8  # likeness of two headings, from 0 to 1
_SYNONYMS: Final = {
    **{abbreviation.casefold(): name for name, abbreviation in ABBREVIATIONS.items()},
    **dict.fromkeys(("hemorrhage", "haemorrhage", "bleed"), "any"),
    "extradural": "epidural",
    "intracerebral": "intraparenchymal",
}
_NEGATIONS: Final = frozenset({"no", "not", "non", "without"})
_ERRORS: Final = (pa.ArrowException, OSError, EOFError, zlib.error, text_csv.Error)


@dataclass(frozen=True)
class Table:
    """A table as read: CSV columns are text, parquet columns keep their types."""

    path: Path
    role: str  # for messages: "prediction", "label"
    content: pa.Table
    is_csv: bool

    @property
    def names(self) -> list[str]:
        """The column names in the order of the file."""
        return list(self.content.column_names)

    @property
    def title(self) -> str:
        """The name of the table in messages."""
        return f"{self.role} table {self.path}"

    def text(self, name: str) -> pa.Array:
        """Return a column as text (rows,) without surrounding white space. Raises DataError at an empty cell."""
        column = pc.utf8_trim_whitespace(pc.cast(self.content[name].combine_chunks(), pa.string()))
        empty = np.asarray(pc.fill_null(pc.equal(column, ""), fill_value=True))
        self.refuse(empty, f"column {name} is empty; every row needs a value")
        return column

    def optional_text(self, name: str) -> pd.Series | None:
        """Return a column as text (rows,), or None if it is absent or has an empty cell."""
        values = self.sparse_text(name)
        return None if values is None or values.isna().any() else values

    def sparse_text(self, name: str) -> pd.Series | None:
        """Return a column as text (rows,), NaN where a cell is empty, or None if it is absent."""
        if name not in self.names:
            return None
        values = pd.Series(pc.cast(self.content[name].combine_chunks(), pa.string()).to_pandas())
        return values.mask(values == "")

    def numbers(self, name: str) -> NDArray[np.float64]:
        """Return a column as float64 (rows,). Raises DataError at other text; empty cells of parquet are NaN."""
        column = self.content[name].combine_chunks()
        try:
            values = pc.cast(pc.utf8_trim_whitespace(column) if self.is_csv else column, pa.float64())
        except pa.ArrowInvalid:
            cells = column.to_pandas()
            is_text = pd.to_numeric(cells, errors="coerce").isna().to_numpy()
            self.refuse(is_text, f"column {name} is not a number", cells)
            raise DataError(f"{self.title}: column {name} has a cell that is no number; use a decimal point") from None
        return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.float64)

    def refuse(self, bad: NDArray[np.bool_], complaint: str, values: Any = None) -> None:
        """Raise DataError that names the first row marked in ``bad`` (rows,) and its value, if any row is marked.

        ``values`` (rows,) holds the cells that the message quotes: an array or a Series.
        """
        if (rows := np.flatnonzero(bad)).size:
            row = int(rows[0])
            value = "" if values is None else f": {str(np.asarray(values)[row])[:80]!r}"
            raise DataError(f"{self.title}, {self._name_row(row)}: {complaint}{value} ({rows.size} such row(s))")

    def error(self, complaint: str) -> DataError:
        """Return an error about the whole table; the message lists the columns."""
        columns = ", ".join(self.names[:12]) + (", …" if len(self.names) > 12 else "")
        return DataError(f"{self.title} {complaint}; its columns: {columns}")

    def near_misses(self, names: Iterable[str]) -> str:
        """Return the end of a message: which absent ones of ``names`` the headings may mean; empty where none is near.

        ``names`` are all that the table may have.
        """
        names = list(names)
        absent = [name for name in names if name not in self.names]
        pairs = ((heading, _find_near(heading, absent)) for heading in self.names if heading not in names)
        meant = [f"{heading!r} may be {name!r}" for heading, name in pairs if name]
        return f"; {', '.join(meant)}: rename it" if meant else ""

    def _name_row(self, row: int) -> str:
        if not self.is_csv:
            return f"row {row + 1}"
        with _open(self.path) as handle:  # empty lines are no rows
            filled = (number for number, line in enumerate(handle, 1) if line.strip())
            for _ in range(row + 1):
                next(filled, None)
            return f"line {next(filled, row + 2)}"


def read_table(path: Path, role: str, keys: Iterable[str] = (), values: Iterable[str] = ()) -> Table:
    """Read a CSV or parquet file. Messages name it by ``role``.

    Headings match the names in ``keys`` and ``values`` whatever their case, spaces and underscores. A heading that
    nearly matches an absent one of ``values``, or holds it or its abbreviation, is an error: its column would be lost.
    Columns without a heading are dropped.
    Raises MissingFileError without a file; DataError at another encoding or format, a row with too many or too few
    cells, two columns of one name, or no row.
    """
    start = _first_bytes(require_file(path, f"name the {role} table"))
    for magic, complaint in _OTHER_FORMATS.items():
        if start.startswith(magic):
            raise DataError(f"{role} table {path} {complaint}")
    if is_csv := not start.startswith(b"PAR1"):
        content = _read_csv(path, role)
    else:
        try:
            content = parquet.read_table(path, partitioning=None)
            content.rename_columns(content.column_names).validate(full=True)  # column names and text must be UTF-8
        except (*_ERRORS, UnicodeDecodeError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{role} table {path} is not a complete parquet file: {reason}; write it again") from error
    keys, values = list(keys), list(values)
    known = {_plain_name(name): name for name in reversed([*keys, *values])}
    exact = {*keys, *values} & set(content.column_names)
    renamed = [name if name in exact else known.get(_plain_name(name), name) for name in content.column_names]
    table = Table(path, role, content.rename_columns(renamed), is_csv)
    absent = [name for name in values if name not in renamed]
    for name in renamed:
        if name not in {*keys, *values} and (meant := _find_near(name, absent)):
            fault = f"lacks {meant}" if len(absent) < len(values) else f"has none of the columns {', '.join(values)}"
            raise table.error(
                f"{fault}, and has a column {name!r}: rename it {meant!r}, or drop it if it is something else"
            )
    repeated = sorted({name for name in table.names if table.names.count(name) > 1})
    if repeated:
        raise table.error(f"names {', '.join(repeated)} twice in its heading")
    if not len(content):
        raise table.error("has a heading and no rows")
    return table


def _plain_name(name: str) -> str:
    return "".join(filter(str.isalnum, name)).casefold()


def _find_near(heading: str, names: list[str]) -> str | None:
    """Return the name that a heading may mean: misspelt, abbreviated, or with other words, as ``SDH_label``."""
    plain, words = _plain_name(heading), re.findall(r"[^\W\d_]+", heading.casefold())
    if _NEGATIONS & set(words):
        return None
    for name in names:
        short = ABBREVIATIONS.get(name, name).casefold()
        if _SYNONYMS.get(plain) == name or {name, short} & set(words) or (len(name) > len(short) and name in plain):
            return name
    by_plain = {_plain_name(name): name for name in reversed(names)}
    return next((by_plain[key] for key in difflib.get_close_matches(plain, list(by_plain), n=1, cutoff=NEAR)), None)


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise DataError(f"{path} is a folder; name the table in it")
    with path.open("rb") as handle:
        return handle.read(4)


def _open(path: Path) -> IO[bytes]:
    gzipped = _first_bytes(path).startswith(b"\x1f\x8b")
    return cast("IO[bytes]", gzip.open(path)) if gzipped else path.open("rb")


def _read_csv(path: Path, role: str) -> pa.Table:
    try:
        _require_utf8(path, role)
        _require_commas(path, role)
        table = _parse(path)
    except _ERRORS as error:
        reason, wrong_rows = str(error), list[csv.InvalidRow]()
        try:
            _parse(path, wrong_rows)
        except _ERRORS as second_error:
            reason = str(second_error)
        reason = " ".join(reason.split())[:300]
        if wrong_rows:
            row = wrong_rows[0]
            reason = f"line {row.number} has {row.actual_columns} cells where the heading has {row.expected_columns}"
        raise DataError(f"{role} table {path} can't be read as CSV: {reason}") from error
    table = table.rename_columns([name.strip() for name in table.column_names])
    return table.select([number for number, name in enumerate(table.column_names) if name])


def _require_commas(path: Path, role: str) -> None:
    heading = _read_heading(path)
    if heading[:1] and heading[0].casefold().startswith("sep="):
        raise DataError(f"{role} table {path} begins with {heading[0]!r}; delete this line and save it with commas")
    if len(heading) == 1 and {";", "\t", "|"} & set(heading[0]):
        raise DataError(f"{role} table {path} is separated by semicolons, tabs or |; save it with commas")


def _read_heading(path: Path) -> list[str]:
    with TextIOWrapper(_open(path), encoding="utf-8-sig") as lines:
        return next(text_csv.reader(lines), [])


def _require_utf8(path: Path, role: str) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with _open(path) as handle:
            while block := handle.read(1 << 22):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        with _open(path) as handle:
            lines = (number for number, line in enumerate(handle, 1) if "\ufffd" in line.decode(errors="replace"))
            number = next(lines, 1)
        raise DataError(f"{role} table {path}, line {number}: not UTF-8; save it as CSV UTF-8") from None


def _parse(path: Path, wrong_rows: list[csv.InvalidRow] | None = None) -> pa.Table:
    """Read every column as text. Rows with too many or too few cells are an error, or go to ``wrong_rows``."""

    def handle_invalid_row(row: csv.InvalidRow) -> str:
        if wrong_rows is None:
            return "error"
        wrong_rows.append(row)
        return "skip"

    types = dict.fromkeys(_read_heading(path), pa.string())
    with _open(path) as handle:
        return csv.read_csv(
            handle,
            read_options=csv.ReadOptions(use_threads=wrong_rows is None),  # only one thread counts the lines
            parse_options=csv.ParseOptions(invalid_row_handler=handle_invalid_row),
            convert_options=csv.ConvertOptions(column_types=types, strings_can_be_null=False),
        )
