"""The deterministic `FakeEngine` behind the target interface, so that servers can be tested without a model."""

from __future__ import annotations

import json
from pathlib import Path

from lightship.engine import EngineSettings, FakeEngine


def open(folder: Path, settings: EngineSettings | None = None) -> FakeEngine:
    """A fake engine; `fake.json` in `folder` may hold its fields, such as {"vocabulary": 300, "fail_after": 5}."""
    path = folder / "fake.json"
    return FakeEngine(**(json.loads(path.read_text()) if path.is_file() else {}))
