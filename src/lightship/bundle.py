"""The sealed folder that is shipped. `manifest.json` is written last: it lists every file with size and SHA-256.

Format and rules: docs/format.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from lightship.errors import BundleError, IncompleteBundle, TamperedBundle, UnsupportedError, UsageError
from lightship.kind import KINDS, Kind
from lightship.report import Report

FORMAT, VERSION = "lightship-bundle", 1
MANIFEST = "manifest.json"
WRITING = f".{MANIFEST}.writing"
MANIFEST_LIMIT = 16 * 2**20
GOLDEN_LIMIT = 256 * 2**20  # unpacked: a compressed array may not fill the memory
HASH_THREADS = 4  # hashing releases the GIL
REBUILD = "ship the model again, or fetch the bundle again from where it was approved"


@dataclass(frozen=True)
class Bundle:
    """A bundle: `Bundle.open` verifies one that lies there, `pack` seals a new one.

    `digest` is the SHA-256 of the manifest's bytes; since these list every file's SHA-256, it covers them all.
    """

    folder: Path
    manifest: dict[str, Any]
    digest: str

    @staticmethod
    def open(path: Path | str) -> Bundle:
        """Verify everything, then return the bundle. Raises `BundleError` (see there) or `UnsupportedError`."""
        folder = Path(path)
        raw = _manifest_bytes(folder)
        manifest = _parse(raw)
        _verify(folder, manifest["files"])
        return Bundle(folder, manifest, hashlib.sha256(raw).hexdigest())

    @staticmethod
    def stated_digest(path: Path | str) -> str:
        """The digest of the manifest at `path`, nothing verified: only to prepare for it."""
        return hashlib.sha256(_manifest_bytes(Path(path))).hexdigest()

    @staticmethod
    def stated_targets(path: Path | str) -> list[str]:
        """The targets as the manifest at `path` states them, nothing verified: only to prepare for it."""
        return list(_parse(_manifest_bytes(Path(path)))["targets"])

    @staticmethod
    def stated_kind(path: Path | str) -> Kind:
        """What the model is for as the manifest at `path` states it, nothing verified: only to prepare for it."""
        return _kind(_parse(_manifest_bytes(Path(path))))

    @property
    def name(self) -> str:
        """The model's name in the API."""
        return str(self.manifest["name"])

    @property
    def targets(self) -> list[str]:
        """Runtime folders, the preferred one first; never empty."""
        return list(self.manifest["targets"])

    def target_folder(self, name: str) -> Path:
        """The runtime folder `name`."""
        if name not in self.targets:
            raise BundleError(f"{self.folder} has no target {name!r}; it has {', '.join(self.targets)}")
        return self.folder / "targets" / name

    @property
    def kind(self) -> Kind:
        """What the model is for. Bundles older than encoders do not say: they hold decoders."""
        return _kind(self.manifest)

    @property
    def report(self) -> Report:
        """What was measured when the bundle was made."""
        return Report.from_json(self._read("report.json").decode("utf-8", "replace"))

    def measured(self, target: str) -> Report:
        """The report with the figures of `target` only, under their plain names."""
        return self.report.of_target(target, self.targets)

    @property
    def size_bytes(self) -> int:
        """All listed files together."""
        return sum(entry["size"] for entry in self.manifest["files"].values())

    def golden(self) -> tuple[list[list[int]], dict[str, npt.NDArray[Any]]]:
        """Token rows, and `ids` int32 and `logprobs` float32, (positions, k): the original's k likeliest next tokens.

        Positions are those of the rows, one row after the other. Nothing in the files can run code (no pickle).
        """
        return _golden(self._read("golden/tokens.json"), self.folder / "golden" / "logprobs.npz")

    def golden_sources(self) -> list[list[int]]:
        """Of an encoder-decoder: the token ids that each row of `golden` is written for."""
        return _golden_sources(self._read("golden/tokens.json"))

    def golden_outputs(self) -> tuple[list[tuple[list[int], list[int]]], list[npt.NDArray[np.float32]]]:
        """Of an encoder: token ids and types of each row, and what it means to the original (see docs/format.md)."""
        return _golden_outputs(self._read("golden/tokens.json"), self.folder / "golden" / "outputs.npz")

    def _read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise IncompleteBundle(f"{self.folder}: cannot read {name}: {error.strerror}", hint=REBUILD) from error


def verify(path: Path | str) -> None:
    """Raise unless the bundle at `path` is complete and unchanged since it was sealed. Says nothing about by whom."""
    Bundle.open(path)


def pack(folder: Path, manifest: dict[str, Any]) -> Bundle:
    """Seal `folder`: hash its files and list them in `manifest.json`, written last and in one rename.

    `manifest` needs `name` and `targets`; `format`, `version` and `files` are set here. Raises `BundleError`, and
    writes nothing, when the folder holds a link, an odd name or anything else that `Bundle.open` would refuse.
    """
    (folder / WRITING).unlink(missing_ok=True)  # of a run that was interrupted
    names = sorted(_walk(folder))
    complete = {**manifest, "format": FORMAT, "version": VERSION, "files": _describe_all(folder, names)}
    try:
        raw = _canonical(complete)
    except (ValueError, TypeError) as error:
        raise BundleError(f"the manifest cannot be written as JSON: {error}") from error
    if len(raw) > MANIFEST_LIMIT:
        raise BundleError(f"the manifest has {len(raw)} bytes; at most {MANIFEST_LIMIT} are allowed")
    sealed = Bundle(folder, _parse(raw), hashlib.sha256(raw).hexdigest())
    _write_atomically(folder, raw)
    return sealed


def _write_atomically(folder: Path, raw: bytes) -> None:
    """A crash leaves either no manifest or the whole one."""
    temporary = folder / WRITING
    try:
        with temporary.open("xb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself must reach the disk; Windows cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ── The manifest ────────────────────────────────────────────────────────────


def _canonical(manifest: dict[str, Any]) -> bytes:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def _manifest_bytes(folder: Path) -> bytes:
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is not a folder",
            hint="give the path that `lightship ship` printed; a server's address begins with http://",
        )
    path = folder / MANIFEST
    if path.is_symlink():
        raise TamperedBundle(f"{path} is a symbolic link", hint=REBUILD)
    if not path.is_file():
        if (folder / "config.json").is_file():
            raise IncompleteBundle(f"{folder} is a model, not a bundle", hint=f"`lightship ship {folder}` makes one")
        raise IncompleteBundle(f"{folder} has no {MANIFEST}: it is not a bundle, or was never finished", hint=REBUILD)
    try:
        with path.open("rb") as file:
            raw = file.read(MANIFEST_LIMIT + 1)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    if len(raw) > MANIFEST_LIMIT:
        _refuse(f"{path} is larger than {MANIFEST_LIMIT} bytes")
    return raw


def _parse(raw: bytes) -> dict[str, Any]:
    """The manifest in `raw`, every field this version relies on checked."""
    try:
        manifest = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise TamperedBundle(f"{MANIFEST} is not valid JSON: {error}", hint=REBUILD) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        _refuse(f"{MANIFEST} does not say format {FORMAT!r}")
    version = manifest.get("version")
    if type(version) is not int or version < 1:  # a bool is an int
        _refuse(f"{MANIFEST} has version {version!r}, expected a positive integer")
    if version > VERSION:
        raise UnsupportedError(f"bundle version {version}; this lightship reads up to {VERSION}", "upgrade lightship")
    _check_fields(manifest)
    try:
        same = _canonical(manifest) == raw
    except (ValueError, RecursionError) as error:  # a lone surrogate, an infinity
        raise TamperedBundle(f"{MANIFEST} holds a value it may not hold: {error}", hint=REBUILD) from error
    if not same:  # a key given twice, another encoding: two readers could read two things
        _refuse(f"{MANIFEST} is not in canonical form")
    return manifest


def _check_fields(manifest: dict[str, Any]) -> None:
    name, files, targets = manifest.get("name"), manifest.get("files"), manifest.get("targets")
    if not (isinstance(name, str) and name and isinstance(files, dict) and isinstance(targets, list) and targets):
        _refuse(f"{MANIFEST} lacks name, targets or files")
    for path, entry in files.items():
        _check_path(path)
        _check_entry(path, entry)
    for target in targets:
        if not isinstance(target, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", target):
            _refuse(f"{MANIFEST} lists a target outside the bundle: {target!r}")
        if not any(path.startswith(f"targets/{target}/") for path in files):
            raise IncompleteBundle(f"{MANIFEST} lists no file below targets/{target}", hint=REBUILD)


def _kind(manifest: dict[str, Any]) -> Kind:
    """The kind of model that a manifest states. Raises `TamperedBundle` for one that is not known."""
    kind = manifest.get("kind", "decoder")
    if kind not in KINDS:
        _refuse(f"{MANIFEST} has the kind {str(kind)[:60]!r}, expected one of {', '.join(KINDS)}")
    found: Kind = kind
    return found


def _check_entry(path: str, entry: Any) -> None:
    described = isinstance(entry, dict) and set(entry) == {"sha256", "size"}
    if not described or type(entry["size"]) is not int or entry["size"] < 0:
        _refuse(f"{MANIFEST} describes {path!r} wrongly")
    if not isinstance(entry["sha256"], str) or not re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]):
        _refuse(f"{MANIFEST} describes {path!r} wrongly")


def _check_path(name: str) -> None:
    """Only normalised relative POSIX paths below the bundle, in printable characters."""
    parts = name.split("/")
    normal = "\\" not in name and str(PurePosixPath(name)) == name
    if not name or not normal or name.startswith("/") or ".." in parts or name in (".", MANIFEST):
        _refuse(f"{MANIFEST} lists a path outside the bundle: {name!r}")
    if not name.isprintable() or set(name) & set(':*?"<>|') or any(part.endswith((".", " ")) for part in parts):
        _refuse(f"a bundle cannot hold the name {name!r}: it does not mean one file on every system")


def _refuse(message: str) -> NoReturn:
    raise TamperedBundle(message, hint=REBUILD)


# ── The files ───────────────────────────────────────────────────────────────


def _walk(folder: Path) -> Iterator[str]:
    """Every file below `folder` but the manifest, as a POSIX path. Raises for anything but files and folders."""

    def unreadable(error: OSError) -> NoReturn:  # os.walk would pass over it in silence
        raise BundleError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    for root, folders, files in os.walk(folder, followlinks=False, onerror=unreadable):
        folders.sort()
        for name in [*folders, *sorted(files)]:
            path = Path(root) / name
            relative = path.relative_to(folder).as_posix()
            _check_status(relative, path.lstat(), name in folders)
            if relative != MANIFEST and name not in folders:
                _check_path(relative)
                yield relative


def _check_status(relative: str, status: os.stat_result, is_folder: bool) -> None:
    if stat.S_ISLNK(status.st_mode):
        _refuse(f"{relative} is a symbolic link")
    if is_folder:
        return
    if not stat.S_ISREG(status.st_mode):
        _refuse(f"{relative} is not a regular file")
    if status.st_nlink > 1:
        _refuse(f"{relative} has a second hard link, so it can change from outside")


def _open_plainly(path: str, flags: int) -> int:
    """Open without following a link or waiting for a FIFO that took the file's place since the walk."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _describe(folder: Path, name: str) -> dict[str, Any]:
    """Size and SHA-256, both of the one file that was opened."""
    try:
        with open(folder / name, "rb", opener=_open_plainly) as file:
            status = os.fstat(file.fileno())
            _check_status(name, status, is_folder=False)
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": status.st_size}
    except OSError as error:
        raise BundleError(f"{folder}: cannot read {name}: {error.strerror}") from error


def _describe_all(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    wanted = list(names)
    pool = ThreadPoolExecutor(HASH_THREADS)
    try:
        return dict(zip(wanted, pool.map(lambda name: _describe(folder, name), wanted), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def _verify(folder: Path, files: dict[str, Any]) -> None:
    """Names and sizes first, since they cost nothing; then the bytes."""
    present = set(_walk(folder))
    for name in sorted(set(files) - present):
        raise IncompleteBundle(f"{folder}: {name} is missing", hint=REBUILD)
    for name in sorted(present - set(files)):
        raise TamperedBundle(
            f"{folder}: {name} is not in the manifest", hint="remove it if you put it there; " + REBUILD
        )
    for name, entry in files.items():
        size = (folder / name).lstat().st_size
        if size != entry["size"]:
            _refuse(f"{folder}: {name} has {size} bytes, the manifest states {entry['size']}")
    for name, found in _describe_all(folder, files).items():
        if found != files[name]:
            _refuse(f"{folder}: {name} was changed (its SHA-256 differs)")


# ── Golden values ───────────────────────────────────────────────────────────


def _golden(tokens: bytes, path: Path) -> tuple[list[list[int]], dict[str, npt.NDArray[Any]]]:
    try:
        rows = json.loads(tokens)["rows"]
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > GOLDEN_LIMIT:
            raise ValueError(f"{unpacked} bytes unpacked, at most {GOLDEN_LIMIT} are allowed")
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        _check_golden(rows, arrays)
    except FileNotFoundError as error:
        raise IncompleteBundle("golden/logprobs.npz is missing", hint=REBUILD) from error
    except (ValueError, KeyError, TypeError, OSError, EOFError, MemoryError, RecursionError, zipfile.BadZipFile) as bad:
        raise BundleError(f"golden/ cannot be read: {bad}", hint=REBUILD) from bad
    return rows, arrays


def _golden_sources(tokens: bytes) -> list[list[int]]:
    try:
        stated = json.loads(tokens)
        sources: list[list[int]] = stated["sources"]
        _check_rows(sources)
        if len(sources) != len(stated["rows"]):
            raise ValueError("tokens.json must hold a source for each row")
    except (ValueError, KeyError, TypeError, RecursionError) as bad:
        raise BundleError(f"golden/ cannot be read: {bad}", hint=REBUILD) from bad
    return sources


def _golden_outputs(
    tokens: bytes, path: Path
) -> tuple[list[tuple[list[int], list[int]]], list[npt.NDArray[np.float32]]]:
    try:
        stated = json.loads(tokens)
        rows, types = stated["rows"], stated["types"]
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > GOLDEN_LIMIT:
            raise ValueError(f"{unpacked} bytes unpacked, at most {GOLDEN_LIMIT} are allowed")
        with np.load(path, allow_pickle=False) as archive:
            outputs = [archive[str(number)] for number in range(len(rows))]
        _check_rows(rows)
        _check_rows(types)
        if [len(row) for row in rows] != [len(row) for row in types]:
            raise ValueError("rows and types of tokens.json differ in length")
        if any(output.dtype != np.float32 or not np.isfinite(output).all() for output in outputs):
            raise ValueError("outputs.npz must hold finite float32 arrays")
    except FileNotFoundError as error:
        raise IncompleteBundle("golden/outputs.npz is missing", hint=REBUILD) from error
    except (ValueError, KeyError, TypeError, OSError, EOFError, MemoryError, RecursionError, zipfile.BadZipFile) as bad:
        raise BundleError(f"golden/ cannot be read: {bad}", hint=REBUILD) from bad
    return list(zip(rows, types, strict=True)), outputs


def _check_rows(rows: Any) -> None:
    if not isinstance(rows, list) or not all(isinstance(row, list) and row for row in rows):
        raise ValueError("tokens.json must hold rows of token ids")
    if not all(type(token) is int and token >= 0 for row in rows for token in row):
        raise ValueError("tokens.json must hold token ids, integers from 0")


def _check_golden(rows: Any, arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Raise `ValueError` or `KeyError` unless rows and arrays have the shapes that docs/format.md states."""
    _check_rows(rows)
    ids, logprobs = arrays["ids"], arrays["logprobs"]
    if ids.ndim != 2 or ids.shape != logprobs.shape or len(ids) != sum(map(len, rows)):
        raise ValueError(f"ids {ids.shape} and logprobs {logprobs.shape} do not fit {sum(map(len, rows))} tokens")
    if ids.dtype != np.int32 or logprobs.dtype != np.float32:
        raise ValueError(f"ids are {ids.dtype} and logprobs {logprobs.dtype}, expected int32 and float32")
