"""Imports go one way between rooms, no two files import each other, and only the command line prints."""

import ast

import pytest
from import_kit import ROOT, imported_names, source_files

# Each room and the rooms that it may import, as docs/architecture.md draws them. `top` is pipeline/ itself.
INDEX = {"common", "params", "nifti", "dicom"}
IMAGES = INDEX | {"index", "models"}
FEATURES = IMAGES | {"images", "cache"}
SCORING = INDEX | {"index"}
ALLOWED = {
    "common": set(),
    "params": {"common"},
    "nifti": {"common"},
    "dicom": {"common", "params", "nifti"},
    "index": INDEX,
    "phantom": {"common"},
    "models": INDEX | {"index"},
    "images": IMAGES,
    "features": FEATURES,
    "training": FEATURES | {"features"},
    "scoring": SCORING,
    "report": SCORING | {"scoring"},
    "inference": FEATURES | {"features", "scoring", "report"},
    "cache": set(),
    "recipes": set(),
}
ANY_ROOM = set(ALLOWED) | {"top"}


def room_of(module):
    """Return the room that a module of ours lies in; None for other packages."""
    package, *rest = module.split(".")
    if package != "ichpipe":
        return None
    return rest[0] if rest and rest[0] not in ("api", "__getattr__") else "top"


def import_graph(sources):
    """Return {module: modules of ours that it imports} for {module: source}."""
    graph = {module: set() for module in sources}
    for module, source in sources.items():
        for base, name in imported_names(source):
            joined = f"{base}.{name}" if name else base
            if (target := joined if joined in sources else base) in sources and target != module:
                graph[module].add(target)
    return graph


def find_circles(graph):
    """Return the groups of two or more modules that reach each other (Kahn's algorithm leaves them over)."""
    left = {module: set(targets) for module, targets in graph.items()}
    while leaves := {module for module, targets in left.items() if not targets & set(left)}:
        left = {module: targets for module, targets in left.items() if module not in leaves}
    while roots := {module for module in left if not any(module in targets for targets in left.values())}:
        left = {module: targets for module, targets in left.items() if module not in roots}
    return sorted(left)


SOURCES = {module: path.read_text(encoding="utf-8") for module, path in source_files().items()}
GRAPH = import_graph(SOURCES)


def test_walk_sees_lazy_and_typing_imports():
    source = (
        "import a.b\nif TYPE_CHECKING:\n    from ichpipe import api\ndef f():\n    from ichpipe.stages.cli import x\n"
    )
    names = sorted(imported_names(source), key=str)
    assert names == [("a.b", None), ("ichpipe", "api"), ("ichpipe.stages.cli", "x")]
    assert [room_of(module) for module, _ in names] == [None, "top", "stages"]
    assert room_of("ichpipe.cache.reader") == "cache"


def test_circles_are_found_through_typing_imports_and_whole_modules():
    sources = {
        "m.a": "from m import b\n",
        "m.b": "def f():\n    from m.c import x\n",
        "m.c": "import m.a\n",
        "m.d": "import m.a",
    }
    assert find_circles(import_graph(sources)) == ["m.a", "m.b", "m.c"]
    assert find_circles(import_graph({"m.a": "import m.b", "m.b": ""})) == []


def test_every_room_has_its_rule():
    rooms = {path.name for path in (ROOT / "pipeline").iterdir() if (path / "__init__.py").exists()}
    assert rooms | {"cache", "recipes"} == set(ALLOWED)
    assert len(list((ROOT / "pipeline").glob("*.py"))) <= 4


@pytest.mark.parametrize("room", [*ALLOWED, "stages", "top"])
def test_arrows_go_one_way(room):
    allowed = ALLOWED.get(room, ANY_ROOM) | {room}
    wrong = [
        f"{module} imports {target}"
        for module, targets in GRAPH.items()
        for target in targets
        if room_of(module) == room and room_of(target) not in allowed
    ]
    assert not wrong


def test_no_files_import_each_other():
    assert find_circles(GRAPH) == []


def test_store_knows_no_model_and_no_image():
    for module, source in SOURCES.items():
        if room_of(module) == "cache":
            heads = {name.split(".")[0] for name, _ in imported_names(source)}
            assert not heads & {"torch", "timm", "pydicom"}, module


def test_only_the_front_door_prints_and_exits():
    for module, source in SOURCES.items():
        if module != "ichpipe.stages.cli":
            calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
            assert not calls & {"print", "sys.exit", "exit", "quit", "click.echo"}, module
