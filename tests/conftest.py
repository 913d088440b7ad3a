"""No test reaches the network, and no library reports home."""

import os

os.environ.update(NNCF_CI="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_TELEMETRY="1")

import socket
from pathlib import Path

import pytest

from lightship.checkpoint import Checkpoint
from tests.tiny import tiny_llama


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch):
    """Every connection but those to this machine fails the test at once."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family != socket.AF_UNIX and not str(address[0]).startswith(("127.", "::1", "localhost")):
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Checkpoint:
    """A tiny random llama: grouped heads, tied table, context 2 048, weights wide enough to show faults."""
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def bundle_path(llama, tmp_path_factory) -> Path:
    """The tiny llama shipped to fp32, all gates passed."""
    from lightship.pipeline import ship
    from lightship.recipe import Precision, Recipe

    out = tmp_path_factory.mktemp("ship") / "tiny"
    ship(Recipe(source=str(llama.folder), precision=Precision(name="fp32")), out)
    return out
