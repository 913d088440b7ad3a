"""The sealed folder that is shipped. `manifest.json` is written last: it lists every file with size and SHA-256.

Format and rules: docs/format.md.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.errors import BundleError, IncompleteBundle, TamperedBundle, UnsupportedError
from lightship.report import Report

FORMAT, VERSION = "lightship-bundle", 1
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 16 * 2**20
REBUILD = "ship the model again, or fetch the bundle again from where it was approved"


@dataclass(frozen=True)
class Bundle:
    """A verified bundle; make one with `Bundle.open` or `pack`."""

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

    @property
    def name(self) -> str:
        """The model's name in the API."""
        return str(self.manifest["name"])

    @property
    def targets(self) -> list[str]:
        """Runtime folders, the preferred one first."""
        return list(self.manifest["targets"])

    def target_folder(self, name: str) -> Path:
        """The runtime folder `name`."""
        if name not in self.targets:
            raise BundleError(f"{self.folder} has no target {name!r}; it has {', '.join(self.targets)}")
        return self.folder / "targets" / name

    @property
    def report(self) -> Report:
        """What was measured when the bundle was made."""
        return Report.from_json((self.folder / "report.json").read_text(encoding="utf-8"))

    @property
    def size_bytes(self) -> int:
        """All listed files together."""
        return sum(entry["size"] for entry in self.manifest["files"].values())

    def golden(self) -> tuple[list[list[int]], dict[str, npt.NDArray[Any]]]:
        """The token rows and the original's top-k log-probabilities for each of their positions."""
        rows = json.loads((self.folder / "golden" / "tokens.json").read_text())["rows"]
        with np.load(self.folder / "golden" / "logprobs.npz", allow_pickle=False) as arrays:
            return rows, dict(arrays)


def pack(folder: Path, manifest: dict[str, Any]) -> Bundle:
    """Seal `folder`: list its files in `manifest.json`, written last and in one rename."""
    files = {name: _describe(folder / name) for name in _walk(folder)}
    complete = {**manifest, "format": FORMAT, "version": VERSION, "files": files}
    raw = (json.dumps(complete, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n").encode()
    temporary = folder / f".{MANIFEST}.writing"
    with temporary.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)
    return Bundle.open(folder)


def _manifest_bytes(folder: Path) -> bytes:
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a folder", hint="give the path that `lightship ship` printed")
    path = folder / MANIFEST
    if path.is_symlink():
        raise TamperedBundle(f"{path} is a symbolic link", hint=REBUILD)
    if not path.is_file():
        raise IncompleteBundle(f"{folder} has no {MANIFEST}: it is not a bundle, or was never finished", hint=REBUILD)
    if path.stat().st_size > MANIFEST_LIMIT:
        raise TamperedBundle(f"{path} is larger than {MANIFEST_LIMIT} bytes", hint=REBUILD)
    return path.read_bytes()


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise TamperedBundle(f"{MANIFEST} is not valid JSON: {error}", hint=REBUILD) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise TamperedBundle(f"{MANIFEST} does not say format {FORMAT!r}", hint=REBUILD)
    version = manifest.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise UnsupportedError(
            f"bundle version {version!r}; this lightship reads up to {VERSION}", hint="upgrade lightship"
        )
    files = manifest.get("files")
    targets = manifest.get("targets")
    if not isinstance(files, dict) or not isinstance(targets, list) or not isinstance(manifest.get("name"), str):
        raise TamperedBundle(f"{MANIFEST} lacks name, targets or files", hint=REBUILD)
    for name, entry in files.items():
        _check_name(name)
        if not isinstance(entry, dict) or set(entry) != {"sha256", "size"}:
            raise TamperedBundle(f"{MANIFEST} describes {name!r} wrongly", hint=REBUILD)
    for target in targets:
        _check_name(target)
    return manifest


def _check_name(name: Any) -> None:
    """Only normalised relative POSIX paths below the bundle."""
    plain = (
        isinstance(name, str) and name and "\\" not in name and "\0" not in name and str(PurePosixPath(name)) == name
    )
    if not plain or name.startswith("/") or ".." in name.split("/") or name in (".", MANIFEST):
        raise TamperedBundle(f"{MANIFEST} lists a path outside the bundle: {name!r}", hint=REBUILD)


def _walk(folder: Path) -> Iterator[str]:
    """Every file below `folder` but the manifest, as a POSIX path. Raises for anything but files and folders."""
    for root, folders, files in os.walk(folder, followlinks=False):
        for name in sorted([*folders, *files]):
            path = Path(root) / name
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink():
                raise TamperedBundle(f"{relative} is a symbolic link", hint=REBUILD)
            if name in folders:
                continue
            if not path.is_file():
                raise TamperedBundle(f"{relative} is not a regular file", hint=REBUILD)
            if path.stat().st_nlink > 1:
                raise TamperedBundle(f"{relative} has a second hard link, so it can change from outside", hint=REBUILD)
            if relative != MANIFEST:
                yield relative


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}


def _verify(folder: Path, files: dict[str, Any]) -> None:
    present = set(_walk(folder))
    for name in sorted(set(files) - present):
        raise IncompleteBundle(f"{folder}: {name} is missing", hint=REBUILD)
    for name in sorted(present - set(files)):
        raise TamperedBundle(
            f"{folder}: {name} is not in the manifest", hint="remove it if you put it there; " + REBUILD
        )
    for name, entry in files.items():
        if (folder / name).stat().st_size != entry["size"]:
            raise TamperedBundle(f"{folder}: {name} has not the size the manifest states", hint=REBUILD)
    with ThreadPoolExecutor(4) as pool:  # hashing releases the GIL
        for name, found in zip(files, pool.map(lambda entry: _describe(folder / entry), files), strict=True):
            if found["sha256"] != files[name]["sha256"]:
                raise TamperedBundle(f"{folder}: {name} was changed (its SHA-256 differs)", hint=REBUILD)
