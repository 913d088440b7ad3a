"""The options that several verbs share, and the recipe they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from pydantic import ValidationError

from lightship.cli.completion import models
from lightship.errors import UsageError
from lightship.recipe import NNCF, PRECISIONS, Precision, Recipe, explain

OPTIONAL = ("accept", "text", "revision", "base", "evaluate", "golden")
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def build_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `ship` and `convert`: what to build and what its gates must keep."""
    return _with(command, [
        click.argument("source", shell_complete=models),
        click.option("--out", "-o", type=click.Path(), help="Where the result goes (default: a name in this folder)."),
        click.option("--precision", "-p", type=click.Choice(PRECISIONS), default="int8", show_default=True),
        click.option("--target", multiple=True, metavar="openvino|onnx|gguf",
                     help="Runtime format; `ship` takes several (default: openvino; for encoders both, the faster "
                     "first). Of generating models onnx serves one request at a time; gguf is for llama.cpp, with the "
                     "precisions fp32, bf16, f16, q8_0, q5_0 and q4_0, and is converted to only."),
        click.option("--arithmetic", type=click.Choice(["auto", "f32"]), default="auto", show_default=True,
                     help="What it computes in; auto: as the runtime chooses, `tune` finds the fastest."),
        click.option("--activations", type=click.Choice(["auto", "int8"]), default="auto", show_default=True,
                     help="int8 and int4: activations rounded for each token as they come, in groups; gated as well."),
        click.option("--group-size", type=int, default=64, show_default=True, help="int4: weights per scale."),
        click.option("--ratio", type=float, default=1.0, show_default=True, help="int4: share of the body; rest int8."),
        click.option("--fit/--no-fit", default=None, help="int4: matrices fitted to the original's outputs (default, "
                     "unless another way is asked for; off, and nothing else: rounded to nearest)."),
        click.option("--awq", is_flag=True, default=None, help="int4: NNCF's activation-aware scaling."),
        click.option("--scale-estimation", is_flag=True, default=None, help="int4: NNCF's search for scales."),
        click.option("--gptq", is_flag=True, default=None, help="int4: NNCF's error-compensated rounding."),
        click.option("--bits", type=float, metavar="BITS", help="int4: limit in bits per weight over the whole graph; "
                     "what int4 hurts most, as measured, stays in int8."),
        click.option("--tables", type=click.Choice(["int8", "int4"]), default="int8", show_default=True,
                     help="Embedding and head, in int8 and int4."),
        click.option("--kv", type=click.Choice(["auto", "f32", "bf16", "u8", "u4"]), default="auto", show_default=True,
                     help="What keys and values are kept in (openvino)."),
        click.option("--accept", multiple=True, metavar='"kld<=X"',
                     help="Replace the default limit, on the record; of embedders \"cosine_loss<=X\"."),
        click.option("--text", type=click.Path(), help="Calibrate and score on this: plain text, chat or pairs JSONL."),
        click.option("--revision", help="Revision of a hub model."),
        click.option("--base", metavar="PATH|HUB_ID", help="The model that an adapter changes (default: as it says)."),
        click.option("--force", is_flag=True, help="Replace an earlier result."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ])  # fmt: skip


def preflight_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What is asked before a run of `ship`, `convert` or `run`."""
    return _with(command, [
        click.option("--dry-run", is_flag=True, help="Print the plan with what it needs, and do nothing."),
        click.option("--ignore-shortage", is_flag=True, help="Go on where memory or disk seems too small."),
    ])  # fmt: skip


def evaluation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `ship` has beyond `convert`."""
    return _with(command, [
        click.option("--evaluate", type=click.Choice(["quick", "full"]), default="quick", show_default=True),
        click.option("--golden", type=click.Path(), help="Golden cases (JSONL), run on original and candidate."),
    ])  # fmt: skip


def _with(command: Callable[..., Any], options: list[Decorator]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command


def recipe_of(source: str, **given: Any) -> Recipe:
    """The recipe that the options above describe."""
    names = ("arithmetic", "kv", "tables", "activations", "group_size", "ratio", "bits", "fit", *NNCF)
    try:
        return Recipe(
            source=source,
            target=given["target"] or None,
            precision=Precision(
                name=given["precision"], **{name: given[name] for name in names if given[name] is not None}
            ),
            **{name: given[name] for name in OPTIONAL if name in given},
        )
    except ValidationError as error:
        raise UsageError(explain(error)) from error
