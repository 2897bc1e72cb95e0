"""``ichpipe cache``: describe a store, check every chunk, and free unused space."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ichpipe.common.artifacts import MODEL_FILE
from ichpipe.common.errors import ParamsError
from ichpipe.common.files import digest_of_file
from ichpipe.stages.options import Verdict

if TYPE_CHECKING:
    from ichpipe.stages.options import Settings

log = logging.getLogger("ichpipe")


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
def info(store: str, as_json: bool) -> str:
    """Say what is in STORE: rows, studies, generations, bytes, what made them, what is missing.

    \b
    Example:
      ichpipe cache info artifacts/embeddings.zarr
    """
    from ichpipe.cache import maintenance
    from ichpipe.cache.location import StoreLocation

    facts = maintenance.info(StoreLocation(store))
    if as_json:
        return json.dumps(facts, indent=2)
    lines = [f"{facts['store']}: format {facts['format_version']}, {_size(facts['bytes'])} in {facts['files']} files"]
    for part in facts["generations"]:
        state = "complete" if part["complete"] else "not complete"
        lines += [
            f"generation {part['generation']}, {state}, {_size(part['bytes'])}, {part['segments']} segments",
            "  {rows} rows of {embedding_dim} features, {series} series, {studies} studies".format_map(part),
        ]
        if part.get("rows_unused"):
            lines.append(f"  {part['rows_unused']} rows that left the index (ichpipe cache prune frees them)")
        if part["chunks_missing"]:
            lines.append("  {chunks_missing} of {chunks} chunks are missing (run: ichpipe extract)".format_map(part))
        lines += [f"  missing: study {uid}" for uid in part["missing_studies"]]
        for name, value in (part["identity"] or {}).items():
            text = json.dumps(value)
            lines.append(f"  {name}: {text if len(text) <= 90 else f'{text[:87]}...'}")
    return "\n".join(lines)


@command.command("verify")
@click.argument("store")
@json_option
@click.option("--repair", is_flag=True, help="Remove what is damaged, so that extract computes it again.")
def verify(store: str, as_json: bool, repair: bool) -> Verdict:
    """Read every byte of STORE against its checksum; exit 1 and name the studies where something is wrong.

    \b
    Example:
      ichpipe cache verify artifacts/embeddings.zarr
    """
    from ichpipe.cache import maintenance
    from ichpipe.cache.location import StoreLocation

    location = StoreLocation(store)
    if repair:
        problems = maintenance.repair(location, lambda: log.info("another process writes %s; waiting for it", location))
    else:
        problems = maintenance.verify(location)
    studies = sorted({uid for problem in problems for uid in problem.studies})
    if as_json:
        listed = [asdict(problem) for problem in problems]
        text = json.dumps({"sound": not problems, "problems": listed, "studies": studies}, indent=2)
    elif not problems:
        text = f"{store} is sound: every chunk has its checksum"
    else:
        after = "removed; run: ichpipe extract" if repair else f"run: ichpipe cache verify --repair {store}"
        head = f"{store}: {len(problems)} parts are damaged, {len(studies)} studies need them; {after}"
        text = "\n".join([head, *(f"  {problem}" for problem in problems)])
    return Verdict(text, not problems)


@command.command("prune")
@click.argument("store")
@click.option("--keep", metavar="GENERATION", multiple=True, help="Keep this one; may be repeated [all in use].")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
@click.pass_obj
def prune(settings: Settings, store: str, keep: tuple[str, ...], dry_run: bool, as_json: bool) -> str:
    """Free STORE of generations that no slice CNN below the artifacts made, and of rows that left the index.

    \b
    Example:
      ichpipe cache prune artifacts/embeddings.zarr --dry-run
    """
    from ichpipe.cache import maintenance
    from ichpipe.cache.layout import name_of
    from ichpipe.cache.location import StoreLocation

    weights = {digest_of_file(path) for path in settings.artifacts().slice_cnn.rglob(MODEL_FILE)}

    def is_used(identity: dict[str, Any]) -> bool:
        return name_of(identity) in keep if keep else identity.get("weights") in weights

    location = StoreLocation(store)
    identities = [generation["identity"] or {} for generation in maintenance.info(location)["generations"]]
    if not any(map(is_used, identities)):  # the whole store would go
        names = ", ".join(map(name_of, identities)) or "none"
        raise ParamsError(f"nothing in {store} would be left; name what to --keep (generations: {names})")
    done = maintenance.prune(location, is_used, dry_run=dry_run)
    if as_json:
        return json.dumps(done, indent=2)
    verb = "would go" if dry_run else "removed"
    names = ", ".join(done["generations_removed"]) or "none"
    return f"generations {verb}: {names}; rows {verb}: {done['rows_removed']}; {_size(done['bytes_freed'])} freed"


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"
