"""Show a bundle: what it is, where it comes from, what was measured."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print the manifest and report as JSON.")
def command(bundle: str, as_json: bool) -> None:
    """Verify BUNDLE and show its report."""
    from pathlib import Path

    from lightship.bundle import Bundle

    opened = Bundle.open(Path(bundle))
    if as_json:
        click.echo(json.dumps({"manifest": opened.manifest, "report": opened.report.to_dict()}))
        return
    manifest = opened.manifest
    click.echo(f"{opened.name}  ({opened.size_bytes / 1e6:.1f} MB, {len(manifest['files'])} files, intact)")
    click.echo(f"digest    {opened.digest}")
    click.echo(f"targets   {', '.join(opened.targets)}")
    click.echo(f"source    {json.dumps(manifest['source'])}")
    click.echo(f"recipe    {json.dumps(manifest['recipe'])}")
    click.echo(f"created   {manifest['created']}\n")
    click.echo(opened.report.to_markdown())
