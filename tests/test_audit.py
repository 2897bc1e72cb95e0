"""What `make audit` says: a package that nobody could look up is not called sound."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / ".ci" / "audit.py"
spec = importlib.util.spec_from_file_location("audit", SCRIPT)
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)

SOUND = {"name": "numpy", "version": "2.0", "vulns": []}
BAD = {"name": "jinja2", "version": "2.4.1", "vulns": [{"id": "PYSEC-2019-217"}, {"id": "GHSA-x"}]}
SKIPPED = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited"}


def test_vulnerable_sound_and_skipped_packages_are_told_apart():
    assert audit.verdict([SOUND]) == ("1 of 1 packages audited, 0 with known vulnerabilities", 0)
    text, code = audit.verdict([SOUND, BAD, SKIPPED])
    assert code == 1
    assert "jinja2 2.4.1: PYSEC-2019-217, GHSA-x" in text
    assert "not audited: torch" in text


def test_where_every_package_is_skipped_nothing_was_audited():
    text, code = audit.verdict([SKIPPED, SKIPPED])
    assert code == 0
    assert text.startswith("dependencies were not audited")


def test_an_audit_that_can_t_be_made_says_so_and_fails_nothing(monkeypatch, capsys):
    monkeypatch.setattr(audit, "ask", lambda _: (_ for _ in ()).throw(OSError("no network")))
    assert audit.main() == 0
    assert "dependencies were not audited" in capsys.readouterr().out


def test_our_own_package_is_not_asked_about():
    assert "ichpipe" not in audit.installed()
