"""Convert a model to a runtime folder: export, quantise and gate, without evaluation or bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lightship.cli.display import show_plan, stages
from lightship.cli.options import build_options, preflight_options, recipe_of


@click.command()
@build_options
@preflight_options
def command(
    source: str, out: str | None, force: bool, as_json: bool, dry_run: bool, ignore_shortage: bool, **given: Any
) -> None:
    """Convert SOURCE to a gated runtime folder."""
    from lightship.pipeline import convert, plan_convert

    recipe = recipe_of(source, **given)
    folder = Path(out) if out else Path(f"{recipe.label}-runtime")
    if dry_run:
        show_plan(plan_convert(recipe, folder, force=force), as_json)
        return
    with stages() as progress:
        convert(recipe, folder, force=force, progress=progress, ignore_shortage=ignore_shortage)
    click.echo(json.dumps({"folder": str(folder)}) if as_json else f"runtime folder: {folder}")
