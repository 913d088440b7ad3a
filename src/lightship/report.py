"""What was measured. Every metric carries value, unit, n, standard error, direction, baseline and method."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lightship.errors import BundleError


@dataclass(frozen=True)
class Metric:
    """One figure. `baseline` is the same figure of the original, None where it has none."""

    name: str
    value: float
    unit: str
    n: int
    stderr: float | None
    direction: Literal["lower", "higher"]
    baseline: float | None
    method: str

    def ratio(self) -> float | None:
        """value / baseline."""
        return self.value / self.baseline if self.baseline else None


@dataclass(frozen=True)
class Report:
    """Metrics and what they were measured on. `meta` holds source, precision, machine, versions, text, verdict."""

    metrics: tuple[Metric, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str) -> Metric | None:
        """The metric called `name`."""
        return next((metric for metric in self.metrics if metric.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in `report.json`."""
        return {"version": 1, "meta": self.meta, "metrics": [asdict(metric) for metric in self.metrics]}

    def to_json(self) -> str:
        """Canonical JSON; infinities are refused."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Report:
        """The inverse of `to_json`. Raises `BundleError` for anything else."""
        try:
            data = json.loads(text)
            return Report(tuple(Metric(**entry) for entry in data["metrics"]), data["meta"])
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"this is not a report: {error}") from error

    def to_markdown(self) -> str:
        """Verdict and the before/after table."""
        rows = [["measure", "original", "this", "ratio", "± s.e.", "n"]]
        for metric in self.metrics:
            ratio = metric.ratio()
            rows.append(
                [
                    f"{metric.name} ({metric.unit})",
                    figure(metric.baseline),
                    figure(metric.value),
                    f"{ratio:.2f}×" if ratio is not None and metric.baseline else "",
                    figure(metric.stderr),
                    str(metric.n),
                ]
            )
        return f"**{self.meta.get('verdict', '')}**\n\n{table(rows)}"

    def to_html(self) -> str:
        """One self-contained page: no script, no link."""
        return _page(self)


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
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


STYLE = """
:root{color-scheme:light dark;--ink:#1c2330;--dim:#667;--bar:#2f6fde;--base:#9aa4b5;--page:#fff;--line:#dde}
@media(prefers-color-scheme:dark){
:root{--ink:#e8ecf4;--dim:#9ab;--bar:#6ea1ff;--base:#5a6575;--page:#12161d;--line:#2a3240}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:62rem;
margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}td,th{padding:.3rem .6rem;text-align:right;
border-bottom:1px solid var(--line)}td:first-child,th:first-child{text-align:left}.verdict{font-size:1.2rem}
.method,pre{color:var(--dim);font-size:.85rem}svg text{fill:var(--ink);font:13px system-ui}pre{overflow:auto}
"""


def _page(report: Report) -> str:
    meta = report.meta
    title = html.escape(str(meta.get("title", "lightship report")))
    rows = "".join(
        f"<tr><td title='{html.escape(metric.method)}'>{html.escape(metric.name)} <span class=method>"
        f"{html.escape(metric.unit)}</span></td><td>{figure(metric.baseline)}</td><td>{figure(metric.value)}</td>"
        f"<td>{figure(metric.ratio())}</td><td>{figure(metric.stderr)}</td><td>{metric.n}</td></tr>"
        for metric in report.metrics
    )
    methods = "".join(f"<li><b>{html.escape(m.name)}</b>: {html.escape(m.method)}</li>" for m in report.metrics)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"
        f"<p class=verdict>{html.escape(str(meta.get('verdict', '')))}</p>{_bars(report)}"
        "<h2>Measured</h2><table><tr><th>measure<th>original<th>this<th>ratio<th>± s.e.<th>n</tr>"
        f"{rows}</table><h2>Methods</h2><ul class=method>{methods}</ul><h2>Circumstances</h2>"
        f"<pre>{html.escape(json.dumps(meta, indent=1, sort_keys=True))}</pre></html>"
    )


def _bars(report: Report) -> str:
    """Original and candidate as bars, for every metric of size, speed or memory that has a baseline."""
    drawn = [m for m in report.metrics if m.baseline and m.unit in ("bytes", "tokens/s", "s", "MB")]
    if not drawn:
        return ""
    parts = []
    for row, metric in enumerate(drawn):
        top, widest = row * 54, max(metric.value, metric.baseline or 0.0)
        for offset, value, colour in ((18, metric.baseline or 0.0, "--base"), (34, metric.value, "--bar")):
            width = 520 * value / widest
            parts.append(
                f"<rect x=0 y={top + offset} width={width:.1f} height=13 rx=2 style='fill:var({colour})'/>"
                f"<text x={width + 6:.1f} y={top + offset + 11}>{figure(value)}</text>"
            )
        parts.append(
            f"<text x=0 y={top + 13}>{html.escape(metric.name)} ({html.escape(metric.unit)}): original, this</text>"
        )
    size = f"viewBox='0 0 660 {54 * len(drawn)}' width=660"
    return f"<svg {size} role=img aria-label='original and this'>{''.join(parts)}</svg>"
