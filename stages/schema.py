"""``ichpipe schema``: print the JSON Schema of params.yaml or of what `predict` writes."""

from __future__ import annotations

import ast
import inspect
import io
import json
import tokenize
from typing import TYPE_CHECKING, Any, Final

import click

from ichpipe.common.files import write_text
from ichpipe.stages.options import FILE

if TYPE_CHECKING:
    from pathlib import Path

# The draft that editors know. All keywords below mean the same in later drafts.
DRAFT: Final = "http://json-schema.org/draft-07/schema#"
_UNITS: Final = {
    "mm_per_px": "mm per pixel",
    "_px": "pixels",
    "_mm": "mm",
    "_hu": "Hounsfield units",
    "_deg": "degrees",
}


@click.command("schema")
@click.argument("name", type=click.Choice(["params", "predictions", "slices", "studies"]))
@click.option("--out", type=FILE, help="Write the schema here instead of printing it.")
@click.pass_obj
def command(_settings: object, name: str, out: Path | None) -> str:
    """Print the JSON Schema of a file: which keys there are, their ranges, units and meaning.

    \b
    params        params.yaml: editors complete and check keys by it
    predictions   predictions.json, and what predict --json prints
    slices        the rows of slices.csv, as a list of objects
    studies       the rows of studies.csv, as a list of objects

    \b
    Example:
      ichpipe schema params --out params.schema.json
    """
    text = json.dumps(make_schema(name), indent=2, ensure_ascii=False)
    if out is None:
        return text
    write_text(out, text + "\n")
    return f"{out}: JSON Schema of {name}"


def make_schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema (draft 7) of ``params``, ``predictions``, ``slices`` or ``studies``."""
    if name == "params":
        return {"$schema": DRAFT, **_params_schema()}
    from ichpipe.inference import prediction_schema

    make = {
        "predictions": prediction_schema.document_schema,
        "slices": prediction_schema.slices_schema,
        "studies": prediction_schema.studies_schema,
    }
    return {"$schema": DRAFT, **make[name]()}


def _params_schema() -> dict[str, Any]:
    """Return pydantic's schema of the parameters, with the comment and unit of each key as its description.

    Rules between keys (``val_fraction`` + ``test_fraction`` below 1) are not in it; commands check those.
    """
    from ichpipe.params.schema import Params

    schema = Params.model_json_schema()
    comments = read_comments()
    for model, section in {"Params": schema, **schema["$defs"]}.items():
        del section["title"]
        section["description"] = inspect.cleandoc(section["description"]).replace("``", "`")
        for key, value in section["properties"].items():
            value.pop("title", None)
            if "$ref" in value or key == "sequence":
                value.pop("default", None)  # the keys within have their own
            if text := _describe(comments.get((model, key.replace("-", "_")), ""), key):
                value["description"] = text
    # `min_slices` may stand beside the arms; it counts for each arm that has none of its own.
    arms = schema["properties"]["sequence"]
    min_slices = schema["$defs"]["SequenceParams"]["properties"]["min_slices"]
    arms["properties"] = {"min_slices": {name: value for name, value in min_slices.items() if name != "default"}}
    return schema


def _describe(comment: str, key: str) -> str:
    unit = next((unit for end, unit in _UNITS.items() if key.endswith(end)), "")
    return "; ".join(filter(None, (comment, f"unit: {unit}" if unit else "")))


def read_comments() -> dict[tuple[str, str], str]:
    """Return the comment behind each field of ``params/schema.py``, by class and field."""
    import ichpipe.params.schema

    source = inspect.getsource(ichpipe.params.schema)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    of_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    return {
        (node.name, field.target.id): of_line[number]
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        for number in (field.lineno, field.end_lineno)  # a long field has its comment on the last line
        if number in of_line
    }
