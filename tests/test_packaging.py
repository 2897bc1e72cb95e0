"""What installs is what lies in the folders, under one name."""

import configparser
import email
import re
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from import_kit import PACKAGES, ROOT, source_files


def read_setup():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def folders_as_packages():
    """Each folder with an __init__.py, by the name under which it installs."""
    return {module for module, path in source_files().items() if path.name == "__init__.py"}


def requirement_name(line):
    return re.match(r"[A-Za-z0-9._-]+", line).group().lower().replace("_", "-")


def requirements(setup, extras):
    lines = setup["options"]["install_requires"].split("\n")
    for extra in extras:
        lines += setup["options.extras_require"][extra].split("\n")
    lines = [line.strip() for line in lines]
    return [line for line in lines if line and not line.startswith(("#", "%("))]


def test_every_package_is_listed_by_hand():
    listed = read_setup()["options"]["packages"].split()
    assert len(listed) == len(set(listed))
    assert set(listed) == folders_as_packages()


def test_mapping_names_the_three_rooms():
    lines = read_setup()["options"]["package_dir"].strip().splitlines()
    pairs = [re.split(r"\s*=\s*", line.strip()) for line in lines]
    assert {folder: package for package, folder in pairs} == PACKAGES


def test_every_python_file_lies_in_a_package():
    stray = [path for path in source_files().values() if not (path.parent / "__init__.py").exists()]
    assert not stray, "no __init__.py beside these: they would not install"


def test_no_folder_shadows_the_installed_package():
    assert not (ROOT / "ichpipe").exists()


def test_command_is_installed():
    (command,) = [point for point in entry_points(group="console_scripts") if point.name == "ichpipe"]
    assert command.value == "ichpipe.stages.cli:main"
    assert callable(command.load())


def test_every_requirement_has_a_tested_version():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {requirement_name(line) for line in constraints if "==" in line}
    lines = requirements(read_setup(), ("dvc", "offline-weights", "dev"))
    missing = {requirement_name(line) for line in lines} - pinned
    assert not missing, "constraints.txt does not pin these"


def test_every_requirement_has_its_reason():
    setup = read_setup()
    lines = requirements(setup, setup["options.extras_require"])
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8").lower()
    missing = {name for line in lines if f"`{(name := requirement_name(line))}`" not in text}
    assert not missing, "docs/dependencies.md does not say why these are needed"


@pytest.mark.slow
def test_wheel_from_sdist_holds_all_packages_and_nothing_else(tmp_path):
    pytest.importorskip("setuptools")
    copy = copy_of_checkout(tmp_path / "checkout")
    call_backend(copy, "build_sdist", tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    unpacked = tmp_path / "unpacked"
    subprocess.run([sys.executable, "-m", "tarfile", "-e", str(archive), str(unpacked)], check=True)
    call_backend(next(unpacked.iterdir()), "build_wheel", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        metadata = email.message_from_bytes(content.read(next(n for n in names if n.endswith("/METADATA"))))
    assert {name.split("/")[0] for name in names} == {"ichpipe", names[-1].split("/")[0]}
    assert {str(Path(n).parent).replace("/", ".") for n in names if n.endswith("__init__.py")} == folders_as_packages()
    assert sum(n.endswith(".py") for n in names) == len(source_files())
    rooms = {"pipeline": "ichpipe", "stages": "ichpipe/stages", "cache": "ichpipe/cache", "params": "ichpipe/recipes"}
    for path in data_files():
        room, *rest = path.relative_to(ROOT).parts
        assert "/".join([rooms[room], *rest]) in names
    assert metadata["Name"] == "ichpipe"
    assert any("licenses/LICENSE" in name or name.endswith("/LICENSE") for name in names)


def data_files():
    """What stands in the packages' folders beside Python: parameter files, the recipe of `init`, templates."""
    folders = [ROOT / name for name in ("pipeline", "stages", "cache", "params")]
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return [path for path in files if path.suffix not in {".py", ".pyc"}]


def copy_of_checkout(target):
    """The files that a build reads, apart, so that it leaves nothing behind in the checkout."""
    others = [ROOT / name for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md")]
    for path in filter(Path.exists, [*others, *source_files().values(), *data_files()]):
        copy = target / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return target


def call_backend(folder, hook, out):
    code = f"import setuptools.build_meta as backend; backend.{hook}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
