"""A run's work folder: finished stages, each found again by the digest of everything it depends on.

    runs/<name>/NN-<stage>-<digest>/done.json    written last, so its existence means complete

A stage that was interrupted leaves a `.partial` folder, which the next run removes. No stage is known here by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightship.errors import LightshipError
from lightship.machine import versions

DONE = "done.json"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Stage:
    """A finished stage: its files in `folder`, its `result` (plain data), `digest` over all it depends on, and whether
    it was `found` instead of made."""

    name: str
    folder: Path
    digest: str
    result: dict[str, Any]
    found: bool


@dataclass(frozen=True)
class Work:
    """The stages of one run in `folder`; `names` are all that it has, in order, `seconds` what each is predicted to
    take, empty where that is not known."""

    folder: Path
    names: Sequence[str]
    progress: Progress
    seconds: Mapping[str, float] = field(default_factory=dict)

    def say(self, line: str) -> None:
        """Report a line of detail."""
        self.progress(f"      {line}")

    def announce(self, name: str) -> int:
        """Say that stage `name` begins, and which share of the predicted time lies before it; returns its number."""
        before = self.names.index(name)
        whole = sum(self.seconds.values())
        share = f", {sum(self.seconds[each] for each in self.names[:before]) / whole:.0%}" if whole else ""
        self.progress(f"[{before + 1}/{len(self.names)}{share}] {name}")
        return before + 1

    def stage(
        self,
        name: str,
        depends: Mapping[str, Any],
        make: Callable[[Path], dict[str, Any] | None],
        *,
        number: int | None = None,
    ) -> Stage:
        """The stage `name`, made by `make(folder)` unless it was finished before with the same dependencies.

        `depends` (plain data) must hold all that decides the outcome, digests of earlier stages included; the versions
        of the libraries are added. What `make` returns is kept as the stage's result. `number` comes from `announce`,
        where the stage was announced already.
        """
        number = self.announce(name) if number is None else number
        digest, final = self.place(number, name, depends)
        if (final / DONE).is_file():
            self.say("done before")
            return Stage(name, final, digest, _read(final / DONE), True)
        partial = self.folder / f".{final.name}.partial"
        stage = final.name.rpartition("-")[0]  # left over with other dependencies too
        for leftover in (*self.folder.glob(f".{stage}-*.partial"), final):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        result = make(partial) or {}
        _write_last(partial / DONE, {"stage": name, "depends": depends, "result": result})
        os.rename(partial, final)
        return Stage(name, final, digest, result, False)

    def place(self, number: int, name: str, depends: Mapping[str, Any]) -> tuple[str, Path]:
        """The digest of a stage and the folder that it has when it is finished."""
        digest = digest_of({"stage": name, "versions": versions(), **depends})
        return digest, self.folder / f"{number:02}-{name.replace(' ', '-')}-{digest[:12]}"


class NotMade(Exception):
    """A stage is not there, and those after it cannot be told without its files."""


@dataclass(frozen=True)
class Survey(Work):
    """A work folder looked over: its stages are found or not, none is made, nothing is written. `found` fills up.

    A stage that is not there is passed over with the folder it would have; where `needed`, the survey ends (`NotMade`).
    """

    needed: Sequence[str] = ()
    found: list[str] = field(default_factory=list)

    def stage(
        self,
        name: str,
        depends: Mapping[str, Any],
        make: Callable[[Path], dict[str, Any] | None],
        *,
        number: int | None = None,
    ) -> Stage:
        digest, final = self.place(self.announce(name) if number is None else number, name, depends)
        there = (final / DONE).is_file()
        if there:
            self.found.append(name)
        elif name in self.needed:
            raise NotMade(name)
        return Stage(name, final, digest, _read(final / DONE) if there else {}, there)


def digest_of(value: Any) -> str:
    """SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["result"]
    except (ValueError, KeyError, TypeError) as error:
        raise LightshipError(f"{path} is damaged", hint="remove its folder; the stage is then done again") from error
    return result


def _write_last(path: Path, value: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
