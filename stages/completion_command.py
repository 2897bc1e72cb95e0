"""`ichpipe completion`: what a shell needs to complete commands, options, parameter keys and arms by itself."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

VARIABLE = "_ICHPIPE_COMPLETE"


@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(_settings: object, shell: str) -> str:
    """Print what SHELL reads to complete ichpipe's commands, options, parameter keys and arms.

    \b
    One line in ~/.bashrc or ~/.zshrc:
      eval "$(ichpipe completion bash)"
      eval "$(ichpipe completion zsh)"
    \b
    One in ~/.config/fish/config.fish:
      ichpipe completion fish | source

    \b
    Example:
      eval "$(ichpipe completion bash)"
    """
    root = click.get_current_context().find_root().command
    found = get_completion_class(shell)
    if found is None:
        raise click.UsageError(f"no completion for {shell}")
    return found(root, {}, "ichpipe", VARIABLE).source()


def complete_arm(context: click.Context, _option: click.Parameter, start: str) -> list[CompletionItem]:
    """Complete the name of an arm of the parameter file."""
    return [CompletionItem(name) for name in _arms(context) if name.startswith(start)]


def complete_key(context: click.Context, _option: click.Parameter, start: str) -> list[CompletionItem]:
    """Complete ``SECTION.KEY=`` of ``--set``, with the arms that there are."""
    from ichpipe.params.schema import known_keys

    arms = _arms(context)
    keys = [key.replace(".ARM", f".{arm}") for key in known_keys() for arm in (arms if ".ARM" in key else ("",))]
    return [CompletionItem(f"{key}=") for key in keys if key.startswith(start)]


def _arms(context: click.Context) -> list[str]:
    from ichpipe.common.errors import IchpipeError
    from ichpipe.params.schema import load_params

    named = context.find_root().params.get("params_file")
    try:
        return list(load_params(named or Path("params.yaml")).sequence)
    except IchpipeError:
        return []  # a shell that completes is no place for messages; the command itself says what is wrong
