"""Look up the installed packages in the public list of known vulnerabilities, where that can be reached.

python .ci/audit.py

pip-audit gets an environment of its own (build/audit). Exit code 1 where a package has a known vulnerability, 0 where
none has; where the list could not be asked, in whole or in part, that is said and is no failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

SECONDS = 300
PLACE = Path("build", "audit")


def main() -> int:
    """Audit and say what was found."""
    try:
        found = ask(installed())
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        print(f"dependencies were not audited: pip-audit can't be had or asked here ({type(error).__name__})")
        return 0
    text, code = verdict(found)
    print(text)
    return code


def installed() -> str:
    """Return the environment's packages as requirements; not our own, which no list knows."""
    line = [sys.executable, "-m", "pip", "list", "--format=freeze", "--exclude-editable", "--exclude", "ichpipe"]
    return subprocess.run(line, capture_output=True, text=True, check=True, timeout=SECONDS).stdout  # noqa: S603


def ask(requirements: str) -> list[dict[str, Any]]:
    """Return what pip-audit says of each package. ValueError where its answer is none."""
    PLACE.mkdir(parents=True, exist_ok=True)
    venv.create(PLACE, with_pip=True)
    python = PLACE / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    _run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "pip-audit"], check=True)
    (PLACE / "installed.txt").write_text(requirements, encoding="utf-8")
    asked = ["-r", PLACE / "installed.txt", "--no-deps", "--disable-pip", "--progress-spinner", "off", "-f", "json"]
    done = _run([python, "-m", "pip_audit", *asked], check=False)
    answer: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    return answer


def verdict(found: list[dict[str, Any]]) -> tuple[str, int]:
    """Return what to say, and the exit code. A package that was skipped was not found sound."""
    skipped = [one["name"] for one in found if "skip_reason" in one]
    bad = [one for one in found if one.get("vulns")]
    lines = [f"{one['name']} {one['version']}: {', '.join(flaw['id'] for flaw in one['vulns'])}" for one in bad]
    if len(skipped) == len(found):
        return f"dependencies were not audited: the list knows none of {len(found)} packages from here", 0
    lines.append(f"{len(found) - len(skipped)} of {len(found)} packages audited, {len(bad)} with known vulnerabilities")
    if skipped:
        lines.append(f"not audited: {', '.join(skipped)}")
    return "\n".join(lines), int(bool(bad))


def _run(line: list[Any], *, check: bool) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, line)), capture_output=True, text=True, check=check, timeout=SECONDS)  # noqa: S603


if __name__ == "__main__":
    sys.exit(main())
