"""Remove one guard of the product after the other, and demand that a test fails each time.

python benchmarks/guards.py --out guards.json

A copy of the checkout is changed, never the checkout itself. All named tests must pass before anything is removed.
A test that no longer fails shows a guard that nothing watches.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[1]
ROOMS = {"pipeline": "ichpipe", "stages": "ichpipe/stages", "cache": "ichpipe/cache"}
FAILED, PASSED = 1, 0  # pytest's exit codes; any other one means that the test did not run


@dataclass(frozen=True)
class Guard:
    """A piece of source that occurs once in its file, what stands there without the guard, and the test that tells."""

    name: str
    file: str
    source: str
    without: str
    test: str


GUARDS = (
    # Faults
    Guard(
        "a file is synced before it is renamed",
        "pipeline/common/files.py",
        "        sync(temporary)\n",
        "",
        "tests/test_faults.py::test_bytes_and_name_are_synced_before_and_after_the_renaming",
    ),
    Guard(
        "nothing half-written is left after an error",
        "pipeline/common/files.py",
        "        shutil.rmtree(folder, ignore_errors=True)",
        "        pass",
        "tests/test_faults.py::test_other_errors_are_not_taken_for_the_disk",
    ),
    Guard(
        "a full disk is told from other errors of libraries",
        "pipeline/common/files.py",
        "    return next((text for text in _FULL_TEXTS if text in str(error)), None)",
        "    return None",
        "tests/test_faults.py::test_every_library_that_writes_is_understood",
    ),
    Guard(
        "one process at a time writes a stage's outputs",
        "pipeline/common/files.py",
        '        stack.enter_context(FileLock(folder / f".{stage}.lock").acquire(timeout=0))',
        "        FileLock",
        "tests/test_faults.py::test_processes_of_one_training_share_a_folder",
    ),
    Guard(
        "what a killed run left half-written is removed",
        "pipeline/common/files.py",
        "            shutil.rmtree(path, ignore_errors=True)",
        "            pass",
        "tests/test_faults.py::test_what_a_killed_run_left_half_written_is_removed_and_nothing_else",
    ),
    Guard(
        "a signal ends a stage cleanly",
        "stages/stopping.py",
        "            signal.signal(number, _handle)",
        "            pass",
        "tests/test_signals.py::test_a_signal_ends_the_work_with_one_line_and_its_exit_code[SIGTERM-143]",
    ),
    Guard(
        "what does not end by itself is ended",
        "stages/stopping.py",
        "    timer.start()",
        "    pass",
        "tests/test_signals.py::test_what_does_not_end_by_itself_is_ended",
    ),
    Guard(
        "processes end when their parent was killed",
        "pipeline/common/processes.py",
        "mp_context=spawn, initializer=follow_the_parent",
        "mp_context=spawn",
        "tests/test_signals.py::test_processes_of_a_pool_end_with_their_parent[9]",
    ),
    Guard(
        "a decoding process that was still importing ends with its parent",
        "pipeline/images/slice_dataset.py",
        "        worker_init_fn=follow_the_parent,\n",
        "",
        "tests/test_signals.py::test_a_decoding_process_that_is_still_importing_ends_with_its_parent",
    ),
    Guard(
        "a compressed stream claims the image of the header",
        "pipeline/dicom/stream_checks.py",
        "    if (rows, columns) != (claim.rows, claim.columns):\n",
        "    if False:\n",
        "tests/test_codestreams.py::test_a_stream_that_claims_another_size_is_refused_before_any_decoder",
    ),
    Guard(
        "coded bits are counted before the pixels that a header claims",
        "pipeline/dicom/stream_checks.py",
        "if syntax in JPEG_LOSSLESS and len(coded) * 8 < claim.rows * claim.columns:",
        "if False:",
        "tests/test_codestreams.py::test_more_pixels_than_coded_bits_are_refused_before_they_are_counted",
    ),
    Guard(
        "an index that was changed is refused",
        "pipeline/index/slice_index.py",
        '    if present := [name for name, fault in faults.items() if fault]:\n        raise DataError(f"{path} holds',
        '    if present := []:\n        raise DataError(f"{path} holds',
        "tests/test_silent_wrongs.py::test_an_index_that_was_changed_is_refused",
    ),
    Guard(
        "a checkpoint of other parameters is not used",
        "pipeline/training/trainer.py",
        'state.get("key") != self.key or ',
        "",
        "tests/test_training.py::test_a_checkpoint_of_other_parameters_or_a_torn_one_is_not_used",
    ),
    Guard(
        "a loss that is not finite stops training",
        "pipeline/training/trainer.py",
        "    if math.isfinite(loss):",
        "    if loss == loss or True:",
        "tests/test_training.py::test_divergence_stops_with_the_remedy_and_keeps_the_last_good_state",
    ),
    Guard(
        "a chunk's checksum is compared",
        "cache/chunks.py",
        'if google_crc32c.value(body).to_bytes(layout.CRC_BYTES, "little") != checksum:',
        "if not checksum:",
        "tests/test_store_faults.py::test_verify_names_the_studies_of_a_flipped_bit_and_repair_costs_one_chunk",
    ),
    # Silent wrongs and input
    Guard(
        "a series under two patients is rejected whole",
        "pipeline/index/scan.py",
        "    mixed = of_series | of_study",
        "    mixed = of_series & of_study",
        "tests/test_scan.py::test_a_series_under_two_patients_is_rejected_whole",
    ),
    Guard(
        "a file that a scan has read is read again when it has changed",
        "pipeline/index/header_cache.py",
        ' & (np.asarray(table["stamp"])[row] == stamps)',
        "",
        "tests/test_header_cache.py::test_a_file_of_another_time_is_read_again_though_it_has_the_same_size",
    ),
    Guard(
        "an archive's bomb does not unfold",
        "pipeline/dicom/archive.py",
        "    _require_size(info.file_size, largest)\n",
        "",
        "tests/test_archive.py::test_a_bomb_is_not_unfolded",
    ),
    Guard(
        "a model of another kind is refused",
        "pipeline/models/weights.py",
        "    if header.kind != kind:",
        "    if False:",
        "tests/test_weights.py::test_another_kind_is_refused",
    ),
    # Privacy and safety
    Guard(
        "no PatientID leaves the scan where they are hashed",
        "pipeline/index/scan.py",
        '    return headers.set_column(headers.schema.get_field_index("patient_id"), "patient_id", values)',
        "    return headers",
        "tests/test_safety.py::test_labels_of_patients_are_joined_by_hashed_identifiers_too",
    ),
    Guard(
        "coded values are shown as terms or not at all",
        "pipeline/dicom/coded_terms.py",
        'repr(value) if value in terms else "no term of the standard"',
        "repr(value)",
        "tests/test_safety.py::test_only_terms_of_the_standard_are_repeated",
    ),
    Guard(
        "weights hold no code",
        "pipeline/models/weights.py",
        "weights_only=True",
        "weights_only=False",
        "tests/test_safety.py::test_weights_and_checkpoints_that_hold_code_do_not_run_it",
    ),
    Guard(
        "links to folders are not followed",
        "pipeline/dicom/archive.py",
        "entry.is_dir(follow_symlinks=False)",
        "entry.is_dir()",
        "tests/test_safety.py::test_links_to_folders_are_not_followed",
    ),
    Guard(
        "an arm names no other place",
        "pipeline/params/schema.py",
        'if not name.isprintable() or name.startswith((".", " ")) or set(name) & set("/\\\\:") or not name.strip():',
        "if not name:",
        "tests/test_safety.py::test_an_arm_names_one_folder_and_no_other_place",
    ),
    Guard(
        "a report for the PACS is written under valid UIDs alone",
        "pipeline/inference/structured_report.py",
        "            if not valid:",
        "            if valid is None:",
        "tests/test_safety.py::test_a_report_is_not_written_where_a_uid_leads",
    ),
    Guard(
        "the page of the run escapes what it shows",
        "pipeline/report/page.py",
        "autoescape=True",
        "autoescape=False",
        "tests/test_report.py::test_page_of_plain_sections_escapes_everything",
    ),
)


def main() -> None:
    """Run and print; exit code 1 where a guard could be removed without a failing test."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), GUARDS)
    text = json.dumps(result, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)
    sys.exit(0 if result["tests_that_failed"] == len(GUARDS) else 1)


def run(folder: Path, guards: Sequence[Guard]) -> dict[str, Any]:
    """Return counts, and the guards whose removal no test has noticed."""
    started, unnoticed, failed = time.monotonic(), [], 0
    copy = _copy(folder / "checkout")
    code, said = _pytest(copy, sorted({guard.test for guard in guards}))
    if code != PASSED:
        raise SystemExit(f"with all guards in place a test fails:\n{said[-3000:]}")
    for guard in guards:
        with _removed(copy, guard):
            code, said = _pytest(copy, [guard.test])
        failed += code == FAILED
        if code != FAILED:
            unnoticed.append({"guard": guard.name, "pytest_exit_code": code, "said": said[-500:]})
        print(f"{'failed, as it should' if code == FAILED else 'NOT NOTICED'}: {guard.name}", file=sys.stderr)
    return {
        "guards_removed": len(guards),
        "tests_that_failed": failed,
        "unnoticed": unnoticed,
        "seconds": round(time.monotonic() - started),
    }


def _copy(target: Path) -> Path:
    """Copy what tests need, with the rooms a second time as they install."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in (*ROOMS, "tests", "benchmarks", "params"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("setup.cfg", "pyproject.toml", "params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, target / name)
    for room, place in ROOMS.items():
        shutil.copytree(ROOT / room, target / "site" / place, ignore=ignore)
    return target


class _removed:  # noqa: N801 - used as a word
    """The guard is gone inside the block."""

    def __init__(self, copy: Path, guard: Guard) -> None:
        room, _, rest = guard.file.partition("/")
        self._paths = [copy / guard.file, copy / "site" / ROOMS[room] / rest]
        self._guard, self._before = guard, self._paths[0].read_text(encoding="utf-8")
        if self._before.count(guard.source) != 1:
            raise SystemExit(
                f"{guard.name}: {self._before.count(guard.source)} times in {guard.file}: {guard.source!r}"
            )

    def __enter__(self) -> None:
        self._write(self._before.replace(self._guard.source, self._guard.without))

    def __exit__(self, *_error: object) -> None:
        self._write(self._before)

    def _write(self, text: str) -> None:
        for path in self._paths:
            path.write_text(text, encoding="utf-8")


def _pytest(copy: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Run tests of the copy with the package of the copy: what PYTHONPATH names comes before what is installed."""
    environment = os.environ | {
        "PYTHONPATH": str(copy / "site"),
        "PYTHONDONTWRITEBYTECODE": "1",  # a changed file of the same second and size would not be compiled again
        "OMP_NUM_THREADS": "1",
    }
    line = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(line, cwd=copy, env=environment, capture_output=True, text=True, check=False, timeout=600)
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    main()
