"""Anything → Checkpoint: one source format a file. `read` decides which by looking, never by trusting a name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lightship.checkpoint import Checkpoint, sha256
from lightship.errors import SourceError, UnsupportedError, UsageError
from lightship.find import find
from lightship.preflight import Seen
from lightship.work import Work

GGUF_MAGIC = b"GGUF"
PICKLE_MAGIC = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch's zip, or a bare pickle
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Found:
    """A source that was looked at: `kind` is the file of this folder that reads it, `path` where it lies, `name` a hub
    id or the last part of the path; an adapter, and nothing else, has a `base`."""

    kind: str
    path: Path
    name: str
    revision: str | None = None
    base: Found | None = None

    @cached_property
    def origin(self) -> dict[str, Any]:
        """What lineage says of it: name, revision, and SHA-256 of its file or over the files of its folder."""
        digest = Checkpoint(self.path).digest() if self.path.is_dir() else sha256(self.path)
        return {"source": self.name, "revision": self.revision, "digest": digest}

    @property
    def depends(self) -> dict[str, Any] | None:
        """All that decides what `read` writes; None where the source is used as it lies."""
        if self.kind == "huggingface":
            return None
        return self.origin if self.base is None else {**self.origin, "base": self.base.origin}

    def read(self, folder: Path, log: Callable[[str], None] = lambda line: None) -> Checkpoint:
        """The checkpoint; new files go into `folder`. Raises `SourceError`, or `UnsafeSource` for pickled weights."""
        merging = {} if self.base is None else {"base": self.base, "origin": self.origin}
        checkpoint: Checkpoint = find("sources", self.kind).read(str(self.path), folder, log, **merging)
        return checkpoint

    def kept(self, work: Work) -> Checkpoint:
        """As `read`, as the stage `read` of `work`: what is converted is found there again."""
        number, depends = work.announce("read"), self.depends
        if depends is None:
            return self.read(work.folder, work.say)

        def make(folder: Path) -> None:
            self.read(folder / "model", work.say)

        return Checkpoint(work.stage("read", depends, make, number=number).folder / "model")


def read(
    source: str,
    folder: Path,
    *,
    revision: str | None = None,
    base: str | None = None,
    token: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Checkpoint:
    """The checkpoint that `source` names, see `look`. New files go into `folder`."""
    return look(source, revision=revision, base=base, token=token, log=log).read(folder, log)


def look(
    source: str,
    *,
    revision: str | None = None,
    base: str | None = None,
    token: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Found:
    """What `source` is: `demo`, a folder (of a model or of an adapter), a file, or a hub id, which is downloaded.

    An existing path wins over the word and over a hub id of the same name. `base` names the model that an adapter
    changes, in the same words; by default the adapter names it. `revision` is of the source on the hub, of the base on
    the hub where the source is an adapter's folder; `token` is for the hub (default: HF_TOKEN). Raises `SourceError`.
    """
    found = _locate(source, revision, token, log)
    if found.kind != "adapter":
        if base is not None:
            raise _no_base(source)
        return found
    named, asked = _base(found, base, revision)  # may refuse it before its base is fetched
    log(f"an adapter; its base is {named}")
    try:
        located = _locate(named, asked, token, log)
    except SourceError as error:
        advice = filter(None, (error.hint, None if base else "or name it with --base"))
        raise SourceError(f"the base of {found.name}: {error.message}", hint="; ".join(advice)) from error
    if located.kind == "adapter":
        raise _no_adapter(named)
    return replace(found, base=located)


def _base(found: Found, base: str | None, revision: str | None) -> tuple[str, str | None]:
    """What names the base of the adapter `found`, and its revision on the hub."""
    settings = find("sources", "adapter").settings(found.path)
    named: str = base or settings.base_model_name_or_path
    local = bool(_look(named)[1])
    if not (base or local or _is_hub_id(named)):
        said = f"names the base {named[:200]!r}, which is not here" if named else "does not name its base"
        raise SourceError(
            f"the adapter {found.name} {said}", hint="give the model that it was trained on: --base PATH|HUB_ID"
        )
    asked = revision if found.revision is None else None
    if named == settings.base_model_name_or_path and not local:
        asked = asked or settings.revision
    return named, asked


def _no_adapter(base: str) -> UnsupportedError:
    return UnsupportedError(f"the base {base} is an adapter itself", hint="merge that one first, then this one")


def _no_base(source: str) -> UsageError:
    return UsageError(f"{source} is a whole model, so it needs no base", hint="leave --base out")


def _locate(source: str, revision: str | None, token: str | None, log: Callable[[str], None]) -> Found:
    """Where `source` lies and what reads it; the base of an adapter is left open."""
    path, kind = _look(source)
    if not kind and _is_hub_id(source):
        log(f"no folder {source} here: taking it as a hub id")
        path = find("sources", "huggingface").download(source, revision, token)
        return Found(_folder_kind(path), path, source, Checkpoint(path).revision or revision or "main")
    if kind == "folder":
        log(f"folder {path} taken, not the hub id" if _is_hub_id(source) else f"reading the folder {path}")
        found = Found(_folder_kind(path), path, path.resolve().name)
    elif kind == "file":
        found = Found(_kind(path), path, path.name)
    elif source == "demo":
        found = Found("demo", find("sources", "demo").file(), source)
    else:
        raise SourceError(
            f"{source!r} is neither a folder, nor a file, nor a hub id",
            hint="give a checkpoint folder, a .gguf file, a hub id such as org/name, or the word demo",
        )
    if revision is not None and found.kind != "adapter":
        raise UsageError(f"{source} has no revisions: it is no hub model", hint="leave --revision out")
    return found


def peek(source: str, revision: str | None = None, base: str | None = None) -> Seen:
    """What the headers of `source` tell. Loads, downloads and writes nothing; raises as `read` does for what it would
    refuse at a glance."""
    if not _look(source)[1] and _is_hub_id(source):
        known: Seen = find("sources", "huggingface").cached(source, revision)
        return known
    found = _locate(source, revision, None, lambda line: None)
    if found.kind == "adapter":
        named, asked = _base(found, base, revision)
        place, kind = _look(named)
        if kind == "folder" and _folder_kind(place) == "adapter":
            raise _no_adapter(named)
        merged: Seen = find("sources", "adapter").peek(found.path, peek(named, asked))
        return merged if kind or named == "demo" else replace(merged, file=None)
    if base is not None:
        raise _no_base(source)
    seen: Seen = find("sources", found.kind).peek(found.path)
    return seen


def _look(source: str) -> tuple[Path, str]:
    """The path and whether it is a `folder`, a `file` or nothing here (an empty string)."""
    try:
        path = Path(source).expanduser()
        if not source.strip():
            return path, ""
        return path, "folder" if path.is_dir() else "file" if path.is_file() else ""
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a parent that may not be read
        raise SourceError(f"{source[:200]!r} cannot be looked at: {error}"[:500]) from error


def _is_hub_id(source: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", source) is not None


def _folder_kind(folder: Path) -> str:
    for kind, fits in (("adapter", find("sources", "adapter").alone), ("marian", find("sources", "marian").is_marian)):
        if fits(folder):
            return kind
    return "huggingface"


def _kind(path: Path) -> str:
    """Which file of this folder reads `path`: decided by the first bytes, then by the suffix."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    if magic == GGUF_MAGIC:
        return "gguf"
    if magic[:2] in PICKLE_MAGIC or path.suffix in PICKLE_SUFFIXES:
        return "pickle"
    if path.suffix == ".gguf":
        return "gguf"
    if path.suffix in (".safetensors", ".json"):
        raise SourceError(f"{path} is one file of a checkpoint", hint=f"give its folder: {path.parent}")
    raise SourceError(f"{path} is no model file known here", hint="give a checkpoint folder or a .gguf file")
