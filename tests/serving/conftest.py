"""What several tests of the server share."""

from pathlib import Path

import pytest

from lightship.recipe import Precision, Recipe


@pytest.fixture(scope="session")
def onnx_path(llama, tmp_path_factory) -> Path:
    """The tiny llama shipped for ONNX Runtime, which takes one request at a time."""
    from lightship.pipeline import ship

    out = tmp_path_factory.mktemp("onnx") / "tiny"
    ship(Recipe(source=str(llama.folder), target="onnx", precision=Precision(name="fp32")), out)
    return out
