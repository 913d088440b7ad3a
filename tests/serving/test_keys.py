"""The key file and what a running server makes of it: nothing is stored that opens a door, and doubt keeps it shut."""

import json
import os
import stat
import subprocess
import sys
import time

import pytest

from lightship.errors import UsageError
from lightship.serving.keys import Key, KeyFile, KeyRing, digest_of, usual_path


@pytest.fixture
def file(tmp_path):
    return KeyFile(tmp_path / "config" / "lightship" / "keys.json")


def test_only_the_hash_is_stored_and_only_the_owner_can_read_it(file):
    before = os.umask(0)
    try:
        key, secret = file.create("alice", ["admin", "use"], 5, 1000, days=2)
    finally:
        os.umask(before)
    assert secret.startswith("ls-") and len(secret) == 46
    assert secret not in file.path.read_text() and secret[3:] not in file.path.read_text()
    assert file.read() == (key,) and key.sha256 == digest_of(secret)
    assert (key.scopes, key.requests_per_minute, key.tokens_per_minute) == (("use", "admin"), 5, 1000)
    assert key.expires == key.created + 2 * 86_400
    for path in (file.path, *file.path.parent.glob(".*")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700
    assert sorted(path.name for path in file.path.parent.iterdir()) == [".keys.json.lock", "keys.json"]


def test_names_are_plain_and_unique(file):
    key, _ = file.create("alice")
    for name in ("alice", key.id, "", "a b", "../a", "-a", "a\n", "x" * 65):
        with pytest.raises(UsageError, match="name"):
            file.create(name)
    assert file.revoke(key.id) == key and file.read() == ()
    with pytest.raises(UsageError, match="no key has the id or name"):
        file.revoke("alice")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_file_that_others_can_get_at_is_refused(file, mode):
    file.create("alice")
    file.path.chmod(mode)
    for use in (file.read, lambda: file.create("bob"), lambda: KeyRing(file)):
        with pytest.raises(UsageError, match="others than its owner") as caught:
            use()
    assert "chmod 600" in caught.value.hint


BROKEN = [
    b"",
    b"{",
    b"[]",
    b'{"version": 2, "keys": []}',
    b'{"version": 1, "keys": [{"id": "a"}]}',
    b'{"version": 1, "keys": [], "more": 1}',
    b'{"version": 1, "keys": [{"id":"a","name":"a","sha256":"","scopes":["root"],"created":1}]}',
    b"\xff",
]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_is_refused_and_kept(file, content):
    file.create("alice")
    file.path.write_bytes(content)
    for use in (file.read, lambda: file.create("bob"), lambda: file.revoke("alice")):
        with pytest.raises(UsageError, match="is not a key file"):
            use()
    assert file.path.read_bytes() == content


def test_what_is_no_file_is_refused(file):
    file.path.mkdir(parents=True)
    with pytest.raises(UsageError, match="is not a file"):
        file.read()
    file.path.rmdir()
    os.mkfifo(file.path, 0o600)  # reading one would wait for ever
    with pytest.raises(UsageError, match="is not a file"):
        file.read()


def test_a_write_that_fails_leaves_the_old_file(file, monkeypatch):
    file.create("alice")
    before = file.path.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left"):
        file.create("bob")
    assert file.path.read_bytes() == before
    assert sorted(path.name for path in file.path.parent.iterdir()) == [".keys.json.lock", "keys.json"]


WRITE = """
import pathlib, sys
from lightship.serving.keys import KeyFile
for number in range(20):
    KeyFile(pathlib.Path(sys.argv[1])).create(f"{sys.argv[2]}-{number}")
"""


def test_two_writers_lose_nothing(file):
    writers = [subprocess.Popen([sys.executable, "-c", WRITE, str(file.path), name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert {key.name for key in file.read()} == {f"{name}-{number}" for name in "ab" for number in range(20)}


def test_the_usual_place(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert usual_path() == tmp_path / "lightship" / "keys.json"
    monkeypatch.setenv("XDG_CONFIG_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert usual_path() == tmp_path / ".config" / "lightship" / "keys.json"


# ── A running server ────────────────────────────────────────────────────────


def test_every_key_is_compared_and_only_the_right_one_is_found(file, monkeypatch):
    made = [file.create(name) for name in ("a", "b", "c")]
    ring = KeyRing(file)
    assert ring.locked and all(ring.find(secret) == key for key, secret in made)
    for wrong in ("", "ls-", made[0][1][:-1], made[0][1] + "=", made[0][0].sha256, "é\udcff"):
        assert ring.find(wrong) is None
    seen = []
    from lightship.serving import keys

    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: seen.append(b) or a == b)
    assert ring.find(made[0][1]) == made[0][0]
    assert seen == [key.sha256 for key, _ in made]  # the first one matches: no early exit


def test_an_expired_key_is_none(file, monkeypatch):
    key, secret = file.create("alice", days=1)
    ring = KeyRing(file)
    assert ring.find(secret) == key
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86_401)
    assert ring.find(secret) is None and ring.locked


def test_scopes():
    key = Key("key-1", "a", "", ("metrics",), 0)
    assert key.may("metrics", "admin") and key.may("metrics") and not key.may("use", "admin")


def test_changes_are_noticed_while_running(file):
    ring = KeyRing(file, interval=0)
    assert not ring.locked
    key, secret = file.create("alice")
    assert ring.locked and ring.find(secret) == key
    _, other = file.create("bob")
    assert ring.find(other) and ring.find(secret)
    file.revoke("alice")
    assert ring.find(secret) is None and ring.find(other)
    file.revoke("bob")
    assert ring.find(other) is None and ring.locked  # the last key is gone; the door stays shut


def test_a_change_is_noticed_within_the_interval_and_not_looked_for_before(file):
    _, secret = file.create("alice")
    ring = KeyRing(file, interval=0.2)
    file.revoke("alice")
    assert ring.find(secret)
    time.sleep(0.25)
    assert ring.find(secret) is None


@pytest.mark.parametrize("damage", ["broken", "open to others", "gone", "folder gone", "a folder"])
def test_trouble_with_the_file_keeps_everybody_out_until_it_is_mended(file, damage, caplog):
    key, secret = file.create("alice")
    content = file.path.read_bytes()
    ring = KeyRing(file, interval=0)
    if damage == "broken":
        file.path.write_bytes(b"{")
    elif damage == "open to others":
        file.path.chmod(0o644)
    elif damage == "gone":
        file.path.unlink()
    else:
        file.path.unlink()
        if damage == "a folder":
            file.path.mkdir()
        else:
            file.path.parent.rename(file.path.parent.with_name("elsewhere"))
    for _ in range(3):
        assert ring.find(secret) is None and ring.locked
    assert [record.levelname for record in caplog.records] == ["ERROR"]  # once, not with every request
    if damage == "a folder":
        file.path.rmdir()
    if damage == "folder gone":
        file.path.parent.with_name("elsewhere").rename(file.path.parent)
    file.path.unlink(missing_ok=True)
    file.path.touch(mode=0o600)
    file.path.write_bytes(content)
    assert ring.find(secret) == key


def test_a_file_that_appears_broken_locks_an_open_server(file):
    ring = KeyRing(file, interval=0)
    assert not ring.locked
    file.path.parent.mkdir(parents=True)
    file.path.write_text("{")
    assert ring.locked


def test_without_a_file_nothing_is_locked():
    ring = KeyRing(None)
    assert not ring.locked and ring.find("ls-x") is None


def test_the_file_is_json_that_other_tools_can_read(file):
    file.create("alice")
    stored = json.loads(file.path.read_text())
    assert stored["version"] == 1 and stored["keys"][0]["name"] == "alice"
