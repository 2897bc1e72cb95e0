"""JSON Schemas of what `predict` writes: predictions.json, and the rows of slices.csv and studies.csv."""

from __future__ import annotations

from typing import Any, Final, get_args

from ichpipe.common.classes import CLASSES
from ichpipe.inference.findings import FORMAT, FORMAT_VERSION
from ichpipe.scoring.calibration import Method
from ichpipe.scoring.pooling import StudyScore

Schema = dict[str, Any]

_TEXT: Final = {"type": "string"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_PROBABILITY: Final = {"type": "number", "minimum": 0, "maximum": 1}
_IDENTIFIERS: Final = {
    "patient_id": {**_TEXT, "description": "PatientID (0010,0020), or its keyed hash"},
    "study_uid": {**_TEXT, "description": "StudyInstanceUID (0020,000D)"},
    "series_uid": {**_TEXT, "description": "SeriesInstanceUID (0020,000E)"},
}
_CLASSES: Final = {name: {**_PROBABILITY, "description": f"probability of {name}"} for name in CLASSES}
_FORCED: Final = {"type": "boolean", "description": "predicted by --force alone: the series would have been refused"}
_SLICE: Final = {
    "sop_uid": {**_TEXT, "description": "SOPInstanceUID (0008,0018)"},
    "slice_index": {**_COUNT, "description": "0 to n-1 along the slice normal within the series"},
    "position_mm": {"type": "number", "description": "position along the slice normal, from the feet up; unit: mm"},
}
_SLICES: Final = {"type": "integer", "minimum": 1, "description": "slices of the series that were predicted"}


def document_schema() -> Schema:
    """Return the schema of predictions.json, which ``predict --json`` prints too."""
    finding = _object(
        {
            "probability": {**_PROBABILITY, "description": "of the study: evaluate.study_score over its slices"},
            "first_mm": _nullable("number", "position of the lowest positive slice; null without any; unit: mm"),
            "last_mm": _nullable("number", "position of the highest positive slice; null without any; unit: mm"),
            "n_slices": {**_COUNT, "description": "slices at or above the threshold"},
        }
    )
    study = _object(
        {
            **_IDENTIFIERS,
            "series_reason": {**_TEXT, "description": "why this series stands for its study"},
            "n_slices": _SLICES,
            "forced": _FORCED,
            "forced_despite": _nullable("string", "why the series would have been refused; null if it is not forced"),
            "findings": _object({name: {"$ref": "#/$defs/finding"} for name in CLASSES}),
            "slices": {"type": "array", "items": {"$ref": "#/$defs/slice"}, "minItems": 1},
        }
    )
    refused = _object(
        {
            **_IDENTIFIERS,
            "n_slices": _COUNT,
            "reason": {**_TEXT, "description": "why the study is not predicted"},
        }
    )
    return {
        "title": "predictions.json of ichpipe",
        **_object(
            {
                "format": {"const": FORMAT},
                "format_version": {"const": FORMAT_VERSION},
                "ichpipe": {**_TEXT, "description": "version of the program"},
                "model_sha256": {**_TEXT, "pattern": "^[0-9a-f]{64}$", "description": "SHA-256 of the model file"},
                "calibration": _object(
                    {
                        "method": {"enum": [*get_args(Method), "absent", "left out"]},
                        "classes": {
                            "type": "array",
                            "items": {"enum": list(CLASSES)},
                            "description": "classes with a map",
                        },
                        "blend": {
                            **_object(dict.fromkeys(CLASSES, _PROBABILITY), required=[]),
                            "description": "classes mixed with the slice CNN: share of the model",
                        },
                    }
                ),
                "threshold": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
                "study_score": {"enum": list(get_args(StudyScore)), "description": "how slices become a study"},
                "forced": {"type": "boolean", "description": "whether any series was predicted by --force alone"},
                "studies": {"type": "array", "items": {"$ref": "#/$defs/study"}},
                "refused": {"type": "array", "items": {"$ref": "#/$defs/refused"}},
            }
        ),
        "$defs": {"finding": finding, "slice": _object({**_SLICE, **_CLASSES}), "study": study, "refused": refused},
    }


def slices_schema() -> Schema:
    """Return the schema of the rows of slices.csv; the column ``forced`` is there with ``--force`` alone."""
    return _table("slices.csv of ichpipe predict", {**_IDENTIFIERS, **_SLICE, **_CLASSES})


def studies_schema() -> Schema:
    """Return the schema of the rows of studies.csv; the column ``forced`` is there with ``--force`` alone."""
    return _table("studies.csv of ichpipe predict", {**_IDENTIFIERS, "n_slices": _SLICES, **_CLASSES})


def _table(title: str, columns: Schema) -> Schema:
    row = _object({**columns, "forced": _FORCED}, required=list(columns))
    return {"title": title, "description": "one object a row", "type": "array", "items": row}


def _object(properties: Schema, required: list[str] | None = None) -> Schema:
    """Return the schema of an object with these keys and no others; all are required unless ``required`` is given."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def _nullable(kind: str, description: str) -> Schema:
    return {"type": [kind, "null"], "description": description}
