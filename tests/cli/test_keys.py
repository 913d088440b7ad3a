"""`lightship keys` as a user meets it."""

import json
import os

import pytest

from lightship.serving.keys import KeyFile, KeyRing
from tests.cli.test_cli import lightship, refused


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "lightship" / "keys.json"


def test_a_key_from_its_making_to_its_end(home):
    made = lightship("keys", "create", "alice", "--scope", "use", "--scope", "metrics", "--requests-per-minute", 60)
    secret = made.stdout.strip()
    assert made.returncode == 0 and secret.startswith("ls-") and made.stdout.count("\n") == 1
    assert secret not in made.stderr and "this once" in made.stderr and str(home) in made.stderr
    key = KeyRing(KeyFile(home)).find(secret)
    assert key is not None and key.scopes == ("use", "metrics") and key.requests_per_minute == 60

    listed = lightship("keys", "list").stdout
    assert all(word in listed for word in (key.id, "alice", "use,metrics", "60 requests/min"))
    shown = lightship("keys", "list", "--json").stdout
    assert json.loads(shown)[0]["name"] == "alice"
    for text in (listed, shown):
        assert secret not in text and key.sha256 not in text

    assert lightship("keys", "revoke", "alice").returncode == 0
    assert KeyRing(KeyFile(home)).find(secret) is None
    assert lightship("keys", "list").stdout == ""


def test_elsewhere_and_as_json(tmp_path, home):
    other = tmp_path / "other.json"
    made = json.loads(lightship("keys", "create", "bob", "--json", "--expires", 1, "--keys", other).stdout)
    key = KeyRing(KeyFile(other)).find(made["key"])
    assert key is not None and key.id == made["id"] and key.expires == made["expires"] == key.created + 86_400
    assert key.scopes == ("use",) and not home.exists()


def test_wrong_use_is_one_clear_error(home):
    lightship("keys", "create", "alice")
    refused("keys", "create", "alice", says=["a key named 'alice' already", "keys revoke alice"])
    refused("keys", "create", "no spaces", says="cannot name a key")
    refused("keys", "revoke", "bob", says=["'bob'", "keys list"])
    home.chmod(0o644)
    refused("keys", "list", says=["others than its owner", "0644", "chmod 600"])
    home.unlink()
    home.mkdir()
    refused("keys", "create", "bob", says="is not a file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    refused("keys", "create", "alice", says="cannot be written")
    tmp_path.chmod(0o700)


def test_a_place_that_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    refused("keys", "create", "alice", "--keys", tmp_path / "file" / "keys.json", says="key")
