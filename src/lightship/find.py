"""The only lookup in the project: a step, target, task or source is found by its file name."""

from __future__ import annotations

import ast
import difflib
import importlib
import re
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

from lightship.errors import MissingExtra, UnknownName, UsageError

PACKAGE = Path(__file__).parent
NAME = re.compile(r"[a-z][a-z0-9_]*")
CALLED = {"compression": "step"}  # what a folder holds, where its name does not say


def names(folder: str) -> list[str]:
    """What `folder` holds, files of ours first, then entry points `lightship.<folder>`; each sorted, none twice."""
    _check_folder(folder)
    ours = sorted(path.stem for path in (PACKAGE / folder).glob("*.py") if NAME.fullmatch(path.stem))
    theirs = {point.name for point in metadata.entry_points(group=f"lightship.{folder}") if NAME.fullmatch(point.name)}
    return ours + sorted(theirs - set(ours))


def find(folder: str, name: str) -> ModuleType:
    """The module `name` of `folder`: a file of ours, else a third party's entry point `lightship.<folder>`.

    Nothing is imported before its file is known to lie in our package. Raises `UnknownName` with the known names and
    the nearest, or `MissingExtra` with the command that installs what the module needs.
    """
    _check_folder(folder)
    if NAME.fullmatch(name):
        path = PACKAGE / folder / f"{name}.py"
        if path.is_file():
            return _import(f"lightship.{folder}.{name}", path)
        for point in metadata.entry_points(group=f"lightship.{folder}", name=name):
            return _load(point)
    known = names(folder)
    near = difflib.get_close_matches(name, known, 1)
    raise UnknownName(
        f"no {CALLED.get(folder, folder.removesuffix('s'))} is called {name!r}; known are {', '.join(known) or 'none'}",
        hint=f"did you mean {near[0]!r}?" if near else None,
    )


def _check_folder(folder: str) -> None:
    if not NAME.fullmatch(folder):
        raise UnknownName(f"{folder!r} is not the name of a folder of lightship")


def _import(module: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if _is_our_fault(error):
            raise
        raise MissingExtra(f"{path.stem} {_need(error)}", hint=f'pip install "lightship[{_extra(path)}]"') from error


def _load(point: metadata.EntryPoint) -> ModuleType:
    """A third party's module. Its author answers for what it needs, so the hint names the author's package."""
    package = point.dist.name if point.dist else point.module
    try:
        module = point.load()
    except ImportError as error:
        if _is_our_fault(error):
            raise
        raise MissingExtra(f"{point.name} of {package} {_need(error)}", hint=f"install what {package} needs") from error
    if not isinstance(module, ModuleType):
        raise UsageError(f"{point.name} of {package} is a {type(module).__name__}; its entry point must name a module")
    return module


def _is_our_fault(error: ImportError) -> bool:
    """A mistake in our code or a broken Python is no missing package: it must be seen as it is."""
    top = (error.name or "").split(".")[0]
    return top == "lightship" or top in sys.stdlib_module_names


def _need(error: ImportError) -> str:
    """`torch` is not there, or there and of another version (ImportError: cannot import name …)."""
    if isinstance(error, ModuleNotFoundError):
        return f"needs the package {error.name!r}"
    return f"cannot import what it needs: {error}"


def _extra(path: Path) -> str:
    """The value of `EXTRA = "…"` in a file that could not be imported, so its source is parsed; else `build`."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id="EXTRA")], value=ast.Constant(value=str(extra)))
                | ast.AnnAssign(target=ast.Name(id="EXTRA"), value=ast.Constant(value=str(extra)))
            ):
                return extra
    return "build"
