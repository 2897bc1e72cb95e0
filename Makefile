# make demo runs the recipe, make test is what CI runs, make check is its fast part, make soak the long tests.
# `make env` makes the environment that all of them use; make docs builds the site.
# Package indexes and proxies come from your own pip configuration; none is named here.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Test processes; each computes with one thread, since threads that share a core wait for each other by spinning.
WORKERS ?= 2

.PHONY: env demo check test test-floors test-newest soak lint types audit docs clean
.DELETE_ON_ERROR:

env: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "ichpipe needs Python 3.11 or later; name one: make env PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# DVC calls `ichpipe` and `python` by name: the environment's own come first.
demo: env
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro
	@cat artifacts/metrics/ladder.txt
	@echo
	@echo "The same as a picture: artifacts/plots/ladder.png; a held-out study: artifacts/plots/study.png"

PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

check: env lint types
	$(PYTEST) --dist load -m "not slow and not soak"

test: env lint types
	$(PYTEST) --dist loadfile -m "not soak"

# The same tests with the lowest versions that setup.cfg names, and with the newest that the index has, each in an
# environment of its own below build/. Another Python: make test-newest PYTHON=python3.13. Warnings are no errors there.
test-floors:
	$(PYTHON) -m venv build/floors
	build/floors/bin/python -m pip install --quiet --disable-pip-version-check uv
	build/floors/bin/uv pip compile --quiet setup.cfg --all-extras --resolution lowest-direct -o build/floors.txt
	build/floors/bin/uv pip install --quiet --python build/floors/bin/python -r build/floors.txt
	build/floors/bin/uv pip install --quiet --python build/floors/bin/python --no-deps -e .
	OMP_NUM_THREADS=1 build/floors/bin/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not soak" -o filterwarnings=

test-newest:
	$(PYTHON) -m venv build/newest
	build/newest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	OMP_NUM_THREADS=1 build/newest/bin/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not soak" -o filterwarnings=

soak: env
	$(PYTEST) --dist loadfile -m "soak"

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy can't see through the folder mapping of setup.cfg, so it checks an installed copy. Built with the setuptools
# that torch brings, so that nothing is downloaded.
types: env
	rm -rf build/typed build/lib
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy -p ichpipe

# Known vulnerabilities of what is installed, where the public list can be reached; elsewhere it says that it can't.
audit: env
	$(BIN)/python .ci/audit.py

# The documentation as a static site in build/site: open build/site/index.html. Nothing is fetched.
docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
