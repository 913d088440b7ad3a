"""No test reaches the network, and no library reports home."""

import os
import tempfile

os.environ.update(
    XDG_CONFIG_HOME=tempfile.mkdtemp(),  # whoever runs the tests may have keys, which would lock every server here
    CI="true",  # keeps `import openvino` from reporting home where a test imports it before lightship does
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)

import ipaddress
import socket
from pathlib import Path

import pytest

from lightship.checkpoint import Checkpoint
from tests.tiny import tiny_llama


def is_local(address) -> bool:
    """Whether a socket address stays on this machine: a Unix path, localhost, or a loopback number; no other name."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0]).partition("%")[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_number(host) -> bool:
    try:
        ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host)
    except ValueError:
        return False
    return True


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A connection, a datagram or a name look-up that would leave this machine fails the test at once.

    It sees Python's sockets; for compiled libraries and child processes see
    `test_no_socket_leaves_the_machine_while_shipping`.
    """

    def guard(method):
        real = getattr(socket.socket, method)

        def guarded(self, *arguments):
            address = arguments[-1]  # sendto may carry flags before it
            if not is_local(address):
                raise AssertionError(f"a test tried to reach {address}")
            return real(self, *arguments)

        monkeypatch.setattr(socket.socket, method, guarded)

    for method in ("connect", "connect_ex", "sendto"):
        guard(method)
    look_up = socket.getaddrinfo

    def guarded_look_up(host, *arguments, **options):
        if host not in (None, "", b"", "localhost", b"localhost") and not is_number(host):
            raise AssertionError(f"a test tried to look up {host!r}")
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)


@pytest.fixture(scope="session", autouse=True)
def originals_measured_once():
    """What PyTorch needs for a checkpoint is measured really, in a process of its own, and once a session for each:
    ten seconds on a slow machine, most of them imports."""
    from lightship.evaluation import memory

    measured = {}

    def probe(target, folder, **given):
        if target != "pytorch":
            return real(target, folder, **given)
        key = (Checkpoint(folder).digest(), *sorted(given.items()))
        if key not in measured:
            measured[key] = real(target, folder, **given)
        return list(measured[key])

    real = memory.probe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "probe", probe)
        yield


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


@pytest.fixture(scope="session")
def both_path(llama, tmp_path_factory) -> Path:
    """The same for OpenVINO and ONNX Runtime in one bundle."""
    from lightship.pipeline import ship
    from lightship.recipe import Precision, Recipe

    out = tmp_path_factory.mktemp("both") / "tiny"
    ship(Recipe(source=str(llama.folder), target=("openvino", "onnx"), precision=Precision(name="fp32")), out)
    return out
