"""Keys to the server: one JSON file, mode 0600, with the SHA-256 of each; the keys themselves are stored nowhere."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from lightship.errors import UsageError

log = logging.getLogger("lightship.serving")

Scope = Literal["use", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = ("use", "metrics", "admin")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LARGEST = 4 * 2**20  # bytes of a key file
PATIENCE = 10.0  # seconds to wait for another writer
DAY = 86_400

Stamp = tuple[int, ...] | None  # what tells one state of a file from another; None: there is no file


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is kept of a key. Times are seconds since 1970; a limit of None is none."""

    id: str
    name: str
    sha256: str
    scopes: tuple[Scope, ...]
    created: int
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    expires: int | None = None

    def may(self, *scopes: Scope) -> bool:
        """Whether it has one of `scopes`."""
        return any(scope in self.scopes for scope in scopes)

    def expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and time.time() >= self.expires


class _Content(msgspec.Struct, forbid_unknown_fields=True):
    version: Literal[1]
    keys: tuple[Key, ...]


def digest_of(secret: str) -> str:
    """What is stored of a key. A key has 256 random bits, so that a fast hash is enough."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def usual_path() -> Path:
    """Where keys are unless another place is named: lightship/keys.json in the user's configuration folder."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "lightship" / "keys.json"


class KeyFile:
    """The file. Writers take turns; a reader sees it before or after a change, never in between."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[Key, ...]:
        """The keys; none when there is no file. Raises `UsageError` for a file that others can read or write, or that
        is no key file."""
        return self.load()[0]

    def load(self) -> tuple[tuple[Key, ...], Stamp]:
        """The keys, and the stamp of the state they were read from."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return (), None
        except OSError as error:
            raise UsageError(f"the key file {self.path} cannot be read: {error.strerror}") from error
        try:
            state = os.fstat(descriptor)
            self._check(state)
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read(LARGEST)
        finally:
            os.close(descriptor)
        try:
            return msgspec.json.decode(content, type=_Content).keys, _stamp(state)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{self.path} is not a key file: {error}",
                             hint="restore it, or remove it and create new keys") from error  # fmt: skip

    def stamp(self) -> Stamp:
        """The stamp of the file now."""
        try:
            return _stamp(os.stat(self.path))
        except FileNotFoundError:
            return None

    def create(
        self,
        name: str,
        scopes: Sequence[Scope] = ("use",),
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        days: float | None = None,
    ) -> tuple[Key, str]:
        """Add a key; returns what is stored of it and the key, which nobody can see again. Raises `UsageError` for a
        name that is taken or cannot be used."""
        if not NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} cannot name a key", hint="letters, digits, dot, dash and underscore, at most 64"
            )
        secret = "ls-" + urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
        now = int(time.time())
        key = Key(
            id="key-" + secrets.token_hex(4),
            name=name,
            sha256=digest_of(secret),
            scopes=tuple(scope for scope in SCOPES if scope in scopes),
            created=now,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            expires=None if days is None else now + int(days * DAY),
        )
        with self._alone():
            keys = self.read()
            if any(name in (each.name, each.id) for each in keys):
                raise UsageError(f"there is a key named {name!r} already",
                                 hint=f"choose another name, or `lightship keys revoke {name}` first")  # fmt: skip
            self._write((*keys, key))
        return key, secret

    def revoke(self, which: str) -> Key:
        """Remove the key with this id or name. Raises `UsageError` when there is none."""
        with self._alone():
            keys = self.read()
            found = [key for key in keys if which in (key.id, key.name)]
            if not found:
                raise UsageError(f"no key has the id or name {which!r}", hint="`lightship keys list` shows them")
            self._write(tuple(key for key in keys if key not in found))
        return found[0]

    def _check(self, state: os.stat_result) -> None:
        """Raise for a file whose content others may know, or may have written."""
        if not stat.S_ISREG(state.st_mode):
            raise UsageError(f"the key file {self.path} is not a file")
        if state.st_mode & 0o077:
            raise UsageError(f"others than its owner can get at the key file {self.path} "
                             f"(mode {stat.S_IMODE(state.st_mode):04o})",
                             hint=f"chmod 600 {self.path}, and create new keys if it could be written")  # fmt: skip
        if state.st_uid not in (os.geteuid(), 0):
            raise UsageError(f"the key file {self.path} belongs to another user (uid {state.st_uid})")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other writers out. The lock is a file beside, since the key file itself is replaced."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            beside = self.path.with_name(f".{self.path.name}.lock")
            descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(f"keys cannot be written to {self.path}: {error.strerror}") from error
        try:
            self._lock(descriptor)
            yield
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise UsageError(f"another process has been writing {self.path} for {PATIENCE:.0f} s") from error
                time.sleep(0.02)

    def _write(self, keys: tuple[Key, ...]) -> None:
        """Replace the file in one step: a crash leaves the old one or the new one."""
        text = msgspec.json.format(msgspec.json.encode(_Content(1, keys)), indent=1) + b"\n"
        beside = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
        try:
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.path)
            _sync(self.path.parent)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise UsageError(f"keys cannot be written to {self.path}: {error.strerror}") from error


def _stamp(state: os.stat_result) -> Stamp:
    return state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_size


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class KeyRing:
    """The keys of a running server. A changed file is noticed within a second. Once a key was there the server stays
    locked, whatever becomes of the file: while it is missing, unreadable or broken, nobody gets in."""

    def __init__(self, file: KeyFile | None, interval: float = 1.0) -> None:
        """Raises `UsageError` for a file that cannot be used. Without a file nothing is ever locked."""
        self._file, self._interval = file, interval
        self._keys: tuple[Key, ...] = ()
        self._seen: Stamp = None
        self._trouble: str | None = None
        if file is not None:
            self._keys, self._seen = file.load()
        self._locked = bool(self._keys)
        self._next = time.monotonic() + interval

    @property
    def place(self) -> str:
        """Where keys are read from."""
        return "the key file (none is named)" if self._file is None else str(self._file.path)

    @property
    def locked(self) -> bool:
        """Whether a key is needed."""
        self._look()
        return self._locked

    def find(self, given: str) -> Key | None:
        """The valid key that `given` is. Takes the same time whichever it is, and whether it is one."""
        self._look()
        digest, found = digest_of(given), None
        for key in self._keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return None if found is None or found.expired() else found

    def _look(self) -> None:
        now = time.monotonic()
        if self._file is None or now < self._next:
            return
        self._next = now + self._interval
        try:
            if (stamp := self._file.stamp()) != self._seen or self._trouble:
                keys, self._seen = self._file.load()
                if stamp is None and self._locked:
                    raise UsageError(f"the key file {self._file.path} is gone")
                self._keys, self._trouble = keys, None
        except (UsageError, OSError) as error:
            self._keys = ()
            if self._trouble != str(error):
                log.error("nobody gets in: %s", error)
            self._trouble = str(error)
        self._locked = self._locked or bool(self._keys) or self._trouble is not None
