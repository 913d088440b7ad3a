"""The deterministic `FakeEngine` behind the target interface, so that servers can be tested without a model."""

from __future__ import annotations

import json
import time
from pathlib import Path

from lightship.engine import EngineSettings, FakeEngine


def open(folder: Path, settings: EngineSettings | None = None) -> FakeEngine:
    """A fake engine; `fake.json` in `folder` may hold its fields, such as {"vocabulary": 300, "fail_after": 5}, and
    `load`, the seconds that opening takes."""
    path = folder / "fake.json"
    fields = json.loads(path.read_text()) if path.is_file() else {}
    time.sleep(fields.pop("load", 0))
    return FakeEngine(**fields)
