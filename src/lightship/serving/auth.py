"""Who may do what: once there is a key, nothing is answered without one but /livez, /readyz and /health."""

from __future__ import annotations

import ipaddress
import ssl
from pathlib import Path

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from lightship.errors import UsageError
from lightship.serving.errors import OPEN, Failure, failure
from lightship.serving.keys import Key, KeyRing
from lightship.serving.keys import Scope as KeyScope
from lightship.serving.limits import BodyLimit, HeadLimit, Limits, refuse

MISSING = "You didn't provide an API key: send it in an Authorization header (Authorization: Bearer YOUR_KEY)"
WRONG = "Incorrect API key provided"
STRANGER = "This server has no keys and answers to localhost only"


class Doorkeeper:
    """ASGI middleware in front of everything but request ids and the limit of headers: denies by default, before any
    of a body is read. `scope["state"]["key"]` is then the `Key`, or None on a server without keys.

    `local`: a server without keys answers only requests that name this machine in `Host`, so that a web page that
    someone visits cannot reach it under a name of its own (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, local: bool = False) -> None:
        self._app, self._keys, self._local = app, keys, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let in or refuse."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # there are no websockets here
            return await send({"type": "websocket.close", "code": 1008})
        verdict = self._judge(scope)
        if isinstance(verdict, Failure):
            return await refuse(verdict, scope, receive, send)
        scope.setdefault("state", {})["key"] = verdict
        return await self._app(scope, receive, send)

    def _judge(self, scope: Scope) -> Key | Failure | None:
        """The key, a refusal, or None where no key is needed."""
        path = _route(scope)
        if path in OPEN and scope["method"] in ("GET", "HEAD"):
            return None
        if not self._keys.locked:
            stranger = self._local and not _names_this_machine(scope)
            return failure(STRANGER, 403, code="host_not_allowed") if stranger else None
        given = _given(scope)
        key = self._keys.find(given) if given else None
        if key is None:
            return failure(WRONG if given else MISSING, 401, headers={"WWW-Authenticate": "Bearer"})
        if not key.may(*needed(path)):
            return failure(f"This key lacks the scope {' or '.join(needed(path))}", 403)
        return key


def guard(app: FastAPI, keys: KeyRing, limits: Limits, local: bool = False) -> None:
    """Put the doors in front of `app`, in their order: headers are counted, the key is looked at, the body is read."""
    for door, options in (  # what is added last is met first
        (BodyLimit, {"limits": limits}),
        (Doorkeeper, {"keys": keys, "local": local}),
        (HeadLimit, {}),
    ):
        app.add_middleware(door, **options)


def needed(path: str) -> tuple[KeyScope, ...]:
    """The scopes one of which a key must have for a path."""
    first = path.split("/")[1] if path.startswith("/") else ""
    if first == "admin":
        return ("admin",)
    return ("metrics", "admin") if first == "metrics" else ("use", "admin")


def _route(scope: Scope) -> str:
    """The path that routes are looked up by: without the prefix the app is mounted at."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def _given(scope: Scope) -> str | None:
    """The key of the request. Two of the same header are none: which one counts is not to be guessed."""
    bearer = [value for name, value in scope["headers"] if name == b"authorization"]
    if bearer:
        scheme, _, secret = bearer[0].decode("latin-1").strip().partition(" ")
        return secret.strip() or None if len(bearer) == 1 and scheme.lower() == "bearer" else None
    plain = [value for name, value in scope["headers"] if name == b"x-api-key"]
    return plain[0].decode("latin-1").strip() or None if len(plain) == 1 else None


def _names_this_machine(scope: Scope) -> bool:
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    if len(hosts) != 1:
        return not hosts  # HTTP/1.0 has none, and a browser always sends one
    host = hosts[0].strip()
    name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
    return is_loopback(name)


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine only. Names other than localhost are not looked up."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def check_exposure(host: str, keys: KeyRing, tls: bool, behind_proxy: bool) -> None:
    """Raise `UsageError` where others can reach the server, at `host` or through a proxy, and there is no key, or the
    key would travel in the clear."""
    if is_loopback(host) and not behind_proxy:
        return
    others = "a proxy makes the server reachable by others" if is_loopback(host) else (
        f"{host or 'every address'} can be reached by others")  # fmt: skip
    if not keys.locked:
        raise UsageError(
            f"{others}, and there is no key in {keys.place}: anyone could use it",
            hint="`lightship keys create NAME` (--keys FILE for another file) makes one; without keys serve on "
            "127.0.0.1, for this machine alone",
        )
    if not (tls or behind_proxy):
        raise UsageError(
            f"{others}, and keys and texts would travel unencrypted",
            hint="give --tls-cert FILE and --tls-key FILE, or --behind-proxy where a proxy in front ends TLS",
        )


def check_tls(certificate: Path | None, key: Path | None) -> bool:
    """Whether TLS is asked for. Raises `UsageError` where one of the files is missing, unreadable, or not the other's:
    before anything is loaded, and without asking for the passphrase of an encrypted key."""
    if certificate is None and key is None:
        return False
    if certificate is None or key is None:
        raise UsageError("--tls-cert and --tls-key belong together", hint="give both files, or neither")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=b"")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        raise UsageError(
            f"{certificate} and {key} cannot be used for TLS: {reason}",
            hint="PEM files: the certificate with its chain, and its key without a passphrase",
        ) from error
    return True


def shares_prefix_cache(keys: KeyRing, asked: bool) -> bool:
    """Whether prompts that begin alike may share computed work. How fast an answer comes tells whether somebody asked
    the same before: between holders of different keys it is shared only where the operator asks for it."""
    return asked or not keys.locked
