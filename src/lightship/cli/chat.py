"""Chat in the terminal with a running server, or with a bundle that is served for the occasion."""

from __future__ import annotations

import contextlib

import click


@click.command()
@click.argument("where", type=click.Path())
@click.option("--target", help="Of those in the bundle (default: the first, or what was tuned here).")
@click.option("--system", help="A system message.")
@click.option("--temperature", default=0.7, show_default=True, type=click.FloatRange(0, 2))
@click.option("--max-tokens", default=512, show_default=True, type=click.IntRange(1))
@click.option(
    "--key",
    envvar="LIGHTSHIP_KEY",
    help="The server's key; better in $LIGHTSHIP_KEY, where others on this machine do not see it.",
)
def command(
    where: str, target: str | None, system: str | None, temperature: float, max_tokens: int, key: str | None
) -> None:
    """Chat with WHERE, the URL of a server or a bundle. An empty line or Ctrl-D ends."""
    from lightship.errors import UsageError
    from lightship.serving.client import stream_chat
    from lightship.serving.server import running
    from lightship.serving.settings import ServeSettings

    remote = where.startswith(("http://", "https://"))
    if remote and target:
        raise UsageError("which target a server uses is its own business", hint="give --target to `lightship serve`")
    settings = ServeSettings(keys=None, target=target)
    key = key if remote else None
    messages = [{"role": "system", "content": system}] if system else []
    with contextlib.nullcontext(where) if remote else running(where, settings=settings) as url:
        while line := _ask():
            messages.append({"role": "user", "content": line})
            said = ""
            for piece in stream_chat(url, messages, key, temperature=temperature, max_tokens=max_tokens):
                said += piece
                click.echo(piece, nl=False)
            click.echo()
            messages.append({"role": "assistant", "content": said})


def _ask() -> str:
    try:
        return str(click.prompt("you", prompt_suffix="> ", default="", show_default=False, err=True))
    except click.Abort:
        return ""
