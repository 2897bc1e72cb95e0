"""Reads which modules of ichpipe import each other, from the source alone."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"pipeline": "ichpipe", "stages": "ichpipe.stages", "cache": "ichpipe.cache", "params": "ichpipe.recipes"}


def module_name(path, root=ROOT):
    """Return the name under which a source file is imported."""
    folder, *parts = path.relative_to(root).with_suffix("").parts
    return ".".join([PACKAGES[folder], *parts]).removesuffix(".__init__")


@cache
def source_files(root=ROOT):
    """Return {module: its file} of a checkout."""
    return {module_name(path, root): path for folder in PACKAGES for path in sorted((root / folder).rglob("*.py"))}


def imported_names(source, typing=True):
    """Yield (module, name or None) of each import, inside functions too, and under TYPE_CHECKING if ``typing``."""
    nodes = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides which room it goes to"
            yield from ((node.module, alias.name) for alias in node.names)
        elif not typing and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            nodes += node.orelse
        else:
            nodes += ast.iter_child_nodes(node)
