"""``ichpipe completion``: print a shell's completion script."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


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
    completion = get_completion_class(shell)
    assert completion is not None  # noqa: S101 - click has a class for each of the three shells
    return completion(click.get_current_context().find_root().command, {}, "ichpipe", "_ICHPIPE_COMPLETE").source()
