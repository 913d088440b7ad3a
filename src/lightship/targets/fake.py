"""The deterministic `FakeEngine` behind the target interface, so that servers can be tested without a model."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightship.engine import EngineSettings, FakeEngine
from lightship.errors import UnsupportedError


def open(folder: Path, settings: EngineSettings | None = None) -> FakeEngine:
    """A fake engine; `fake.json` in `folder` may hold its fields, such as {"vocabulary": 300, "fail_after": 5}, and
    how opening goes: `load`, the seconds that it takes, `refuse`, why it is refused, `die`, that its process is gone.
    `with` holds more of these for settings that are not at their default: {"with": {"threads": {"die": true}}}."""
    path = folder / "fake.json"
    given = json.loads(path.read_text()) if path.is_file() else {}
    for name, more in given.pop("with", {}).items():
        if name in _changed(settings or EngineSettings()):
            given |= more
    time.sleep(given.pop("load", 0))
    if given.pop("die", False):
        os.kill(os.getpid(), signal.SIGSEGV)
    if (why := given.pop("refuse", None)) is not None:
        raise UnsupportedError(why)
    return FakeEngine(**given)


def _changed(settings: EngineSettings) -> dict[str, Any]:
    """The settings that are not at their default."""
    usual = EngineSettings()
    every = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return {name: value for name, value in every.items() if value != getattr(usual, name)}
