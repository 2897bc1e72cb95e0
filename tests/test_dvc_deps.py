"""DVC does not follow Python imports: each stage's `deps` must hold every file of ours that its code imports."""

import ast
import re
from functools import cache
from pathlib import PurePosixPath

import pytest
import yaml
from import_kit import PACKAGES, ROOT, imported_names, source_files


@cache
def direct_imports(file, root=ROOT):
    """Return the files of ours that a file imports when it runs, and the packages above them."""
    names = set()
    for module, name in imported_names((root / file).read_text(encoding="utf-8"), typing=False):
        parts = [*module.split("."), name or ""]
        names |= {".".join(parts[: depth + 1]) for depth in range(len(parts))}
    return {path.relative_to(root).as_posix() for module, path in source_files(root).items() if module in names}


COMMAND_LINE = "stages/options.py"
"""Options and what stands before the command: it decides which values a stage gets, not what it does with them."""


def closure(file, root=ROOT):
    """All files of the checkout that running ``file`` can import, itself included, but for the command line."""
    seen, waiting = set(), [file]
    while waiting:
        current = waiting.pop()
        if current not in seen and current != COMMAND_LINE:
            seen.add(current)
            waiting += sorted(direct_imports(current, root) - seen)
    return seen


def changes_no_result(file):
    """An __init__.py that holds a docstring, or names looked up when they are asked for (PEP 562), and no more."""
    if PurePosixPath(file).name != "__init__.py":
        return False
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    return not direct_imports(file) and all(_only_names(node) for node in body)


def _only_names(node):
    if isinstance(node, ast.FunctionDef):
        return node.name in ("__getattr__", "__dir__")
    if isinstance(node, ast.Assign):
        return node.targets[0].id in ("__all__", "_MODULES")
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.Expr | ast.ImportFrom)


RECIPE = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
STAGES = {name: body.get("do", body) for name, body in RECIPE["stages"].items()}


def command_of(name):
    command = STAGES[name]["cmd"]
    return " && ".join(command) if isinstance(command, list) else command


def deps_of(name):
    return [next(iter(dep)) if isinstance(dep, dict) else dep for dep in STAGES[name].get("deps", [])]


def test_recipe_has_stages():
    assert set(STAGES) >= {"prepare", "fit-slices", "extract", "fit-sequence", "finetune", "evaluate"}


@pytest.mark.parametrize("name", STAGES)
def test_one_word_names_stage_command_and_file(name):
    assert re.search(rf"\bichpipe\b[^&|;]*\s{re.escape(name)}\b", command_of(name))
    assert (ROOT / "stages" / f"{name.replace('-', '_')}.py").is_file()


@pytest.mark.parametrize("name", STAGES)
def test_deps_hold_every_imported_file(name):
    missing = sorted(
        file
        for file in closure(f"stages/{name.replace('-', '_')}.py")
        if not any(PurePosixPath(file).is_relative_to(dep) for dep in deps_of(name)) and not changes_no_result(file)
    )
    assert not missing, f"add to the deps of {name} in dvc.yaml: {', '.join(missing)}"


@pytest.mark.parametrize("name", STAGES)
def test_listed_source_files_exist(name):
    gone = [dep for dep in deps_of(name) if dep.split("/")[0] in PACKAGES and not (ROOT / dep).exists()]
    assert not gone, f"the deps of {name} name files that are not there"


@pytest.mark.parametrize("name", STAGES)
def test_device_and_workers_stay_out_of_the_recipe(name):
    assert not re.search(r"--(gpu|workers|scheduler)\b", command_of(name))


@pytest.mark.parametrize("name", STAGES)
def test_each_parameter_of_a_stage_stands_in_params_yaml(name):
    """DVC reads the file, not our defaults: a key that is left out there stops the stage."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for key in STAGES[name].get("params", []):
        node = params
        for word in key.replace(".${key}", "").split("."):
            assert word in node, f"{name}: params.yaml lacks {key}"
            node = node[word]


def test_closure_follows_lazy_imports_packages_and_cycles(tmp_path):
    files = {
        "stages/__init__.py": "",
        "stages/one.py": "def run():\n    from ichpipe.ct import read\n",
        "pipeline/__init__.py": "",
        "pipeline/ct.py": "import numpy\nfrom ichpipe import errors\nfrom ichpipe.cache.reader import open_store\n",
        "pipeline/errors.py": "if TYPE_CHECKING:\n    import ichpipe.typing_only\nimport ichpipe.ct\n",
        "pipeline/typing_only.py": "",
        "pipeline/unused.py": "",
        "cache/__init__.py": "",
        "cache/reader.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    expected = set(files) - {"pipeline/unused.py", "pipeline/typing_only.py", "stages/__init__.py"}
    assert closure("stages/one.py", tmp_path) == expected
