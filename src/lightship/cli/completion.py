"""Print the script that completes verbs, options and files in a shell, and the line that turns it on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

LINES = {
    "bash": 'in ~/.bashrc:  eval "$(lightship completion bash)"',
    "zsh": 'in ~/.zshrc, after compinit:  eval "$(lightship completion zsh)"',
    "fish": "in ~/.config/fish/config.fish:  lightship completion fish | source",
}


@click.command()
@click.argument("shell", type=click.Choice(list(LINES)))
def command(shell: str) -> None:
    """Print the completion script for SHELL; its last line says what to write where."""
    from click.shell_completion import get_completion_class

    from lightship.cli import cli

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"the installed click completes nothing in {shell}")
    script = kind(cli, {}, "lightship", "_LIGHTSHIP_COMPLETE").source()
    click.echo(f"{script.rstrip()}\n\n# To turn it on, {LINES[shell]}")


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What a source can be completed to: files and folders, and the word `demo`."""
    from click.shell_completion import CompletionItem

    words = [CompletionItem("demo")] if incomplete and "demo".startswith(incomplete) else []
    return [*words, CompletionItem(incomplete, type="file")]
