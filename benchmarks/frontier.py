"""The picture of mixed precision, `docs/frontier.svg`, drawn from the tables that `benchmarks.quantise` measured."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from benchmarks.page import DOCS

PICTURE = DOCS / "frontier.svg"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 64, 18, 16, 52
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#333}.grid{stroke:#8884;stroke-width:1}"
    "polyline{fill:none;stroke-width:2}.fit{stroke:#0a7;fill:#0a7}.nearest{stroke:#c63;fill:#c63}"
    ".nncf{stroke:#86b;fill:#86b}.int8{stroke:#47c;fill:#47c}polyline.fit,polyline.nearest{fill:none}"
    "@media(prefers-color-scheme:dark){text{fill:#ccc}}"
)
# Class → what the legend calls it, and the beginning of the labels of its rows.
SERIES = {
    "nearest": ("rounded to nearest, NNCF's ratio", "nearest"),
    "nncf": ("NNCF: AWQ, scale estimation, GPTQ", "AWQ"),
    "fit": ("fit, with bits", "fit"),
    "int8": ("int8", "int8"),
}
Point = tuple[float, float]  # MB, mean KLD
Scale = Callable[[float], float]


def points(page: str) -> dict[str, list[Point]]:
    """Of each series the points in the sections `equal` and `frontier` of the page, by size."""
    found: dict[str, list[Point]] = {name: [] for name in SERIES}
    for section in ("equal", "frontier"):
        held = re.search(f"<!-- quantise --only {section} -->(.*?)<!-- /", page, re.DOTALL)
        for line in held.group(1).splitlines() if held else []:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) < 4 or not re.fullmatch(r"[\d.]+", cells[1]):
                continue
            name = next(name for name, (_, begins) in SERIES.items() if cells[0].startswith(begins))
            found[name].append((float(cells[1]), float(cells[3].split()[0])))
    return {name: sorted(set(each)) for name, each in found.items()}


def drawn(series: dict[str, list[Point]]) -> str:
    """SVG: size across, mean KLD upwards on a logarithmic scale."""
    every = [point for each in series.values() for point in each]
    low, high = min(size for size, _ in every) - 3, max(size for size, _ in every) + 3
    floor, ceiling = (10 ** math.floor(math.log10(min(kld for _, kld in every))), 1.0)

    def x(size: float) -> float:
        return LEFT + (size - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(kld: float) -> float:
        share = math.log(kld / floor) / math.log(ceiling / floor)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    parts = [_grid(x, y, low, high, floor, ceiling)]
    for row, (name, (title, _)) in enumerate(SERIES.items()):
        places = [(x(size), y(kld)) for size, kld in series[name]]
        if name != "nncf" and len(places) > 1:
            parts.append(f"<polyline class='{name}' points='{_joined(places)}'/>")
        parts += [f"<circle class='{name}' cx='{left:.1f}' cy='{top:.1f}' r='4'/>" for left, top in places]
        parts.append(f"<circle class='{name}' cx='{WIDTH - 262}' cy='{TOP + 14 + 19 * row}' r='4'/>"
                     f"<text x='{WIDTH - 250}' y='{TOP + 18 + 19 * row}'>{title}</text>")  # fmt: skip
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' height='{HEIGHT}' "
        f"role='img' aria-label='mean KL divergence over size'><style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )


def _grid(x: Scale, y: Scale, low: float, high: float, floor: float, ceiling: float) -> str:
    parts = []
    foot = HEIGHT - BOTTOM
    for size in range(math.ceil(low / 10) * 10, int(high) + 1, 10):
        parts.append(f"<line class='grid' x1='{x(size):.1f}' x2='{x(size):.1f}' y1='{TOP}' y2='{foot}'/>"
                     f"<text x='{x(size):.1f}' y='{foot + 20}' text-anchor='middle'>{size}</text>")  # fmt: skip
    decades = round(math.log10(ceiling / floor))
    for kld in [step * floor * 10**decade for decade in range(decades) for step in (1, 2, 5)] + [ceiling]:
        parts.append(f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y(kld):.1f}' y2='{y(kld):.1f}'/>"
                     f"<text x='{LEFT - 8}' y='{y(kld) + 4:.1f}' text-anchor='end'>{kld:g}</text>")  # fmt: skip
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f"<text x='{(LEFT + WIDTH) / 2:.0f}' y='{HEIGHT - 12}' text-anchor='middle'>MB of graph and weights"
                 f"</text><text x='16' y='{middle:.0f}' text-anchor='middle' transform='rotate(-90 16 {middle:.0f})'>"
                 "mean KLD, nats per token</text>")  # fmt: skip
    return "".join(parts)


def _joined(places: Sequence[Point]) -> str:
    return " ".join(f"{left:.1f},{top:.1f}" for left, top in places)


def main() -> None:
    """Draw it anew."""
    PICTURE.write_text(drawn(points((DOCS / "quantisation.md").read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
