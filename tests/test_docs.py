"""What the documentation shows is there: commands, options, keys, links, pictures; and it builds without a warning."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import pytest
import yaml
from import_kit import ROOT, source_files

import ichpipe
from ichpipe.params.schema import Params, known_keys, load_params
from ichpipe.stages.cli import cli

DOCS = ROOT / "docs"
CHROMIUM = "/usr/bin/chromium"
LINES = re.MULTILINE | re.DOTALL
SECTION = r"^## (.*?)\n(.*?)(?=^## |\Z)"
ROOT_PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CODE_OF_CONDUCT")]
PAGES = sorted([*ROOT_PAGES, *DOCS.rglob("*.md")])
WORKDAY = [page for page in PAGES if page.name != "log.md"]  # the lab book tells what was typed then


def named(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, *languages):
    """Yield the fenced blocks of a page whose language is one of ``languages``."""
    for language, text in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), LINES):
        if language in languages:
            yield text


def shell_lines(page):
    """Yield what is typed into a shell: lines joined at backslashes, without prompts and comments.

    In a block with prompts the rest is output; a line that is answered with an error is wrong on purpose.
    """
    for text in blocks(page, "", "bash", "sh"):
        lines = text.replace("\\\n", " ").splitlines()
        prompts = any(line.startswith("$ ") for line in lines)
        for line, answer in pairwise([*lines, ""]):
            if answer.startswith(("ichpipe: ", "Usage: ", "Error: ")) or (prompts and not line.startswith("$ ")):
                continue
            quiet = re.sub(r"'[^']*'", "QUOTED", line.strip().removeprefix("$ ")).replace('"', "")
            yield re.sub(r"\s#.*$", "", quiet)


def calls(line):
    """Yield the arguments of each call of ichpipe within a line of shell."""
    for part in re.split(r"&&|\|\||;|\||\$\(|\)|\bdo\b", line):
        words = part.split()
        if "ichpipe" in words[:20] and (words[0] == "ichpipe" or words[0] == "torchrun" or "=" in words[0]):
            yield shlex.split(part)[words.index("ichpipe") + 1 :]


def parse(arguments):
    """Parse without running or looking at values: an unknown command or option raises."""
    group, rest = cli, list(arguments)
    while True:
        _, rest, _ = group.make_parser(click.Context(group)).parse_args(rest)
        if not isinstance(group, click.Group) or not rest or rest[0].startswith("$") or rest[0].isupper():
            return  # $stage, COMMAND
        name, *rest = rest
        if (group := group.get_command(click.Context(group), name)) is None:
            raise click.UsageError(f"no command {name}")


SHOWN = [(page, call) for page in WORKDAY for line in shell_lines(page) for call in calls(line)]


def test_calls_are_found_and_a_wrong_one_is_refused():
    assert len(SHOWN) > 40
    assert list(calls("A=1 ichpipe --quiet prepare || break")) == [["--quiet", "prepare"]]
    assert list(calls("torchrun --no-python ichpipe fit-slices")) == [["fit-slices"]]
    assert not list(calls("pip install ichpipe"))
    parse(["--set", "a.b=1", "cache", "info", "x", "--json"])
    for wrong in (["prepares"], ["prepare", "--nothing"], ["--nothing", "prepare"], ["cache", "infos"]):
        with pytest.raises(click.UsageError):
            parse(wrong)


@pytest.mark.parametrize(("page", "call"), SHOWN, ids=lambda value: named(value) if isinstance(value, Path) else None)
def test_shown_command_is_one_that_the_program_takes(page, call):
    parse([word.strip("[]") for word in call if "|" not in word])


@pytest.mark.parametrize("page", WORKDAY, ids=named)
def test_keys_given_by_set_are_known(page):
    pairs = [pair for line in shell_lines(page) for call in calls(line) for pair in pairwise(call)]
    keys = {value.partition("=")[0] for option, value in pairs if option == "--set"}
    assert {re.sub(r"^sequence\.[^.]+", "sequence.ARM", key) for key in keys} <= set(known_keys())


@pytest.mark.parametrize("page", WORKDAY, ids=named)
def test_parameter_files_and_python_that_are_shown_are_valid(page, tmp_path):
    for text in blocks(page, "yaml"):
        if set(yaml.safe_load(text)) <= {field.alias or name for name, field in Params.model_fields.items()}:
            (tmp_path / "shown.yaml").write_text(text)
            load_params(tmp_path / "shown.yaml")
    for text in blocks(page, "python"):
        compile(text, named(page), "exec")
        for names in re.findall(r"^from ichpipe import (.*)$", text, re.MULTILINE):
            assert set(names.split(", ")) <= set(ichpipe.__all__)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_and_pictures_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=LINES)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not urlsplit(target).scheme and not target.startswith("#"):
            path, _, anchor = target.partition("#")
            assert (page.parent / path).exists(), f"{named(page)} links to {target}"
            if anchor and path.endswith(".md") and "reference/" not in path:
                assert anchor in anchors(page.parent / path), f"{named(page)} links to {target}"


@pytest.mark.parametrize("page", WORKDAY, ids=named)
def test_source_files_that_are_named_exist(page):
    folders = "pipeline|cache|stages|benchmarks|tests|params|examples|docs|dicom|index|images|training"
    for name in re.findall(rf"`((?:{folders})/[\w/.-]+\.\w+)`", page.read_text(encoding="utf-8")):
        made = name.startswith("index/")  # also a folder of the artifacts
        assert made or (ROOT / name).exists() or (ROOT / "pipeline" / name).exists(), f"{named(page)} names {name}"


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def messages_of_the_program():
    """Every text in the sources, what is filled in at run time as an ellipsis."""
    for path in source_files().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            if all(isinstance(part, ast.Constant | ast.FormattedValue) for part in parts):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)


def test_messages_in_troubleshooting_are_those_of_the_program():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [row for row in re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE) if "command not found" not in row]
    sources = "\n".join(messages_of_the_program()) + (ROOT / "Makefile").read_text(encoding="utf-8")
    assert len(messages) > 15
    for message in messages:
        for part in filter(None, (part.strip("' ") for part in re.split(r"…| (?=\()", message))):
            assert part in sources, f"no message of ours has {part!r}, of {message!r}"


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference", DOCS / "tools" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_lists_every_command_and_option(reference):
    sections = dict(re.findall(SECTION, reference.commands(), LINES))
    commands = dict(reference.all_commands())
    assert len(commands) >= 14
    for path, command in commands.items():
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert f"`{parameter.opts[0]}" in sections[path], f"{path} {parameter.opts[0]}"
        assert "example:" in sections[path]


def test_reference_lists_every_key_with_its_default(reference):
    text = reference.parameters()
    sections = {name: body.splitlines() for name, body in re.findall(SECTION, text, LINES)}
    for key, model in reference.sections(Params, ""):
        title = key.removesuffix("[]")
        if "." in key:
            title = model.__name__.removesuffix("Params").lower()
            assert any(f"`{key}`" in line for line in sections[title])
        rows = [line.split(" | ") for line in sections[title] if line.startswith("| `")]
        fields = model.model_fields.items()
        leaves = {field.alias or name for name, field in fields if not reference.models_of(field.annotation)}
        assert {row[0].strip("|` ") for row in rows} == leaves
    assert "| `epochs` | whole number > 0 | `8` |" in text
    assert "| `store` | text or `null` | `null` | an fsspec address (s3://…); null: embeddings.zarr" in text


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.loaded, self.linked = [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "a":
            self.linked.append(values.get("href"))
        elif tag != "link" or values.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded += [values[name] for name in ("src", "href") if values.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'ichpipe[dev]'")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install 'ichpipe[dev]'")
    out = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_site_builds_strictly_and_every_link_leads_somewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert {path.relative_to(site).with_suffix(".md").as_posix() for path in pages} >= {
        path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")
    }
    for page in pages:
        links = Links()
        links.feed(page.read_text(encoding="utf-8"))
        for target in links.loaded:
            assert not urlsplit(target).netloc, f"{page.name} would fetch {target}"
        for target in filter(None, links.loaded + links.linked):
            url = urlsplit(target)
            if not url.scheme and url.path and not url.path.startswith("/") and page.name != "404.html":
                assert (page.parent / unquote(url.path)).exists(), f"{page.name}: {target}"


@pytest.mark.slow
def test_styles_fetch_nothing(site):
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style.name
    text = (site / "reference" / "python.html").read_text(encoding="utf-8")
    for name in ("index.volume.read_series", "api.Model.predict", "common.errors.DataError"):
        assert f'id="ichpipe.{name}"' in text


@pytest.mark.slow
def test_pages_hold_what_is_put_in_when_the_site_is_built(site):
    for name in ("python", "reference/commands", "reference/parameters"):
        assert "&lt;!--" not in (page := (site / f"{name}.html").read_text(encoding="utf-8"))
        assert not re.search(r"<!-- (commands|parameters|examples)", page)
    shown = (site / "python.html").read_text(encoding="utf-8")
    for script in (ROOT / "examples").glob("*.py"):
        first = script.read_text(encoding="utf-8").splitlines()[0].strip('"')
        assert first in shown, f"docs/python.md does not show {script.name}"


@pytest.mark.slow
def test_search_works_from_disk_with_the_network_off(site):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no {CHROMIUM}")
    messages = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(viewport={"width": 1400, "height": 900})
        context.set_offline(True)
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("requestfailed", lambda request: messages.append(request.url))
        page.goto(f"file://{site}/reference/python.html")
        page.wait_for_timeout(500)
        page.keyboard.press("/")
        page.keyboard.type("backbone", delay=20)
        page.locator(".md-search-result__item").first.wait_for(timeout=20_000)
        browser.close()
    assert not messages


def test_readme_is_one_page():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 110
    assert max(len(line) for line in lines) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_short_outside_tables_and_code(page):
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=LINES)
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_where_to_change_what_names_files_that_exist():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rows = text[text.index("## Where to change what") :].splitlines()[4:]
    assert len(rows) >= 10
    for row in rows:
        names = re.findall(r"`((?:pipeline|stages|cache|tests|docs)/[^`]*|\w+\.yaml)`", row)
        assert any(name.startswith("tests/") for name in names), row
        assert [name for name in names if not (ROOT / name).exists()] == [], row
