"""MkDocs hooks that make the reference of commands and parameters from the code.

A page marks an insertion by ``<!-- commands -->``, ``<!-- parameters -->`` or ``<!-- examples/NAME.py -->``.
MkDocs calls the functions whose names begin with ``on_`` (``hooks`` in mkdocs.yml).
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import ichpipe.params.schema
from ichpipe.stages.cli import cli
from ichpipe.stages.schema import read_comments

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import BaseModel

ROOT = Path(__file__).parents[2]


def on_startup(**_: Any) -> None:
    """Link the sources under their package name: mkdocstrings can't read the mapping of setup.cfg."""
    link = ROOT / "build" / "docs-source" / "ichpipe"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(Path("..", "..", "pipeline"), target_is_directory=True)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Insert the generated parts."""
    for mark, make in (("<!-- commands -->", commands), ("<!-- parameters -->", parameters)):
        if mark in markdown:
            markdown = markdown.replace(mark, _linked(make()))
    return re.sub(r"<!-- (examples/\w+\.py) -->", _script, markdown)


def _script(match: re.Match[str]) -> str:
    return f"```python\n{(ROOT / match[1]).read_text(encoding='utf-8')}```"


def _linked(text: str) -> str:
    """Turn names of pages in help texts and comments into links."""
    return re.sub(r"docs/([\w-]+)\.md", r"[\1](../\1.md)", text)


def all_commands(group: click.Group = cli, path: str = "ichpipe") -> Iterator[tuple[str, click.Command]]:
    """Yield the full name and object of every command below ``group``."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None  # noqa: S101 - it is listed
        if isinstance(command, click.Group):
            yield from all_commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def commands() -> str:
    """Return one section per command: description, example, options."""
    parts = [_command("ichpipe", cli, "Options before the command")]
    parts += [_command(path, command, path) for path, command in all_commands()]
    return "\n\n".join(parts)


def _command(path: str, command: click.Command, title: str) -> str:
    context = click.Context(command, info_name=path)
    text, _, example = inspect.cleandoc(command.help or "").partition("\b\nExample:")
    usage = " ".join(command.collect_usage_pieces(context))
    rows = [record for option in command.get_params(context) if (record := option.get_help_record(context))]
    table = [f"| `{_cell(name)}` | {_cell(meaning)} |" for name, meaning in rows]
    lines = [f"## {title}", "", text.strip(), "", "```text", f"{path} {usage}", *_indented(example), "```", ""]
    return "\n".join([*lines, "| option | |", "|---|---|", *table])


def _indented(example: str) -> list[str]:
    lines = inspect.cleandoc(example).splitlines()
    return ["", "example:", *(f"  {line}" for line in lines)] if lines else []


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def parameters() -> str:
    """Return one table per section of ``params.yaml``, and one for each group of keys that sections share."""
    comments = read_comments()
    pairs = list(sections(ichpipe.params.schema.Params, ""))
    parts = []
    for model in dict.fromkeys(model for _, model in pairs):
        keys = [key for key, other in pairs if other is model]
        title = (
            f"## {keys[0].removesuffix('[]')}"
            if "." not in keys[0]
            else f"## {model.__name__.removesuffix('Params').lower()}"
        )
        where = "" if "." not in keys[0] else "In " + ", ".join(f"`{key}`" for key in keys) + "."
        text = inspect.cleandoc(model.__doc__ or "").replace("``", "`")
        parts.append("\n\n".join(filter(None, (title, text, where, _table(model, comments)))))
    return "\n\n".join(parts)


def sections(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the key and model of every section, outer sections first."""
    for name, field in model.model_fields.items():
        key = f"{path}.{field.alias or name}".lstrip(".")
        for inner in models_of(field.annotation):
            if field.annotation is not inner:  # a table or a list of them
                key += ".NAME" if name == "sequence" else "[]"
            yield key, inner
            yield from sections(inner, key)


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a field's type names."""
    if isinstance(annotation, type) and issubclass(annotation, ichpipe.params.schema.Section):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in models_of(part)]


def _table(model: type[BaseModel], comments: dict[tuple[str, str], str]) -> str:
    schema = model.model_json_schema(by_alias=True)["properties"]
    rows = [
        f"| `{field.alias or name}` | {_kind(schema[field.alias or name])} | {_default(field.get_default())} "
        f"| {_cell(comments.get((model.__name__, name), ''))} |"
        for name, field in model.model_fields.items()
        if not models_of(field.annotation)
    ]
    return "\n".join(["| key | value | default | |", "|---|---|---|---|", *rows]) if rows else ""


def _default(value: Any) -> str:
    if "Undefined" in type(value).__name__:
        return "required"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, bool) or value is None:
        return "`null`" if value is None else f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _kind(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_kind(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}"
    words = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`", "string": "text"}
    kind = words.get(schema.get("type", ""), "`null`")
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema]
    return f"{kind} {', '.join(limits)}".strip()
