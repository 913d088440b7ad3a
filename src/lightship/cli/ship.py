"""Ship a model: convert, quantise, gate, evaluate and pack it into a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lightship.cli.display import show_plan, stages
from lightship.cli.options import build_options, evaluation_options, preflight_options, recipe_of


@click.command()
@build_options
@evaluation_options
@preflight_options
def command(
    source: str, out: str | None, force: bool, as_json: bool, dry_run: bool, ignore_shortage: bool, **given: Any
) -> None:
    """Ship SOURCE (a folder, a .gguf file, a hub id, or `demo`) as a measured bundle."""
    from lightship.pipeline import plan_ship, ship

    recipe = recipe_of(source, **given)
    folder = Path(out) if out else Path(recipe.label)
    if dry_run:
        show_plan(plan_ship(recipe, folder, force=force), as_json)
        return
    with stages() as progress:
        bundle = ship(recipe, folder, force=force, progress=progress, ignore_shortage=ignore_shortage)
    if as_json:
        click.echo(json.dumps({"bundle": str(folder), "digest": bundle.digest, "report": bundle.report.to_dict()}))
        return
    click.echo(bundle.report.to_markdown())
    click.echo(f"bundle: {folder}  ({bundle.size_bytes / 1e6:.0f} MB, digest {bundle.digest[:16]})")
    if bundle.kind == "decoder":
        click.echo(f"next: lightship serve {folder}; faster settings: lightship tune {folder} --clients N …", err=True)
