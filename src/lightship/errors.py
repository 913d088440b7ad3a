"""The error tree. Every message says what was received, what was expected, and (hint) what to do.

LightshipError
├── UsageError            a wrong argument, option or path           exit 2   HTTP 400
│   ├── UnknownName       a step, target or source nobody knows
│   └── RequestError      an API request that cannot be served as asked
│       └── ContextTooLong
├── SourceError           the model given cannot be read             exit 2
│   └── UnsafeSource      it could run code, so it is refused
├── UnsupportedError      known, and not possible here               exit 2   HTTP 400
├── MissingExtra          a package of an extra is not installed     exit 2
├── LimitExceeded         a measured figure is above its limit       exit 1
├── ReloadFailed          another bundle could not take over         exit 1   HTTP 400
├── BundleError           a bundle is not what it was                exit 1
│   ├── IncompleteBundle
│   └── TamperedBundle
└── EngineError           the running engine failed                  exit 2   HTTP 500
    ├── Overloaded                                                            HTTP 429
    ├── Timeout           waited longer than its deadline                      HTTP 503
    └── EngineDied                                                            HTTP 503
"""

from __future__ import annotations


class LightshipError(Exception):
    """Base of every error lightship raises on purpose.

    `hint` is one sentence of advice, `exit_code` what the command line returns (1: a check failed, 2: wrong
    use or input/output), `http_status` what the server answers.
    """

    exit_code = 2
    http_status = 500

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message


class UsageError(LightshipError):
    """An argument, option or path that cannot be used."""

    http_status = 400


class UnknownName(UsageError):
    """A name that no file and no installed plug-in answers to."""


class RequestError(UsageError):
    """An API request that cannot be served as asked; `param` and `code` go into OpenAI's error envelope."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.http_status = status


class ContextTooLong(RequestError):
    """Prompt plus requested output do not fit the model's context."""

    def __init__(self, message: str, param: str | None = "messages") -> None:
        super().__init__(message, param, "context_length_exceeded")


class SourceError(LightshipError):
    """The given model cannot be read: missing, corrupt, or not a model."""


class UnsafeSource(SourceError):
    """Reading the given model could run code; it is refused."""


class UnsupportedError(LightshipError):
    """Known and understood, but not possible with this model, target or version."""

    http_status = 400


class MissingExtra(LightshipError):
    """A package that belongs to an optional extra is not installed."""


class LimitExceeded(LightshipError):
    """A measured figure is above its limit; nothing is shipped."""

    exit_code = 1


class ReloadFailed(LightshipError):
    """A running server could not change to another bundle, and serves the one it had."""

    exit_code = 1
    http_status = 400
    code = "reload_failed"


class BundleError(LightshipError):
    """A bundle that cannot be used as it lies there."""

    exit_code = 1


class IncompleteBundle(BundleError):
    """No manifest, or a listed file is missing: the bundle was never finished."""


class TamperedBundle(BundleError):
    """A file was changed, added or points outside the bundle."""


class EngineError(LightshipError):
    """The engine failed while running."""


class ClientLeft(EngineError):
    """The client closed the connection before its answer was complete: there is nobody left to tell."""

    http_status = 499


class Overloaded(EngineError):
    """No room for another request now. `retry_after`: whole seconds after which one more try makes sense; `reason`: the
    limit that was met (`queue_full`, `queue_slow`, `requests_per_minute`, `tokens_per_minute`). `code` and `kind`
    (OpenAI's `type`) go into the envelope; None leaves them to the table."""

    http_status = 429
    retry_after: int | None = None
    code: str | None = None
    kind: str | None = None

    def __init__(self, message: str, retry_after: int | None = None, reason: str = "queue_full") -> None:
        super().__init__(message)
        self.reason = reason
        if retry_after is not None:
            self.retry_after = retry_after
        if reason.endswith("_per_minute"):
            self.code, self.kind = "rate_limit_exceeded", reason.removesuffix("_per_minute")


class Timeout(EngineError):
    """A request waited or ran longer than its deadline; `code` for OpenAI's envelope. `retry_after`: as of
    `Overloaded`, where it waited for its turn."""

    http_status = 503
    retry_after: int | None = None
    code = "timeout"


class EngineDied(EngineError):
    """The engine process ended; it must be started again."""

    http_status = 503
