"""Evaluate a bundle against its original: quality on held-out text, speed, memory, size."""

from __future__ import annotations

from pathlib import Path

import click

from lightship.cli.completion import models
from lightship.cli.display import stages


@click.command()
@click.argument("bundle", type=click.Path())
@click.argument("source", shell_complete=models)
@click.option("--base", metavar="PATH|HUB_ID", help="The model that an adapter changes (default: as it says).")
@click.option("--text", type=click.Path(), help="Score on this file: plain text, chat or pairs JSONL.")
@click.option("--golden", type=click.Path(), help="Golden cases (JSONL), run on original and candidate.")
@click.option("--level", type=click.Choice(["quick", "full"]), default="quick", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    bundle: str, source: str, base: str | None, text: str | None, golden: str | None, level: str, as_json: bool
) -> None:
    """Measure BUNDLE against the original SOURCE."""
    from lightship.errors import LimitExceeded
    from lightship.pipeline import evaluate

    with stages() as progress:
        report = evaluate(Path(bundle), source, base=base, text=text, golden=golden, level=level, progress=progress)
    click.echo(report.to_json() if as_json else report.to_markdown())
    if missed := [metric.name for metric in report.metrics if metric.passed is False]:
        raise LimitExceeded(f"above its limit: {', '.join(missed)}")
