"""Show a bundle: what it is, where it comes from, what was measured."""

from __future__ import annotations

import contextlib
import json
from typing import Any

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
    click.echo(f"kind      {opened.kind}")
    click.echo(f"targets   {', '.join(map(_target, opened.targets))}")
    click.echo(f"source    {_source(manifest['source'])}")
    click.echo(f"recipe    {_plain(manifest['recipe'])}")
    click.echo(f"created   {manifest['created']} on {_plain(manifest['machine'])}")
    click.echo(f"versions  {_plain(manifest['versions'])}\n")
    click.echo(opened.report.to_markdown())


def _target(name: str) -> str:
    """The name, and whether it takes one request at a time; a target that is not installed here says nothing."""
    from lightship.errors import MissingExtra, UnknownName
    from lightship.find import find

    with contextlib.suppress(UnknownName, MissingExtra):
        return f"{name} (one request at a time)" if getattr(find("targets", name), "BATCHING", "") == "none" else name
    return name


def _source(source: dict[str, Any]) -> str:
    """Name, dtype and digest, and every step that led to it with the precisions or the base it had before."""
    steps = [f"{entry['step']} ({_before(entry)})" for entry in source.get("lineage", ())]
    came = f"; came by {', '.join(steps)}" if steps else ""
    return f"{source['name']}, {source['dtype']}, digest {source['digest'][:16]}{came}"


def _before(entry: dict[str, Any]) -> str:
    base = entry.get("base")
    return f"on {_plain(base)}" if base else _plain(entry.get("precision") or {}) or "no change of precision"


def _plain(values: dict[str, Any]) -> str:
    """`key value, …`, without what was not set."""
    rows = ((key, _plain(value) if isinstance(value, dict) else value) for key, value in values.items())
    return ", ".join(f"{key} {value}" for key, value in rows if value not in (None, "", [], ()))
