"""Pickled weights (.bin, .pt, .pth, .ckpt): refused, since opening a pickle can run any code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from lightship.errors import UnsafeSource


def read(source: str, folder: Path, log: Callable[[str], None]) -> NoReturn:
    """Refuse, with the way out. Always raises `UnsafeSource`."""
    raise UnsafeSource(
        f"{source} holds pickled weights; opening a pickle can run any code, so lightship does not",
        hint="take the safetensors release of this model, or convert it once in a throw-away machine: "
        "torch.load(…, weights_only=True) and safetensors.torch.save_file",
    )


def peek(path: Path) -> NoReturn:
    """Refuse, as `read` does."""
    read(str(path), path.parent, lambda line: None)
