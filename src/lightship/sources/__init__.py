"""Anything → Checkpoint: one source format a file. `read` decides which by looking, never by trusting a name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from lightship.checkpoint import Checkpoint
from lightship.errors import SourceError
from lightship.find import find

GGUF_MAGIC = b"GGUF"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def read(source: str, folder: Path, *, revision: str | None = None, log: Callable[[str], None]) -> Checkpoint:
    """The checkpoint that `source` names: `demo`, a folder, a file, or a hub id. New files go into `folder`.

    An existing path wins over a hub id of the same name. Raises `SourceError`, or `UnsafeSource` for pickled weights.
    """
    path = Path(source).expanduser()
    if source == "demo" and not path.exists():
        return _use("demo", source, folder, log)
    if path.is_dir():
        log(f"reading the folder {path}")
        return _use("huggingface", str(path), folder, log)
    if path.is_file():
        return _use(_kind(path), str(path), folder, log)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
        log(f"no folder {source} here: taking it as a hub id")
        downloaded = find("sources", "huggingface").download(source, revision)
        return _use("huggingface", str(downloaded), folder, log)
    raise SourceError(
        f"{source!r} is neither a folder, nor a file, nor a hub id",
        hint="give a checkpoint folder, a .gguf file, a hub id such as org/name, or the word demo",
    )


def _use(kind: str, source: str, folder: Path, log: Callable[[str], None]) -> Checkpoint:
    checkpoint: Checkpoint = find("sources", kind).read(source, folder, log)
    return checkpoint


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == GGUF_MAGIC or path.suffix == ".gguf":
        return "gguf"
    if magic[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or path.suffix in PICKLE_SUFFIXES:
        return "pickle"
    raise SourceError(f"{path} is no model file known here", hint="give a checkpoint folder or a .gguf file")
