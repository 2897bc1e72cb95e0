"""`ichpipe cache`: the command line of what looks after an embedding store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import click

from ichpipe.stages.options import Verdict

if TYPE_CHECKING:
    from ichpipe.common.artifacts import Artifacts


class HasArtifacts(Protocol):
    """What is needed of the options before the command."""

    def artifacts(self) -> Artifacts:
        """Return where the run's files lie."""


@click.group("cache")
def cache() -> None:
    """Look after an embedding store.

    \b
    Example:
      ichpipe cache info artifacts/embeddings.zarr
    """


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@cache.command("info")
@click.argument("store")
@json_option
def cache_info(store: str, as_json: bool) -> str:
    """Say what is in STORE: rows, studies, generations, bytes, what made them, what is missing.

    \b
    Example:
      ichpipe cache info artifacts/embeddings.zarr
    """
    from ichpipe.stages.cache import info

    return info(store, as_json=as_json)


@cache.command("verify")
@click.argument("store")
@json_option
@click.option("--repair", is_flag=True, help="Remove what is damaged, so that extract computes it again.")
def cache_verify(store: str, as_json: bool, repair: bool) -> Verdict:
    """Read every byte of STORE against its checksum; exit 1 and name the studies where something is wrong.

    \b
    Example:
      ichpipe cache verify artifacts/embeddings.zarr
    """
    from ichpipe.stages.cache import verify

    return Verdict(*verify(store, as_json=as_json, repair=repair))


@cache.command("prune")
@click.argument("store")
@click.option("--keep", metavar="GENERATION", multiple=True, help="Keep this one; may be repeated [all in use].")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
@click.pass_obj
def cache_prune(settings: HasArtifacts, store: str, keep: tuple[str, ...], dry_run: bool, as_json: bool) -> str:
    """Free STORE of generations that no slice CNN below the artifacts made, and of rows that left the index.

    \b
    Example:
      ichpipe cache prune artifacts/embeddings.zarr --dry-run
    """
    from ichpipe.stages.cache import prune

    return prune(store, settings.artifacts(), keep, dry_run=dry_run, as_json=as_json)
