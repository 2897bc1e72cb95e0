"""``ichpipe completion``: the script that completes commands, options, parameter keys and arms in a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

VARIABLE = "_ICHPIPE_COMPLETE"


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_obj
def command(_settings: object, shell: str) -> str:
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
