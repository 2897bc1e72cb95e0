"""The slices of a test set that a table names, as RSNA's stage-1 test."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import ParamsError
from ichpipe.common.user_tables import read_table

if TYPE_CHECKING:
    from ichpipe.params.schema import PrepareParams


def test_table(params: PrepareParams) -> Path:
    """Return where the table of the stage1 split is. Raises ParamsError where none is named."""
    if params.test_slices is None:
        raise ParamsError(
            "prepare.split stage1 needs prepare.test_slices: a table that names the slices of the test set"
        )
    return Path(params.test_slices)


def read_test_slices(path: Path) -> pd.Index:
    """Read the SOPInstanceUIDs that a table names, each once: of RSNA's stage-1 test set, or any other.

    The long form ``ID,Label`` with IDs ``<SOPInstanceUID>_<class>``, or one row a slice with a column
    ``SOPInstanceUID``, ``sop_uid`` or ``ID``, the first of these that is there. Raises DataError.
    """
    table = read_table(path, "test slices")
    key = next((name for name in ("SOPInstanceUID", "sop_uid", "ID") if name in table.names), None)
    if key is None:
        raise table.error("names no slices: it needs a column SOPInstanceUID, sop_uid or ID")
    names = pd.Series(table.text(key).to_pandas())
    if sorted(table.names) == ["ID", "Label"]:
        parts = names.str.rpartition("_")
        table.refuse(~parts[2].isin(CLASSES).to_numpy(), "ID is not <SOPInstanceUID>_<class>", names)
        names = parts[0]
    found: pd.Index = pd.Index(names.unique())
    return found
