"""What `lightship tune` found out about a bundle, as the server uses it: engine settings, and figures to show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightship import tuning
from lightship.bundle import Bundle
from lightship.draft import DRAFT_TOKENS, TARGET, check_draft
from lightship.errors import BundleError
from lightship.machine import machine
from lightship.report import Metric, Report
from lightship.serving.placement import Place
from lightship.serving.settings import ServeSettings

UNMEASURED = "unmeasured here"
SHOWN = ("prefill", "decode", "batch1", "batch32", "load", "peak_rss", "kld", "cosine_loss", "top1")


def with_tuned(
    path: Path, settings: ServeSettings, say: Callable[[str], None], places: Sequence[Place] = (Place(),)
) -> ServeSettings:
    """`settings` with what was tuned for the bundle at `path` on this machine, in place of defaults only: what is given
    by hand stays. Tells what it takes, and why it takes nothing from a file that lies there; never fails because of it.

    Threads are not taken for several engines, which have a place each: what was tuned had the machine to itself. The
    bundle need not be verified yet: its digest is what its manifest has. With a draft it takes only what was tuned with
    that one, which may be to leave it out; where there is nothing, the draft proposes `DRAFT_TOKENS`.
    """
    chosen = placed(_tuned(path, settings, say, len(places)), places)
    if settings.draft is None:
        return chosen
    tokens = chosen.tuned.settings.draft_tokens if chosen.tuned else DRAFT_TOKENS
    if not tokens:
        say("the draft is left out: the bundle was faster without it here")
    return drafted(chosen, tokens)


def placed(settings: ServeSettings, places: Sequence[Place]) -> ServeSettings:
    """`settings` with the threads that a quota grants a single engine, where none are asked for or tuned: they hold for
    what computes beside it too."""
    engine = settings.engine if len(places) > 1 else places[0].on(settings.engine)
    return settings if engine is settings.engine else replace(settings, engine=engine)


def drafted(settings: ServeSettings, tokens: int = DRAFT_TOKENS) -> ServeSettings:
    """`settings` whose engine takes `tokens` a step of their draft, where they have one; without `tokens` none."""
    if settings.draft is None:
        return settings
    draft = str(settings.draft.target_folder(TARGET)) if tokens else None
    return replace(settings, engine=replace(settings.engine, draft=draft, draft_tokens=tokens))


def check_drafted(settings: ServeSettings, bundle: Bundle) -> None:
    """Raise `UnsupportedError` unless the draft, where the engine takes one, can propose to `bundle`."""
    if settings.draft is not None and settings.engine.draft is not None:
        check_draft(settings.draft, bundle, settings.target or bundle.targets[0], settings.max_context)


def _tuned(path: Path, settings: ServeSettings, say: Callable[[str], None], engines: int) -> ServeSettings:
    if not settings.use_tuned or Bundle.stated_kind(path) != "decoder":
        return settings
    draft = settings.draft.digest if settings.draft else None
    found = tuning.choose(path, Bundle.stated_digest(path), Bundle.stated_targets(path), settings.target, draft)
    if found.said is not None:
        say(found.said)
    entry = found.entry
    if entry is None:
        return settings
    engine = entry.settings.on(settings.engine)
    if engines > 1:
        engine = replace(engine, threads=settings.engine.threads)
    return replace(settings, engine=engine, target=entry.target, tuned=entry)


def target_of(path: Path, settings: ServeSettings) -> str:
    """The target that will serve the bundle at `path`, nothing verified. Raises `BundleError` where it has no such."""
    every = Bundle.stated_targets(path)
    if settings.target is not None and settings.target not in every:
        raise BundleError(f"{path} has no target {settings.target!r}; it has {', '.join(every)}")
    return settings.target or every[0]


def facts(bundle: Bundle, settings: ServeSettings) -> dict[str, Any]:
    """What /v1/models says of a bundle beside OpenAI's fields: precision, target, signature, its draft, and what was
    measured on this machine, by `tune` or when the bundle was made; what was measured elsewhere is not shown.
    `tuned_ignored` tells of a file of tuned settings that could not be used."""
    draft, tokens = settings.draft, settings.engine.draft_tokens
    return {
        "precision": bundle.manifest.get("recipe", {}).get("precision", {}).get("name"),
        "target": settings.target or bundle.targets[0],
        "signature": "unsigned",  # signing is not there yet
        "draft": {"name": draft.name, "digest": draft.digest, "tokens": tokens} if draft and tokens else None,
        "measured": _measured(bundle, settings) or UNMEASURED,
        **({"tuned_ignored": dict(settings.tuned_ignored)} if settings.tuned_ignored else {}),
    }


def _measured(bundle: Bundle, settings: ServeSettings) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    entry = settings.tuned
    if (report := bundle.measured(settings.target or bundle.targets[0])).meta.get("machine") == machine():
        found["bundle"] = _figures(report)
    if entry is not None and entry.bundle == bundle.digest:
        found["tuned"] = {
            "workload": entry.workload.said(), "settings": tuning.label(entry.target, entry.settings),
            **entry.figures.model_dump(), "kld": entry.kld, "limit_kld": entry.limit_kld, "created": entry.created,
        }  # fmt: skip
    return found or None


def _figures(report: Report) -> dict[str, Any]:
    shown: list[Metric] = [metric for metric in report.metrics if metric.name in SHOWN]
    return {metric.name: {"value": metric.value, "unit": metric.unit, "n": metric.n} for metric in shown}
