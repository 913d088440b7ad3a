"""Anything → Checkpoint: one source format a file. `read` decides which by looking, never by trusting a name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from lightship.checkpoint import Checkpoint
from lightship.errors import SourceError, UsageError
from lightship.find import find
from lightship.preflight import Seen, seen_in

GGUF_MAGIC = b"GGUF"
PICKLE_MAGIC = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch's zip, or a bare pickle
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def read(
    source: str,
    folder: Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Checkpoint:
    """The checkpoint that `source` names: `demo`, a folder, a file, or a hub id. New files go into `folder`.

    An existing path wins over the word and over a hub id of the same name. `revision` and `token` are for the hub
    (default: HF_TOKEN). Raises `SourceError`, or `UnsafeSource` for pickled weights.
    """
    path, kind = _look(source)
    if revision is not None and (kind or source == "demo"):
        raise _no_revisions(source)
    if kind == "folder":
        log(f"folder {path} taken, not the hub id" if _is_hub_id(source) else f"reading the folder {path}")
        return _use("huggingface", str(path), folder, log)
    if kind == "file":
        return _use(_kind(path), str(path), folder, log)
    if source == "demo":
        return _use("demo", source, folder, log)
    if _is_hub_id(source):
        log(f"no folder {source} here: taking it as a hub id")
        downloaded = find("sources", "huggingface").download(source, revision, token)
        return _use("huggingface", str(downloaded), folder, log)
    raise _nothing(source)


def _no_revisions(source: str) -> UsageError:
    return UsageError(f"{source} has no revisions: it is no hub model", hint="leave --revision out")


def _nothing(source: str) -> SourceError:
    return SourceError(
        f"{source!r} is neither a folder, nor a file, nor a hub id",
        hint="give a checkpoint folder, a .gguf file, a hub id such as org/name, or the word demo",
    )


def converted_file(source: str) -> Path | None:
    """The single file that `read` would convert into a new folder; None where the source is used as it lies."""
    path, kind = _look(source)
    if kind == "file":
        return path
    return find("sources", "demo").file() if kind == "" and source == "demo" else None


def peek(source: str, revision: str | None = None) -> Seen:
    """What the headers of `source` tell. Loads, downloads and writes nothing; raises as `read` does for what it would
    refuse at a glance."""
    path, kind = _look(source)
    file = converted_file(source)
    if revision is not None and (kind or file):
        raise _no_revisions(source)
    if file is not None:
        seen: Seen = find("sources", _kind(file)).peek(file)
        return seen
    if kind == "folder":
        return seen_in(_use("huggingface", str(path), path, lambda line: None))
    if _is_hub_id(source):
        known: Seen = find("sources", "huggingface").cached(source, revision)
        return known
    raise _nothing(source)


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


def _use(kind: str, source: str, folder: Path, log: Callable[[str], None]) -> Checkpoint:
    checkpoint: Checkpoint = find("sources", kind).read(source, folder, log)
    return checkpoint


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
