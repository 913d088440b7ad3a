"""Make a language model light, and ship it. Public names are imported when first used; importing this does nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PLACES = {
    "ship": "pipeline",
    "convert": "pipeline",
    "evaluate": "pipeline",
    "check": "pipeline",
    "serve": "serving.server",
    "Bundle": "bundle",
    "Checkpoint": "checkpoint",
    "Engine": "engine",
    "EngineSettings": "engine",
    "GenerationParams": "engine",
    "LightshipError": "errors",
    "Metric": "report",
    "Precision": "recipe",
    "Recipe": "recipe",
    "Report": "report",
}
__all__ = [  # noqa: RUF022  (verbs first)
    "ship", "convert", "evaluate", "check", "serve", "Bundle", "Checkpoint", "Engine", "EngineSettings",
    "GenerationParams", "LightshipError", "Metric", "Precision", "Recipe", "Report",
]  # fmt: skip

if TYPE_CHECKING:
    from lightship.bundle import Bundle
    from lightship.checkpoint import Checkpoint
    from lightship.engine import Engine, EngineSettings, GenerationParams
    from lightship.errors import LightshipError
    from lightship.pipeline import check, convert, evaluate, ship
    from lightship.recipe import Precision, Recipe
    from lightship.report import Metric, Report
    from lightship.serving.server import serve


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'lightship' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lightship.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
