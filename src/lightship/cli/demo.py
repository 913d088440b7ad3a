"""The whole way with the demo model: ship to int8, serve, ask one question, show the figures."""

from __future__ import annotations

from pathlib import Path

import click

from lightship.cli.display import stages

QUESTION = "In one sentence, what does a lighthouse do?"


@click.command()
@click.option("--once", is_flag=True, help="Stop after the answer instead of serving on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option("--out", default="bundles/demo-int8", show_default=True, type=click.Path(), help="Where the bundle goes.")
def command(once: bool, port: int, out: str) -> None:
    """Ship SmolLM2-135M-Instruct to int8, serve it on 127.0.0.1 and ask it a question."""
    from lightship.bundle import Bundle
    from lightship.errors import BundleError, UsageError
    from lightship.pipeline import ship
    from lightship.recipe import Recipe
    from lightship.serving.client import stream_chat
    from lightship.serving.server import bind, running

    bind("127.0.0.1", port).close()  # a port in use is better known before the work than after it
    try:
        bundle = Bundle.open(out)
        click.echo(f"using the bundle that lies in {out}", err=True)
    except (BundleError, UsageError):  # damaged, or not there yet
        with stages() as progress:
            bundle = ship(Recipe(source="demo"), Path(out), force=True, progress=progress)
    with running(bundle, port=port) as url:
        click.echo(f"\n{bundle.report.short().to_markdown(methods=False)}")
        click.echo(
            f"bundle    {bundle.folder}  ({bundle.size_bytes / 1e6:.0f} MB)\nserving   {url}\n\nyou>      {QUESTION}"
        )
        click.echo("model>    ", nl=False)
        messages = [{"role": "user", "content": QUESTION}]
        for piece in stream_chat(url, messages, temperature=0, max_tokens=80):
            click.echo(piece, nl=False)
        click.echo("\n")
        if not once:
            _wait(url)


def _wait(url: str) -> None:
    import threading

    click.echo(f"try:  lightship chat {url}\n      curl {url}/predict -H 'content-type: application/json' "
               "-d '{\"input\": \"Hello\"}'\n\nserving until Ctrl-C", err=True)  # fmt: skip
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
