"""Where engines run: one for each NUMA node or given set of cores, with no more threads than a quota grants."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from lightship.engine import EngineSettings
from lightship.errors import UsageError
from lightship.machine import cpu_quota

SYSTEM = Path("/sys/devices/system")
Workers = int | Literal["auto"]


@dataclass(frozen=True)
class Place:
    """Of one engine: the `cores` it is held to, None for all that the server may use, and how many `threads` compute,
    None for one a core."""

    cores: frozenset[int] | None = None
    threads: int | None = None

    def on(self, settings: EngineSettings) -> EngineSettings:
        """`settings` with these threads, where none are asked for."""
        return settings if settings.threads or not self.threads else replace(settings, threads=self.threads)


def places(
    workers: Workers = 1,
    cores: Sequence[str] = (),
    usable: Sequence[int] | None = None,
    quota: float | None = None,
    system: Path = SYSTEM,
) -> tuple[Place, ...]:
    """A place for each engine. `cores`, one set an engine in the kernel's form (`0-3,8`), go before everything.

    `auto` makes one for each NUMA node that has `usable` cores (default: this process's affinity), and fewer where the
    `quota` (cores; default: the control group's) is filled by fewer. Of a quota the engines get equal parts as threads;
    they stay on whole sets of cores, since every container of a machine that took the first ones would share them.

    Raises `UsageError` for sets that overlap or are not usable, and for more engines than cores.
    """
    here = sorted(os.sched_getaffinity(0) if usable is None else usable)
    granted = cpu_quota() if quota is None else quota
    most = len(here) if granted is None else min(len(here), max(1, int(granted)))
    if cores:
        sets = _given(cores, here)
        if workers not in ("auto", 1, len(sets)):
            raise UsageError(f"--workers {workers} and {len(sets)} sets of cores", hint="leave --workers out")
    elif workers == 1:
        return (Place(threads=most if most < len(here) else None),)
    else:
        sets = _chosen(workers, _nodes(here, system), most)
        if len(sets) == 1 and len(sets[0]) == len(here):  # all there are: nothing to hold it to
            return (Place(threads=most if most < len(here) else None),)
    if sum(map(len, sets)) <= most:  # no quota that binds: a thread for each core
        return tuple(Place(frozenset(each), len(each)) for each in sets)
    return tuple(Place(frozenset(each), max(1, min(len(each), most // len(sets)))) for each in sets)


def beside(engines: Sequence[Place], usable: Sequence[int] | None = None) -> Place:
    """Where the processes run that compute beside the `engines`, for grammars and scores: on the `usable` cores that no
    engine is held to, where there are any, else on those of the last one, so that they slow down one engine at most."""
    held = frozenset[int]().union(*(place.cores or () for place in engines))
    if not held:
        return engines[-1]
    left = frozenset(os.sched_getaffinity(0) if usable is None else usable) - held
    cores = left or engines[-1].cores or held
    return Place(cores, min(len(cores), max(place.threads or len(cores) for place in engines)))


def _given(texts: Sequence[str], usable: Sequence[int]) -> list[list[int]]:
    sets = [parsed(text) for text in texts]
    taken = [core for each in sets for core in each]
    if twice := sorted({core for core in taken if taken.count(core) > 1}):
        raise UsageError(f"core {twice[0]} is given to two engines", hint="--cores once for each engine")
    if strange := sorted(set(taken) - set(usable)):
        raise UsageError(f"core {strange[0]} is not one that this process may use: {listed(usable)}")
    return sets


def _chosen(workers: Workers, nodes: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    count = sum(map(len, nodes))
    if workers == "auto":
        needed, held = 0, 0
        for node in sorted(nodes, key=len, reverse=True):  # until the quota is filled
            needed, held = needed + 1, held + len(node)
            if held >= most:
                break
        return [list(node) for node in sorted(nodes, key=len, reverse=True)[:needed]]
    if workers > most:
        raise UsageError(f"{workers} engines on {most} cores", hint="at most one for each core; see `lightship doctor`")
    # Cores in the order of nodes and of siblings, cut into equal parts: each part lies in as few nodes as can be.
    row = [core for node in nodes for core in node]
    ends = [round(count * number / workers) for number in range(workers + 1)]
    return [row[start:stop] for start, stop in pairwise(ends)]


def _nodes(usable: Sequence[int], system: Path) -> list[list[int]]:
    """The usable cores of each NUMA node that has some, hardware threads of one core side by side."""
    lists = [parsed((node / "cpulist").read_text()) for node in _numbered(system / "node", "node")]
    found = [[core for core in node if core in usable] for node in lists]
    left = sorted(set(usable) - {core for node in found for core in node})  # not Linux, or a system that tells nothing
    return [sorted(node, key=lambda core: (_first_sibling(core, system), core)) for node in [*found, left] if node]


def _numbered(folder: Path, name: str) -> list[Path]:
    found = [path for path in folder.glob(f"{name}[0-9]*") if (path / "cpulist").is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(name)))


def _first_sibling(core: int, system: Path) -> int:
    path = system / "cpu" / f"cpu{core}" / "topology" / "thread_siblings_list"
    return min(parsed(path.read_text())) if path.is_file() else core


def parsed(text: str) -> list[int]:
    """The numbers of a list in the kernel's form, such as `0-3,8`, ascending. Raises `UsageError`."""
    found: set[int] = set()
    for part in text.strip().split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            if not text.strip():
                return []  # a node without cores
            raise UsageError(f"{text!r} is no list of cores", hint="such as 0-3 or 0-3,8-11")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(found)


def listed(cores: Sequence[int] | frozenset[int]) -> str:
    """The same in the kernel's form."""
    parts: list[list[int]] = []
    for core in sorted(cores):
        if parts and core == parts[-1][1] + 1:
            parts[-1][1] = core
        else:
            parts.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
