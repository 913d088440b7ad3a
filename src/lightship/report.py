"""What was measured. Every metric carries value, unit, n, standard error, direction, baseline and method."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, NoReturn

from lightship.errors import BundleError, UnsupportedError, UsageError

VERSION = 1
GATES = ("gate_", "export_", "served_")


@dataclass(frozen=True)
class Metric:
    """One figure. `baseline` is the same figure of the original, None where it has none; `limit` what it must keep."""

    name: str
    value: float
    unit: str
    n: int
    stderr: float | None
    direction: Literal["lower", "higher"]
    baseline: float | None
    method: str
    limit: float | None = None

    def ratio(self) -> float | None:
        """value / baseline; None without a baseline, or with one of 0."""
        return self.value / self.baseline if self.baseline else None

    def delta(self) -> float | None:
        """value − baseline."""
        return None if self.baseline is None else self.value - self.baseline

    @property
    def passed(self) -> bool | None:
        """Whether the limit is kept (equal is kept, NaN never is); None without a limit."""
        if self.limit is None:
            return None
        return self.value <= self.limit if self.direction == "lower" else self.value >= self.limit


@dataclass(frozen=True)
class Report:
    """Metrics and what they were measured on.

    `meta` holds title, verdict, source, precision, text, machine, versions and the limits accepted on purpose.
    """

    metrics: tuple[Metric, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str) -> Metric | None:
        """The metric called `name`."""
        return next((metric for metric in self.metrics if metric.name == name), None)

    def of_target(self, target: str, targets: Sequence[str]) -> Report:
        """With the figures of one of a bundle's `targets` only, under their plain names, see `named`."""
        others = [f"_{each}" for each in targets[1:]]
        if target == targets[0]:
            found = tuple(metric for metric in self.metrics if not metric.name.endswith(tuple(others)))
        else:
            own = (metric for metric in self.metrics if metric.name.endswith(f"_{target}"))
            found = tuple(replace(metric, name=metric.name.removesuffix(f"_{target}")) for metric in own)
        return Report(found, self.meta)

    def short(self) -> Report:
        """Without the gates' own figures, which those of the evaluation repeat on other text."""
        kept = tuple(metric for metric in self.metrics if not metric.name.startswith(GATES))
        return Report(kept, self.meta)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in `report.json`; `passed` is there for scripts and derived anew when read."""
        metrics = [{**asdict(metric), "passed": metric.passed} for metric in self.metrics]
        return {"version": VERSION, "meta": self.meta, "metrics": metrics}

    def to_json(self) -> str:
        """Canonical JSON: equal reports give equal bytes. NaN and infinities are refused (`BundleError`)."""
        try:
            return json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False) + "\n"
        except ValueError as error:
            wrong = [metric.name for metric in self.metrics if not _finite(metric)]
            raise BundleError(f"a report holds finite numbers only; wrong: {', '.join(wrong) or 'meta'}") from error

    @staticmethod
    def from_json(text: str) -> Report:
        """The inverse of `to_json`; fields added since are passed over. Raises `BundleError` for anything else."""
        try:
            data = json.loads(text, parse_constant=_no_constant)
            version = data["version"]
            if type(version) is int and version > VERSION:
                raise UnsupportedError(f"report version {version}; this lightship reads up to {VERSION}")
            if type(version) is not int or not isinstance(data["meta"], dict):
                raise ValueError("version or meta is of the wrong type")
            return Report(tuple(_metric(entry) for entry in data["metrics"]), data["meta"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise BundleError(f"this is not a report: {error}") from error

    def to_markdown(self, *, methods: bool = True) -> str:
        """Verdict, the before/after table, circumstances and (with `methods`) how each figure was measured."""
        return "\n".join(_markdown(self, methods))

    def to_html(self) -> str:
        """One self-contained page: no script, no link, light and dark, everything escaped."""
        return _page(self)


def named(metrics: Iterable[Metric], target: str, targets: Sequence[str]) -> list[Metric]:
    """The metrics of one of a bundle's `targets` as its report has them: those of other targets than the first carry
    its name at their end."""
    return [metric if target == targets[0] else replace(metric, name=f"{metric.name}_{target}") for metric in metrics]


# ── Reading ─────────────────────────────────────────────────────────────────


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(metric: Metric) -> bool:
    return all(
        value is None or math.isfinite(value)
        for value in (metric.value, metric.stderr, metric.baseline, metric.limit)
    )  # fmt: skip


def _metric(entry: dict[str, Any]) -> Metric:
    """One entry of `metrics`, its types checked. Raises `ValueError`, `TypeError` or `KeyError`."""
    known = {each.name: entry[each.name] for each in fields(Metric) if each.name in entry}
    for name in ("value", "stderr", "baseline", "limit"):
        if known.get(name) is not None or name == "value":
            if type(known[name]) not in (int, float):
                raise TypeError(f"{name} is {known[name]!r}, expected a number")
            known[name] = float(known[name])
    metric = Metric(**known)
    if not all(isinstance(text, str) for text in (metric.name, metric.unit, metric.method)):
        raise TypeError("name, unit and method must be text")
    if type(metric.n) is not int or metric.direction not in ("lower", "higher") or not _finite(metric):
        raise ValueError(f"the metric {metric.name!r} is not well formed")
    return metric


# ── Markdown ────────────────────────────────────────────────────────────────


def figure(value: float | None) -> str:
    """A number with about four significant digits; empty for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    if abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.4g}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first row the heading, columns padded to read well in a terminal."""
    cells = [[_plain(cell).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def compare_table(reports: list[tuple[str, Report]]) -> str:
    """One Markdown table over several reports of one model, a column each: value ± s.e. (ratio to its own original).

    The original is measured anew in every run; where its figures differ, their range is shown.
    """
    if not reports:
        raise UsageError("there is no report to compare", hint="give at least one")
    rows = [["measure", "unit", "original", *(label for label, _ in reports), "n"]]
    keys = dict.fromkeys((metric.name, metric.unit) for _, report in reports for metric in report.metrics)
    for key in keys:
        found = [next((m for m in report.metrics if (m.name, m.unit) == key), None) for _, report in reports]
        there = [metric for metric in found if metric is not None]
        baselines = [metric.baseline for metric in there if metric.baseline is not None]
        counts = sorted({metric.n for metric in there})
        rows.append([*key, _range(baselines), *map(_compared, found), _range(counts)])
    return table(rows)


def _plain(text: str) -> str:
    """One line without control characters: a report may come from elsewhere, and is printed on terminals."""
    return "".join(char if char.isprintable() else " " for char in text)


def _range(values: Sequence[float]) -> str:
    if not values:
        return ""
    ends = [figure(min(values)), figure(max(values))]
    return " – ".join(dict.fromkeys(ends))


def _compared(metric: Metric | None) -> str:
    if metric is None:
        return ""
    error = f" ± {figure(metric.stderr)}" if metric.stderr is not None else ""
    ratio = f" ({metric.ratio():.2f}×)" if metric.baseline else ""
    return figure(metric.value) + error + ratio + _mark(metric)


def _mark(metric: Metric) -> str:
    return {None: "", True: " ✓", False: " ✗"}[metric.passed]


def _change(metric: Metric) -> str:
    """`0.25×`; the difference where the original's figure is 0; empty without one."""
    ratio, delta = metric.ratio(), metric.delta()
    if ratio is not None:
        return f"{ratio:.2f}×"
    return "" if delta is None else f"{'+' if delta > 0 else ''}{figure(delta)}"


def _cells(report: Report) -> list[list[str]]:
    """The before/after table; the limit has a column when there is one."""
    limited = any(metric.limit is not None for metric in report.metrics)
    rows = [
        [
            "measure",
            str(report.meta.get("baseline", "original")),
            "this",
            "ratio or Δ",
            "unit",
            "± s.e.",
            "n",
            *(["limit"] if limited else []),
        ]
    ]
    for metric in report.metrics:
        row = [metric.name, figure(metric.baseline), figure(metric.value), _change(metric), metric.unit,
               figure(metric.stderr), str(metric.n)]  # fmt: skip
        rows.append([*row, figure(metric.limit) + _mark(metric)] if limited else row)
    return rows


def _circumstances(meta: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the figures depend on, as label and one line of text."""
    for key in ("source", "precision", "text", "machine", "versions"):
        if meta.get(key):
            yield key, _inline(meta[key])
    if meta.get("left_out"):
        yield "left out", _inline(meta["left_out"])
    if meta.get("accepted"):
        yield "limits accepted on purpose", _inline(meta["accepted"])


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(value[key])}" for key in sorted(value) if value[key] is not None)
    return ", ".join(map(_inline, value)) if isinstance(value, list | tuple) else str(value)


def _methods(metrics: Iterable[Metric]) -> dict[str, list[str]]:
    """method → the metrics measured by it."""
    found: dict[str, list[str]] = {}
    for metric in metrics:
        found.setdefault(metric.method, []).append(metric.name)
    return found


def _markdown(report: Report, methods: bool) -> Iterator[str]:
    yield f"**{_plain(str(report.meta.get('verdict', '')))}**\n"
    yield table(_cells(report))
    yield from (f"- {label}: {_plain(text)}" for label, text in _circumstances(report.meta))
    if methods and report.metrics:
        yield "\nHow it was measured:\n"
        for method, names in _methods(report.metrics).items():
            yield f"- {_plain(', '.join(names))}: {_plain(method)}"
    yield ""


# ── HTML ────────────────────────────────────────────────────────────────────

STYLE = """
:root{color-scheme:light dark;--ink:#1c2330;--dim:#5b6475;--bar:#2f6fde;--base:#9aa4b5;--bad:#c62f3b;--page:#fff;
--line:#dde}
@media(prefers-color-scheme:dark){
:root{--ink:#e8ecf4;--dim:#9ab;--bar:#6ea1ff;--base:#5a6575;--bad:#ff7b86;--page:#12161d;--line:#2a3240}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:62rem;
margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}td,th{padding:.3rem .6rem;text-align:right;
border-bottom:1px solid var(--line)}td:first-child,th:first-child{text-align:left}.verdict{font-size:1.2rem}
.method,pre,dd{color:var(--dim);font-size:.85rem}.wide,pre{overflow-x:auto}svg{max-width:100%;height:auto}
svg text{fill:var(--ink);font:13px system-ui}.base{fill:var(--base)}.this{fill:var(--bar)}.failed{fill:var(--bad)}
.limit{stroke:var(--bad);stroke-width:2;stroke-dasharray:3 2}dt{font-weight:600}dd{margin:0 0 .4rem}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # the browser holds the page to its promise
WIDEST, ROW = 500, 54


def _page(report: Report) -> str:
    meta = report.meta
    title = html.escape(str(meta.get("title", "lightship report")))
    head, *rows = [[html.escape(cell) for cell in row] for row in _cells(report)]
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    heading = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    about = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in _circumstances(meta))
    methods = "".join(
        f"<li><b>{html.escape(', '.join(names))}</b>: {html.escape(method)}</li>"
        for method, names in _methods(report.metrics).items()
    )
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv=Content-Security-Policy content="{POLICY}">'
        f'<meta name=viewport content="width=device-width"><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>'
        f"<p class=verdict>{html.escape(str(meta.get('verdict', '')))}</p>{_charts(report)}"
        f"<h2>Measured</h2><div class=wide><table><thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table></div>"
        f"<h2>Circumstances</h2><dl>{about}</dl><h2>Methods</h2><ul class=method>{methods}</ul>"
        f"<details><summary>All details</summary><pre>{html.escape(json.dumps(meta, indent=1, sort_keys=True))}</pre>"
        "</details></html>\n"
    )


def _kind(metric: Metric) -> str:
    if metric.unit in ("bytes", "MB"):
        return "Size" if metric.name.startswith("size") else "Memory"
    return "Speed" if metric.unit in ("tokens/s", "sequences/s", "s", "ms", "requests/s") else "Quality"


def _drawable(metric: Metric) -> bool:
    """A bar needs something to be compared with, an original above 0 or a limit, and no figure below 0."""
    ends = [value for value in (metric.baseline, metric.value, metric.limit) if value is not None]
    compared = bool(metric.baseline) or bool(metric.limit)
    return compared and _finite(metric) and min(ends) >= 0


def _charts(report: Report) -> str:
    parts = []
    for kind in ("Size", "Speed", "Memory", "Quality"):
        drawn = [metric for metric in report.short().metrics if _kind(metric) == kind and _drawable(metric)]
        if drawn:
            bars = "".join(_bars(metric, ROW * row) for row, metric in enumerate(drawn))
            parts.append(
                f"<h2>{kind}</h2><svg viewBox='0 0 660 {ROW * len(drawn)}' width=660 role=img "
                f"aria-label='{kind}: original and this'>{bars}</svg>"
            )
    return "".join(parts)


def _bars(metric: Metric, top: int) -> str:
    """Original and this below each other on one scale, and the limit as a dashed line."""
    scale = WIDEST / max(metric.value, metric.baseline or 0.0, metric.limit or 0.0)
    says = f"{metric.name} ({metric.unit})" if metric.unit else metric.name
    parts = [f"<text x=0 y={top + 13}>{html.escape(says)}: original, this; {metric.direction} is better</text>"]
    colour = "failed" if metric.passed is False else "this"
    for offset, value, name in ((18, metric.baseline, "base"), (34, metric.value, colour)):
        if value is None:
            continue
        width, y = value * scale, top + offset
        parts.append(f"<rect class={name} x=0 y={y} width={width:.1f} height=13 rx=2 />")
        parts.append(f"<text x={width + 6:.1f} y={y + 11}>{figure(value)}</text>")
    if metric.limit is not None:
        x = metric.limit * scale
        parts.append(f"<line class=limit x1={x:.1f} x2={x:.1f} y1={top + 16} y2={top + 49}><title>limit "
                     f"{figure(metric.limit)}</title></line>")  # fmt: skip
    return "".join(parts)
