"""Arrows go one way: stages -> pipeline -> cache; cache imports nothing of ours."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"pipeline": "ichpipe", "stages": "ichpipe.stages", "cache": "ichpipe.cache"}
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
EVERYTHING = sorted(
    path
    for folder in (*ROOMS, "tests", "benchmarks")
    if (ROOT / folder).exists()
    for path in (ROOT / folder).rglob("*.py")
)


def imported_modules(source):
    """Absolute names of all modules that a source imports, inside functions and TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides which room it goes to"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module):
    """The room of ours that a module belongs to, or None."""
    if module.split(".")[0] != "ichpipe":
        return None
    second = module.split(".")[1] if "." in module else ""
    return second if second in ("stages", "cache") else "pipeline"


def rooms_reached(room):
    for path in sorted((ROOT / room).rglob("*.py")):
        for module in imported_modules(path.read_text(encoding="utf-8")):
            if module.startswith(("ichpipe", "pipeline", "stages", "cache")):
                yield room_of(module), f"{path.relative_to(ROOT)} imports {module}"


def test_walk_sees_lazy_and_typing_imports():
    source = (
        "import a.b\nif TYPE_CHECKING:\n    from ichpipe import ct\ndef f():\n    from ichpipe.stages.cli import x\n"
    )
    found = list(imported_modules(source))
    assert found == ["a.b", "ichpipe", "ichpipe.dicom.hounsfield", "ichpipe.stages.cli", "ichpipe.stages.cli.x"]
    assert [room_of(name) for name in found] == [None, "pipeline", "pipeline", "stages", "stages"]
    assert room_of("ichpipe.cache.reader") == "cache"


@pytest.mark.parametrize(
    ("room", "allowed"),
    [("stages", {"stages", "pipeline", "cache"}), ("pipeline", {"pipeline", "cache"}), ("cache", {"cache"})],
)
def test_arrows_go_one_way(room, allowed):
    wrong = [what for reached, what in rooms_reached(room) if reached not in allowed and what.split()[-1] != "ichpipe"]
    assert not wrong


def test_store_knows_no_model_and_no_image():
    for path in (ROOT / "cache").rglob("*.py"):
        heads = {name.split(".")[0] for name in imported_modules(path.read_text(encoding="utf-8"))}
        assert not heads & {"torch", "timm", "pydicom"}, path.name


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_short_and_named_for_what_it_holds(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400
    assert "utils" not in path.name


def test_functions_are_short():
    lengths = sorted(
        node.end_lineno - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert lengths[len(lengths) // 2] <= 12
    assert lengths[int(0.9 * len(lengths))] <= 30


def test_only_the_front_door_prints_and_exits():
    for path in SOURCES:
        if path != ROOT / "stages" / "cli.py":
            calls = {
                ast.unparse(node.func)
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Call)
            }
            assert not calls & {"print", "sys.exit", "exit", "quit", "click.echo"}, path.relative_to(ROOT)
