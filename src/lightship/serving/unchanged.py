"""Whether bundles still hold what was verified: who starts an engine or a process beside it later reads them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightship.bundle import MANIFEST
from lightship.errors import EngineError

File = tuple[str, int, int, int]  # path, inode, bytes, nanoseconds of the last change


@dataclass(frozen=True)
class Unchanged:
    """The files of the targets in `folders` as they were when their bundles were verified; what is no part of a bundle
    never was, and is not looked at.

    They are told apart by what the file system says of them: a bundle shipped or copied to the same place has other
    files. Not by their bytes, which would make an engine wait for its weights to be read once more; whoever may write
    into a bundle that is served, and forges times, is not kept out.
    """

    folders: tuple[Path, ...]
    files: frozenset[File]

    @staticmethod
    def of(folders: Sequence[Path]) -> Unchanged:
        """As they are now."""
        verified = tuple(folder for folder in folders if (folder.parent.parent / MANIFEST).is_file())
        return Unchanged(verified, _files(verified))

    def check(self) -> None:
        """Raise `EngineError` when they are no longer so."""
        if _files(self.folders) != self.files:
            raise EngineError(f"{self.folders[0]} has changed since it was verified, so nothing is loaded from it",
                              hint="put the bundle back, or reload the new one")  # fmt: skip


def _files(folders: Sequence[Path]) -> frozenset[File]:
    found = [(path, path.stat()) for folder in folders for path in folder.rglob("*") if path.is_file()]
    return frozenset((str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in found)
