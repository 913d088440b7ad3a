"""Pages of docs/ with one section a benchmark, replaced by the run that measures it."""

from __future__ import annotations

import platform
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from lightship.machine import machine, versions

DOCS = Path(__file__).parent.parent / "docs"
FIGURES, GATE = DOCS / "benchmarks.md", DOCS / "gate.md"


def put(name: str, text: str, path: Path = FIGURES) -> None:
    """Print `text` and put it into the page `path` as the section of `python -m benchmarks.<name>`."""
    print(text)
    page = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {section(name, path)} -->", f"<!-- /{name} -->"
    found = f"{begin}\n{text.strip()}\n\n{circumstances(name)}\n{end}"
    path.write_text(re.sub(f"{begin}.*?{end}", lambda _: found, page, flags=re.DOTALL), encoding="utf-8")


def section(name: str, path: Path = FIGURES) -> str:
    """`name`, once it is sure that `put` will find its section: asked before anything is measured."""
    if f"<!-- {name} -->" not in path.read_text(encoding="utf-8"):
        raise SystemExit(f"{path} has no section <!-- {name} -->")
    return name


def circumstances(name: str) -> str:
    """The command as it was given, day, machine and versions, as one paragraph."""
    here = machine()
    command = shlex.join(["python", "-m", f"benchmarks.{name.split()[0]}", *sys.argv[1:]])
    known = ", ".join(f"{package} {version}" for package, version in sorted(versions().items()))
    cores = f"{here['cores']} core{'s' * (here['cores'] != 1)}"
    return (
        f"`{command}`, {datetime.now(UTC):%Y-%m-%d}; {here['cpu']}, {cores} "
        f"({', '.join(here['features'])}), Python {platform.python_version()}; {known}."
    )


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """`median (lowest – highest)`."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} – {max(values):{form}})"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first row the heading."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)
