"""Reads YAML as parameters are written: plain values, of bounded size, no key twice."""

from __future__ import annotations

import re
from typing import Any, Final

import yaml
from yaml import YAMLError

MAX_CHARACTERS: Final = 2**20  # the longest recipe here has some thousand
MAX_KEYS: Final = 10_000  # that merging (``<<``) may put into one mapping: ten lines of it can ask for a billion


def read_yaml(text: str) -> Any:
    """Return what ``text`` holds. Raises YAMLError for all that is wrong with it."""
    if len(text) > MAX_CHARACTERS:
        raise YAMLError(f"longer than {MAX_CHARACTERS} characters: no parameters")
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except RecursionError as error:
        raise YAMLError("nested too deeply") from error
    except (ValueError, TypeError, AttributeError, IndexError, OverflowError) as error:  # of a date or number
        raise YAMLError(f"a value can't be read ({type(error).__name__}: {str(error)[:80]})") from error


class _Loader(yaml.SafeLoader):
    """YAML as DVC reads it: PyYAML alone takes ``1e-4`` (no point) for text, and the last of two equal keys."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._flat: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Resolve merge keys, up to MAX_KEYS; before that, refuse a key that is written twice."""
        if id(node) not in self._flat:  # a node that is merged twice holds what was merged into it
            self._flat.add(id(node))
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if len(set(keys)) < len(keys):
                twice = next(key for key in keys if keys.count(key) > 1)
                fault = f"the key {twice[:40]!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, fault, node.start_mark)
        super().flatten_mapping(node)
        if len(node.value) > MAX_KEYS:
            raise yaml.constructor.ConstructorError(None, None, f"more than {MAX_KEYS} keys merged", node.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)
