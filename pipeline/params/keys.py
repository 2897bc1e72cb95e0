"""The names of parameters: which there are, and which one was meant by a wrong one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args, get_origin

from pydantic import BaseModel

from ichpipe.common.errors import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def key_hint(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """Say which key was meant: one of the same section, else where a key of this name belongs, else what there is."""
    *above, word = (str(part) for part in location)
    sections = dict(_sections(model, ""))
    here = sections.get(".".join(_pattern(above)), [])
    if close := did_you_mean(word, here):
        return close
    owners = [place or "the top" for place, keys in sections.items() if word in keys]
    if owners:
        return f"; it is a key of {', '.join(owners)}"
    return did_you_mean(word, [key for keys in sections.values() for key in keys]) or f"; there are {', '.join(here)}"


def written_out(model: type[BaseModel]) -> list[str]:
    """Return every key that holds a value, written out as for ``--set``; the name of an arm stands as ARM."""
    sections = dict(_sections(model, ""))
    keys = {f"{place}.{key}" for place, names in sections.items() if place not in ("", "windows") for key in names}
    return sorted(keys - set(sections))


def _pattern(above: Sequence[str]) -> list[str]:
    """Write ARM for the name of an arm, leave out the number of a window."""
    names = ["ARM" if number == 1 and above[0] == "sequence" else part for number, part in enumerate(above)]
    return [name for name in names if not name.isdigit()]


def _sections(model: type[BaseModel], place: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each section, with dots, and its keys; sections within sections too."""
    names = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    yield place, list(names)
    for name, annotation in names.items():
        inner = _model_of(annotation)
        if inner is not None:
            below = f"{name}.ARM" if get_origin(annotation) is dict else name
            yield from _sections(inner, f"{place}.{below}" if place else below)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a type holds: itself, or as the values of a dict or the items of a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for one in get_args(annotation) if (found := _model_of(one))), None)
