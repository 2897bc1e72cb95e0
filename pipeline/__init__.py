"""ichpipe: a two-stage feature-caching pipeline that finds intracranial haemorrhage on head CT.

The Python interface. Each name is imported on first use (PEP 562): ``import ichpipe`` loads neither torch nor pydicom.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ichpipe.api import (
        Embeddings,
        Model,
        Prediction,
        SeriesEmbeddings,
        SeriesPrediction,
        Store,
        load_model,
        open_store,
    )
    from ichpipe.common.classes import CLASSES
    from ichpipe.common.errors import IchpipeError
    from ichpipe.dicom.hounsfield import read_hu
    from ichpipe.index.volume import Found, Volume, find_slices, read_series, read_studies

__all__ = [
    "CLASSES", "Embeddings", "Found", "IchpipeError", "Model", "Prediction", "SeriesEmbeddings", "SeriesPrediction",
    "Store", "Volume", "find_slices", "load_model", "open_store", "read_hu", "read_series", "read_studies",
]  # fmt: skip

_MODULES = dict.fromkeys(("Found", "Volume", "find_slices", "read_series", "read_studies"), "index.volume") | {
    "CLASSES": "common.classes", "IchpipeError": "common.errors", "read_hu": "dicom.hounsfield"
}  # fmt: skip
"""Module of each name; the others are in ``api``."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'api')}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
