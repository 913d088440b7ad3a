"""The only lookup in the project: a step, target, task or source is found by its file name."""

from __future__ import annotations

import ast
import difflib
import importlib
import re
from importlib import metadata
from pathlib import Path
from types import ModuleType

from lightship.errors import MissingExtra, UnknownName

PACKAGE = Path(__file__).parent


def names(folder: str) -> list[str]:
    """What `folder` holds, files of ours first, then entry points `lightship.<folder>`; each sorted."""
    ours = sorted(path.stem for path in (PACKAGE / folder).glob("*.py") if not path.stem.startswith("_"))
    return ours + sorted(point.name for point in metadata.entry_points(group=f"lightship.{folder}"))


def find(folder: str, name: str) -> ModuleType:
    """The module `name` of `folder`. Raises `UnknownName` listing the known ones, or `MissingExtra`."""
    path = PACKAGE / folder / f"{name}.py"
    if re.fullmatch(r"[a-z][a-z0-9_]*", name):
        if path.is_file():
            return _import(f"lightship.{folder}.{name}", path)
        for point in metadata.entry_points(group=f"lightship.{folder}", name=name):
            module: ModuleType = point.load()
            return module
    near = difflib.get_close_matches(name, names(folder), 1)
    raise UnknownName(
        f"no {folder.removesuffix('s')} is called {name!r}; known are {', '.join(names(folder))}",
        hint=f"did you mean {near[0]!r}?" if near else None,
    )


def _import(module: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lightship"):
            raise
        raise MissingExtra(
            f"{path.stem} needs the package {error.name!r}",
            hint=f'pip install "lightship[{_extra(path)}]"',
        ) from error


def _extra(path: Path) -> str:
    """The value of `EXTRA = "…"` in a file that could not be imported."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)):
            continue
        if any(isinstance(target, ast.Name) and target.id == "EXTRA" for target in node.targets):
            return str(node.value.value)
    return "build"
