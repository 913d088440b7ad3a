"""What several tests of the server share."""

import json
from pathlib import Path

import pytest

from lightship.recipe import Precision, Recipe
from tests.chat_templates import HERMES
from tests.tiny import tiny_llama


@pytest.fixture(scope="session")
def onnx_path(llama, tmp_path_factory) -> Path:
    """The tiny llama shipped for ONNX Runtime, which takes one request at a time."""
    from lightship.pipeline import ship

    out = tmp_path_factory.mktemp("onnx") / "tiny"
    ship(Recipe(source=str(llama.folder), target="onnx", precision=Precision(name="fp32")), out)
    return out


@pytest.fixture(scope="session")
def hermes_path(tmp_path_factory) -> Path:
    """A tiny llama whose tokenizer_config.json carries a template of the hermes family, shipped."""
    from lightship.pipeline import ship

    source = tmp_path_factory.mktemp("hermes")
    tiny_llama(source)
    (source / "chat_template.jinja").unlink()
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": HERMES}))
    out = tmp_path_factory.mktemp("shipped") / "caller"
    ship(Recipe(source=str(source), precision=Precision(name="fp32")), out)
    return out
