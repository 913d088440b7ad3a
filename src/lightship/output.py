"""Where a result appears: checked before the work, made in a hidden folder beside it, moved there in one rename."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lightship.errors import LightshipError, UsageError
from lightship.recipe import Recipe

DISK_FULL = 2**20  # bytes left; less is no room for any file of a run


def check_out(out: Path, recipe: Recipe, force: bool, mark: str) -> None:
    """Raise unless `out` may be written: free, or, with `force`, an earlier result of ours (it holds `mark`)."""
    for given in filter(None, (recipe.source, recipe.base)):
        source = Path(given).expanduser().resolve()
        if source.exists() and out.resolve() in (source, *source.parents):
            raise UsageError(f"{out} holds the source {given}", hint="choose another --out")
    if out.exists() and not force:
        raise UsageError(f"{out} exists already", hint="choose another --out, or --force to replace it")
    if out.exists() and not (out / mark).is_file():
        raise UsageError(f"{out} was not made by lightship (it has no {mark}), so it is not replaced",
                         hint="choose another --out, or remove it yourself")  # fmt: skip


@contextlib.contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` (so that the final rename is atomic), removed whatever happens."""
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        yield work
    except (OSError, RuntimeError) as error:  # compiled libraries raise their own for a full disk
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or shutil.disk_usage(work).free < DISK_FULL:
            raise LightshipError(
                f"the disk below {out.parent} is full", hint="free space or choose another --out"
            ) from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def appear(finished: Path, out: Path) -> None:
    """Move the finished folder to `out`. An old one there is set aside first, and put back if anything interferes."""
    old = finished.parent / "replaced"
    try:
        if out.exists():
            os.rename(out, old)
        os.rename(finished, out)
    except BaseException:
        if old.exists() and not out.exists():
            os.rename(old, out)
        raise
