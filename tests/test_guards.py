"""One guard is removed in a copy of the checkout, and its test fails there; benchmarks/guards.py removes them all."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_benchmarks import load

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench():
    return load("guards")


def test_every_guard_stands_once_in_its_file_and_names_a_test(bench):
    assert len({guard.source for guard in bench.GUARDS}) == len(bench.GUARDS) >= 10
    for guard in bench.GUARDS:
        assert (ROOT / guard.file).read_text(encoding="utf-8").count(guard.source) == 1, guard.name
        file, _, test = guard.test.partition("::")
        assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8"), guard.name


@pytest.mark.slow
def test_a_guard_that_is_removed_fails_its_test_and_one_that_is_not_does_not(bench, tmp_path):
    (guard,) = [one for one in bench.GUARDS if one.name == "links to folders are not followed"]
    kept = replace(guard, name="nothing is removed", without=guard.source)
    found = bench.run(tmp_path, [guard, kept])
    assert (found["guards_removed"], found["tests_that_failed"]) == (2, 1)
    assert [one["guard"] for one in found["unnoticed"]] == ["nothing is removed"]
