"""What a bundle says about its model: the report with its verdict, the recipe without paths, the manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightship.checkpoint import Checkpoint
from lightship.machine import machine, versions
from lightship.recipe import Precision, Recipe
from lightship.report import Metric, Report, named


def _limited(metrics: Sequence[Metric], limit: float) -> tuple[Metric, ...]:
    """The divergences with the limit that they must keep."""
    return tuple(replace(metric, limit=limit) if metric.name in ("kld", "gate_kld") else metric for metric in metrics)


def published(recipe: Recipe) -> Recipe:
    """`recipe` without paths of this machine: a bundle travels."""
    paths = {
        name: value and Path(value).name
        for name in ("text", "calibrate", "golden", "out")
        for value in [getattr(recipe, name)]
    }
    models = {"source": _placeless(recipe.source), "base": recipe.base and _placeless(recipe.base)}
    steps = tuple(
        step.model_copy(update={"options": {name: _placeless(value) if isinstance(value, str) else value
                                            for name, value in step.options.items()}})
        for step in recipe.steps
    )  # fmt: skip
    return recipe.model_copy(update={**paths, **models, "steps": steps})


def _placeless(source: str) -> str:
    path = Path(source).expanduser()
    return path.name if path.exists() else source


def _verdict(
    recipe: Recipe, checkpoint: Checkpoint, text: dict[str, Any], measured: Mapping[str, Sequence[Metric]],
    left_out: Mapping[str, str],
) -> str:  # fmt: skip
    def of(target: str, metrics: Sequence[Metric]) -> str:
        by_name = {metric.name: metric for metric in metrics}

        def ratio(name: str) -> float:
            return by_name[name].ratio() or float("nan")

        kld, limit = by_name["kld"], recipe.kld_limit()
        kept = "limit" if kld.value <= limit else "ABOVE ITS LIMIT"
        return (
            (f"with {target} " if len(measured) > 1 else "")
            + f"{1 / ratio('size'):.1f}× smaller than its {checkpoint.dtype} original, "
            f"decode {ratio('decode'):.1f}× and prefill "
            f"{ratio('prefill'):.1f}× the original's speed, mean KLD {kld.value:.2g} ({kept} {limit:g}), "
            f"top-1 {by_name['top1'].value:.1%}"
        )

    scored = "scored on default text only (give --text for yours)" if text["default_only"] else "on your text"
    found = [of(target, metrics) for target, metrics in measured.items()]
    return f"{recipe.precision.name}: {'; '.join([*found, scored])}{_without(left_out)}"


def _without(left_out: Mapping[str, str]) -> str:
    return "".join(f"; {target} left out, above its limit" for target in left_out)


def _history(checkpoint: Checkpoint) -> list[Any]:
    return [entry["precision"] for entry in checkpoint.lineage if entry.get("precision")]


def _origin(recipe: Recipe, checkpoint: Checkpoint) -> str:
    """Where the original comes from, and what it was before: a quantised file is unpacked, which restores nothing."""
    said = f"{published(recipe).source}, {checkpoint.size_bytes / 1e6:.0f} MB of {checkpoint.dtype}"
    for entry in checkpoint.lineage:
        if entry.get("precision"):
            types = ", ".join(f"{count} {name}" for name, count in entry["precision"].items())
            said += f", unpacked from {entry['source']} ({entry['bytes'] / 1e6:.0f} MB; tensors: {types})"
        if entry.get("base"):
            said += f", the adapter {entry['source']} merged into {_named(entry['base'])}"
    return said


def _named(base: dict[str, Any]) -> str:
    return f"{base['source']} at {base['revision']}" if base["revision"] else str(base["source"])


def report_of(
    recipe: Recipe, checkpoint: Checkpoint, text: dict[str, Any], measured: Mapping[str, Sequence[Metric]],
    left_out: Mapping[str, str] | None = None, precisions: Mapping[str, Precision] | None = None,
) -> Report:  # fmt: skip
    """The report on a decoder made by `recipe` from `checkpoint`; `text` describes what it was scored on, `measured` is
    by target, the preferred one first. `left_out`: targets that were above the limit, and where. `precisions`: what
    each target made of the recipe's."""
    order, limit, without = list(measured), recipe.kld_limit(), left_out or {}
    metrics = [each for name in order for each in named(_limited(measured[name], limit), name, order)]
    meta = {
        **_meta(recipe, checkpoint, text),
        "verdict": _verdict(recipe, checkpoint, text, measured, without),
        "limit_kld": limit,
        **({"left_out": dict(without)} if without else {}),
    }
    if precisions and len(precisions) == 1:  # perhaps of several that were asked for
        (meta["precision"],) = (precision.model_dump() for precision in precisions.values())
    elif precisions:
        meta["precisions"] = {name: precision.model_dump() for name, precision in precisions.items()}
    return Report(tuple(metrics), meta)


def encoder_report(
    recipe: Recipe, checkpoint: Checkpoint, text: dict[str, Any], measured: Sequence[Metric],
    limit: tuple[str, float], left_out: Mapping[str, str],
) -> Report:  # fmt: skip
    """The same of an encoder; `limit`: what is limited, `kld` or `cosine_loss`, and how far; `left_out`: targets that
    were above it, and where."""
    name, bound = limit
    metrics = tuple(
        replace(metric, limit=bound) if metric.name.removeprefix("gate_").startswith(name) else metric
        for metric in measured
    )
    by_name = {metric.name: metric for metric in metrics}
    far, scored = by_name[name], "scored on default text only (give --text for yours)"
    meta = {
        **_meta(recipe, checkpoint, text),
        f"limit_{name}": bound,
        "verdict": (
            f"{recipe.precision.name}: {1 / (by_name['size'].ratio() or math.nan):.1f}× smaller than its "
            f"{checkpoint.dtype} original, {by_name['batch1'].ratio() or math.nan:.1f}× its speed one at a time and "
            f"{by_name['batch32'].ratio() or math.nan:.1f}× in batches of 32, "
            f"{'1 − mean cosine' if name == 'cosine_loss' else 'mean KLD'} {far.value:.2g} "
            f"({'limit' if far.passed else 'ABOVE ITS LIMIT'} {bound:g}); "
            f"{scored if text['default_only'] else 'on your text'}" + _without(left_out)
        ),
        **({"left_out": dict(left_out)} if left_out else {}),
    }
    return Report(metrics, meta)


def _meta(recipe: Recipe, checkpoint: Checkpoint, text: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": " → ".join([Path(recipe.source).name, *(step.name for step in recipe.steps), recipe.precision.name]),
        "source": _origin(recipe, checkpoint),
        "precision": recipe.precision.model_dump(),
        "accepted": list(recipe.accept),
        "text": text,
        "machine": machine(),
        "versions": versions(),
        "precision_history": _history(checkpoint),
    }


def write_papers(content: Path, recipe: Recipe, report: Report) -> None:
    """Put report and recipe into the folder `content` of a bundle."""
    (content / "report.json").write_text(report.to_json(), encoding="utf-8")
    (content / "report.md").write_text(report.to_markdown(), encoding="utf-8")
    (content / "report.html").write_text(report.to_html(), encoding="utf-8")
    (content / "recipe.json").write_text(published(recipe).model_dump_json(indent=1) + "\n", encoding="utf-8")


def manifest_of(recipe: Recipe, checkpoint: Checkpoint, name: str, targets: Sequence[str]) -> dict[str, Any]:
    """What the manifest of bundle `name` says beside its files; `targets`: the preferred one first."""
    return {
        "name": name,
        "kind": checkpoint.kind,
        "targets": list(targets),
        "source": {
            "name": published(recipe).source,
            "revision": checkpoint.revision,
            "digest": checkpoint.digest(),
            "dtype": checkpoint.dtype,
            "precision_history": _history(checkpoint),
            "lineage": checkpoint.lineage,
        },
        "recipe": published(recipe).model_dump(mode="json"),
        "versions": versions(),
        "machine": machine(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
