"""What a measurement says to people: aligned columns, the formulas below them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from lightship.bench.figures import FORMULAS, LATE, PERCENTILES, Distribution, Figures, Quantile
from lightship.bench.sweep import Sweep, explain

ROWS = (("TTFT, s", "ttft", 1.0, ".3f"), ("TPOT, ms", "tpot", 1e3, ".1f"), ("end-to-end, s", "e2e", 1.0, ".3f"),
        ("dispatch delay, ms", "delay", 1e3, ".2f"))  # fmt: skip


WIDTH = 110


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) if place else cell.ljust(width)
                  for place, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )  # fmt: skip


def _quantile(found: Quantile | None, scale: float, form: str) -> str:
    if found is None:
        return "–"
    low, high = ("–" if each is None else f"{each * scale:{form}}" for each in (found.low, found.high))
    return f"{found.value * scale:{form}} [{low}, {high}]"


def times(figures: Figures) -> str:
    """The table of times."""
    rows = [["", "n", "mean", *(f"p{percent}" for percent in PERCENTILES)]]
    for title, name, scale, form in ROWS:
        found: Distribution = getattr(figures, name)
        mean = "–" if found.mean is None else f"{found.mean * scale:{form}}"
        quantiles = [_quantile(each, scale, form) for each in found.quantiles.values()]
        rows.append([title, str(found.n), mean, *quantiles])
    return columns(rows)


def outcomes(figures: Figures) -> str:
    """`96 whole, 3 stopped, 1 refused (1 with a time to retry)`."""
    said = []
    for name, count in sorted(figures.outcomes.items(), key=lambda pair: -pair[1]):
        retry = f" ({figures.retry_after} with a time to retry)" if name == "refused" else ""
        said.append(f"{count} {name}{retry}")
    return ", ".join(said)


def summary(figures: Figures) -> list[tuple[str, str]]:
    """What is no distribution."""
    load = f"{figures.clients} clients, closed loop" if figures.clients else "open loop"
    if figures.rate is not None:
        load += f", {figures.rate:.3g} requests/s came"
    answered = max(figures.answered, 1)
    tokens = f"{figures.output_tokens} out ({figures.output_tokens / answered:.1f} an answer)"
    if figures.input_tokens is not None:
        tokens = f"{figures.input_tokens} in ({figures.input_tokens / answered:.1f} a prompt), {tokens}"
    source = "by the server's usage" if figures.counted == "usage" else "out counted as pieces of text"
    said = [
        ("load", load),
        ("requests", f"{figures.requests} in {figures.seconds:.2f} s: {outcomes(figures)}"),
        ("tokens", f"{tokens}, {source}"),
        ("throughput", f"{figures.tokens_per_second:.1f} tokens/s, {figures.requests_per_second:.3g} answers/s"),
    ]
    if figures.limits:
        missed = ", ".join(f"{name} {count}" for name, count in figures.missed.items())
        said.append(("goodput", f"{figures.good_per_second:.3g} requests/s, {figures.goodput:.1%} of all within "
                                f"{', '.join(figures.limits)} (missed: {missed})"))  # fmt: skip
    return said


def warnings(figures: Figures) -> list[str]:
    """What a reader must know before believing the figures."""
    said = list(figures.notes)
    if figures.late():
        said.append(f"The generator itself was late: its dispatch delay is over {LATE:.0%} of the median TTFT. "
                    "Another machine, or a lower rate, would measure the server.")  # fmt: skip
    if stopped := figures.outcomes.get("stopped", 0):
        said.append(f"{stopped} of {figures.requests} answers were ended by the model before the length asked for: "
                    "they are in TTFT and TPOT, not in end-to-end.")  # fmt: skip
    if failures := figures.missed["failures"]:
        reasons = "; ".join(f"{count}× {reason}" for reason, count in figures.reasons.items())
        said.append(f"{failures} of {figures.requests} gave no answer and have no times: {reasons}")
    return said


def wrapped(text: str) -> str:
    """`text` in lines that a terminal holds, the later ones indented."""
    return textwrap.fill(text, WIDTH, subsequent_indent="  ")


def formulas() -> str:
    """All formulas."""
    return "\n".join(map(wrapped, FORMULAS))


def seeded(seed: int | None) -> str:
    """How to ask the same again; empty where nothing was drawn."""
    return "" if seed is None else f"--seed {seed} asks the same again; a prefix cache may then know the prompts."


def told(figures: Figures, seed: int | None = None) -> str:
    """A whole run."""
    facts = "\n".join(f"{name:12}{text}" for name, text in summary(figures))
    said = "\n".join(wrapped(f"! {warning}") for warning in warnings(figures))
    return "\n\n".join(filter(None, [facts, times(figures), said, formulas(), seeded(seed)]))


def step(rate: float, figures: Figures) -> list[str]:
    """A row of the table of a sweep."""

    def first(name: str, scale: float, form: str) -> str:
        found: Distribution = getattr(figures, name)
        percent = next((each for each in ("p95", "p90", "p50") if found.value(each) is not None), None)
        return "–" if percent is None else f"{(found.value(percent) or 0) * scale:{form}} ({percent})"

    failures = figures.missed["failures"]
    broke = explain(figures).split(" ")[0] if figures.good < figures.requests else "–"
    return [f"{rate:.3g}", str(figures.requests), f"{figures.goodput:.0%}", first("ttft", 1, ".3f"),
            first("tpot", 1e3, ".1f"), f"{figures.tokens_per_second:.1f}", str(failures),
            f"{(figures.delay.value('p50') or 0) * 1e3:.2f}", broke]  # fmt: skip


HEAD = ["requests/s", "n", "goodput", "TTFT, s", "TPOT, ms", "tokens/s", "failures", "delay p50, ms", "most missed"]


def told_sweep(sweep: Sweep, seed: int | None = None) -> str:
    """A whole sweep."""
    rows = [HEAD, *(step(each.rate, each.figures) for each in sorted(sweep.steps, key=lambda each: each.rate))]
    limits = ", ".join(sweep.steps[0].figures.limits) if sweep.steps else ""
    rule = f"A rate holds where {sweep.share:.0%} of all requests are within {limits or 'no limit but an answer'}."
    late = [f"{each.rate:.3g}" for each in sweep.steps if each.figures.late()]
    said = list(dict.fromkeys(note for each in sweep.steps for note in each.figures.notes))
    if late:
        said.append(f"The generator itself was late at {', '.join(late)} requests/s: a large part of what was "
                     "measured there is its own delay.")  # fmt: skip
    warned = "\n".join(wrapped(f"! {each}") for each in said)
    return "\n\n".join(
        filter(None, [columns(rows), wrapped(sweep.said()) + "\n" + rule, warned, formulas(), seeded(seed)])
    )
