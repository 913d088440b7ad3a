"""Check a bundle on the machine that will serve it: integrity, divergence, speed, memory. Needs no PyTorch."""

from __future__ import annotations

from pathlib import Path

import click

from lightship.cli.display import stages


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--target", help="Of those in the bundle (default: the first).")
@click.option("--out", type=click.Path(), help="Write the report (JSON) to this file, outside the bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(bundle: str, target: str | None, out: str | None, as_json: bool) -> None:
    """Verify BUNDLE and measure it again here. Exit code 1 when it is damaged or above its limit."""
    from lightship.errors import UsageError
    from lightship.pipeline import check

    folder = Path(bundle).resolve()
    if out and Path(out).resolve().is_relative_to(folder):
        raise UsageError("--out lies inside the bundle, which is sealed", hint="choose a file elsewhere")
    with stages() as progress:
        report = check(folder, target=target, progress=progress)
    if out:
        Path(out).write_text(report.to_json(), encoding="utf-8")
    click.echo(report.to_json() if as_json else report.to_markdown())
