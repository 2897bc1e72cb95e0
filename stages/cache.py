"""``ichpipe cache``: what is in a store, whether it is sound, and freeing what is not used."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from ichpipe.common.artifacts import MODEL_FILE
from ichpipe.common.errors import ParamsError
from ichpipe.common.files import digest_of_file
from ichpipe.stages.options import Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ichpipe.common.artifacts import Artifacts
    from ichpipe.stages.options import Settings


@click.group("cache")
def command() -> None:
    """Look after an embedding store.

    \b
    Example:
      ichpipe cache info artifacts/embeddings.zarr
    """


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@command.command("info")
@click.argument("store")
@json_option
def cache_info(store: str, as_json: bool) -> str:
    """Say what is in STORE: rows, studies, generations, bytes, what made them, what is missing.

    \b
    Example:
      ichpipe cache info artifacts/embeddings.zarr
    """
    return info(store, as_json=as_json)


@command.command("verify")
@click.argument("store")
@json_option
@click.option("--repair", is_flag=True, help="Remove what is damaged, so that extract computes it again.")
def cache_verify(store: str, as_json: bool, repair: bool) -> Verdict:
    """Read every byte of STORE against its checksum; exit 1 and name the studies where something is wrong.

    \b
    Example:
      ichpipe cache verify artifacts/embeddings.zarr
    """
    return Verdict(*verify(store, as_json=as_json, repair=repair))


@command.command("prune")
@click.argument("store")
@click.option("--keep", metavar="GENERATION", multiple=True, help="Keep this one; may be repeated [all in use].")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
@click.pass_obj
def cache_prune(settings: Settings, store: str, keep: tuple[str, ...], dry_run: bool, as_json: bool) -> str:
    """Free STORE of generations that no slice CNN below the artifacts made, and of rows that left the index.

    \b
    Example:
      ichpipe cache prune artifacts/embeddings.zarr --dry-run
    """
    return prune(store, settings.artifacts(), keep, dry_run=dry_run, as_json=as_json)


def info(store: str, *, as_json: bool) -> str:
    """Describe a store; see `maintenance.info` for the JSON."""
    from ichpipe.cache import maintenance
    from ichpipe.cache.location import StoreLocation

    facts = maintenance.info(StoreLocation(store))
    return json.dumps(facts, indent=2) if as_json else _info_text(facts)


def verify(store: str, *, as_json: bool, repair: bool) -> tuple[str, bool]:
    """Check a store; return the text and whether it is sound. JSON: ``{"sound", "problems", "studies"}``."""
    from ichpipe.cache import maintenance
    from ichpipe.cache.location import StoreLocation

    place = StoreLocation(store)
    problems = maintenance.verify(place)
    if repair:
        maintenance.repair(place, problems)
    studies = sorted({uid for problem in problems for uid in problem.studies})
    if as_json:
        found = [problem.as_dict() for problem in problems]
        text = json.dumps({"sound": not problems, "problems": found, "studies": studies}, indent=2)
    elif not problems:
        text = f"{store} is sound: every chunk has its checksum"
    else:
        after = "removed; run: ichpipe extract" if repair else f"run: ichpipe cache verify --repair {store}"
        head = f"{store}: {len(problems)} parts are damaged, {len(studies)} studies need them; {after}"
        text = "\n".join([head, *(f"  {problem}" for problem in problems)])
    return text, not problems


def prune(store: str, artifacts: Artifacts, keep: Sequence[str], *, dry_run: bool, as_json: bool) -> str:
    """Remove what is not used; without ``keep``, used is what the slice CNNs below the artifacts made.

    Raises ParamsError where that is nothing: then the whole store would go.
    """
    from ichpipe.cache import maintenance
    from ichpipe.cache.fingerprint import name_of
    from ichpipe.cache.location import StoreLocation

    weights = {digest_of_file(path) for path in artifacts.slice_cnn.rglob(MODEL_FILE)}

    def wanted(identity: dict[str, Any]) -> bool:
        return name_of(identity) in keep if keep else identity.get("weights") in weights

    place = StoreLocation(store)
    identities = [one["identity"] or {} for one in maintenance.info(place)["generations"]]
    if not any(wanted(identity) for identity in identities):
        there = ", ".join(name_of(identity) for identity in identities) or "none"
        raise ParamsError(f"nothing in {store} would be left; name what to --keep (generations: {there})")
    done = maintenance.prune(place, wanted, dry_run=dry_run)
    if as_json:
        return json.dumps(done, indent=2)
    verb = "would go" if dry_run else "removed"
    names = ", ".join(done["generations_removed"]) or "none"
    return f"generations {verb}: {names}; rows {verb}: {done['rows_removed']}; {_size(done['bytes_freed'])} freed"


def _info_text(facts: dict[str, Any]) -> str:
    lines = [f"{facts['store']}: format {facts['format_version']}, {_size(facts['bytes'])} in {facts['files']} files"]
    for one in facts["generations"]:
        state = "complete" if one["complete"] else "not complete"
        lines.append(f"generation {one['generation']}, {state}, {_size(one['bytes'])}, {one['segments']} segments")
        lines.append(
            f"  {one['rows']} rows of {one['embedding_dim']} features, {one['series']} series, {one['studies']} studies"
        )
        if one.get("rows_unused"):
            lines.append(f"  {one['rows_unused']} rows that left the index (ichpipe cache prune frees them)")
        if one["chunks_missing"]:
            lines.append(f"  {one['chunks_missing']} of {one['chunks']} chunks are missing (run: ichpipe extract)")
        lines += [f"  missing: study {uid}" for uid in one["missing_studies"]]
        lines += [f"  {name}: {_short(value)}" for name, value in (one["identity"] or {}).items()]
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 90 else f"{text[:87]}..."


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"
