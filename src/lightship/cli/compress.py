"""Compress a model without training: steps on its weights, one after the other, each measured."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from pydantic import ValidationError

from lightship.cli.completion import models
from lightship.cli.display import stages
from lightship.errors import UsageError

if TYPE_CHECKING:
    from lightship.compress_pipeline import Compressed

ORDER = "lightship.compress.order"


class InOrder(click.Command):
    """Remembers in which order --step and --set were given: an option belongs to the step before it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta[ORDER] = [each.name for each in order if each.name in ("step", "set")]
        return super().parse_args(ctx, args)


@click.command(cls=InOrder)
@click.argument("source", shell_complete=models, required=False)
@click.option("--step", multiple=True, metavar="NAME", help="A step, see `lightship list`; several run in this order.")
@click.option("--set", multiple=True, metavar="OPTION=VALUE", help="An option of the step before it, see --describe.")
@click.option("--recipe", type=click.Path(), help="Take steps, limits, texts and seed from this recipe.")
@click.option("--limit", multiple=True, metavar="NAME=VALUE", help="Most that may be lost: kld=0.1, top1=0.9 (least) …")
@click.option("--out", "-o", type=click.Path(), help="Where the checkpoint goes (default: a name in this folder).")
@click.option("--text", type=click.Path(), help="Score on this, and calibrate on another part of it: plain text, chat.")
@click.option("--calibrate", type=click.Path(), help="Calibrate on this instead.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--evaluate", type=click.Choice(["quick", "full"]), default="quick", show_default=True)
@click.option("--revision", help="Revision of a hub model.")
@click.option("--base", metavar="PATH|HUB_ID", help="The model that an adapter changes (default: as it says).")
@click.option("--runs", default="runs", show_default=True, type=click.Path(), help="Where finished steps are kept.")
@click.option("--force", is_flag=True, help="Replace an earlier result.")
@click.option("--ignore-shortage", is_flag=True, help="Go on where memory seems too small.")
@click.option("--describe", is_flag=True, help="Print the options of the steps named, or of all, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def command(
    ctx: click.Context, /, source: str | None, out: str | None, runs: str, force: bool, ignore_shortage: bool,
    describe: bool, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Take SOURCE (a folder, a .gguf file, a hub id, or `demo`) through steps to a lighter checkpoint."""
    from lightship.compress_pipeline import compress

    if describe:
        _describe(given["step"])
        return
    if source is None:
        raise click.MissingParameter(ctx=ctx, param_hint="'SOURCE'", param_type="argument")
    by_hand = {name for name in given if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    recipe = _recipe(source, ctx.meta[ORDER], by_hand, **given)
    names = "-".join(spec.name for spec in recipe.steps)
    folder = Path(out) if out else Path(f"{Path(source.rstrip('/')).name.removesuffix('.gguf')}-{names}")
    with stages() as progress:
        found = compress(
            recipe, folder, runs=Path(runs), force=force, progress=progress, ignore_shortage=ignore_shortage
        )
    click.echo(json.dumps(_plain(found)) if as_json else _table(found))


def _describe(steps: Sequence[str]) -> None:
    """Print the options of `steps`, of all where none is named."""
    from lightship.find import names
    from lightship.step import step_class

    click.echo("\n\n".join(step_class(name).describe() for name in steps or names("compression")))


def _recipe(source: str, order: Sequence[str], by_hand: Collection[str], **given: Any) -> Any:
    """What the options describe; what is given `by_hand` goes before what a recipe says."""
    from lightship.recipe import Recipe, explain, read_recipe

    steps = _steps(order, given.pop("step"), given.pop("set"))
    file, limits = given.pop("recipe"), dict[str, str]()
    for name, value in (_pair(each, "--limit kld=0.1") for each in given.pop("limit")):
        if name in limits:
            raise UsageError(f"the limit {name} is given twice")
        limits[name] = value
    try:
        if file is None:
            return Recipe(source=source, steps=steps, limits=limits, **given)
        if steps:
            raise UsageError("steps are given twice", hint="give --recipe, or --step")
        base = read_recipe(Path(file))
        other = {name: value for name, value in given.items() if name in by_hand}
        read = base.model_dump(mode="json") | other | {"source": source, "limits": {**base.limits, **limits}}
        return Recipe.model_validate(read)
    except ValidationError as error:
        raise UsageError(explain(error)) from error


def _steps(order: Sequence[str], steps: Sequence[str], options: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """Each step with the options that were given behind it."""
    left, found = {"step": iter(steps), "set": iter(options)}, list[dict[str, Any]]()
    for kind in order:
        value = next(left[kind])
        if kind == "step":
            found.append({"name": value, "options": {}})
            continue
        if not found:
            raise UsageError(f"--set {value} stands before any --step", hint="first the step, then its options")
        name, text = _pair(value, "--set keep=0.9")
        if name in found[-1]["options"]:
            raise UsageError(f"the option {name} of the step {found[-1]['name']} is given twice")
        found[-1]["options"][name] = text
    return tuple(found)


def _pair(text: str, example: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name.strip().isidentifier() or not value.strip():
        raise UsageError(f"cannot read {text!r}", hint=f"write for example {example}")
    return name.strip(), value.strip()


def _plain(found: Compressed) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "folder": str(found.checkpoint.folder),
        "digest": found.checkpoint.digest(),
        "original": {"bytes": found.original.weight_bytes},
        "steps": [{**made.entry, "bytes": made.size, "metrics": [asdict(each) for each in made.metrics]}
                  for made in found.made],
    }  # fmt: skip


def _table(found: Compressed) -> str:
    """A row for each step: size, what is lost by then, time and memory."""
    from lightship.recipe import STEP_LIMITS

    rows = [["", "weights, MB", "of the original", "loss", "seconds", "peak, GB"]]
    for number, made in enumerate(found.made, 1):
        losses = ", ".join(f"{each.name} {each.value:.4g}" for each in made.metrics if each.name in STEP_LIMITS)
        peak, share = made.entry["peak_bytes"], made.size / found.original.weight_bytes
        rows.append([f"{number} {made.step.name()}", f"{made.size / 1e6:.1f}", f"{share:.1%}", losses,
                     f"{made.entry['seconds']:.1f}", f"{peak / 1e9:.2f}" if peak else "not measured"])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", f"checkpoint: {found.checkpoint.folder}  (digest {found.checkpoint.digest()[:16]})"])
