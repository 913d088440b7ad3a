"""How fast: token buckets that bound what a key asks for in a minute, and the speed of the engine as measured."""

from __future__ import annotations

import math
from collections.abc import Callable

from lightship.errors import Overloaded, RequestError

ROUNDING = 1e-6  # seconds that floating point may add to a wait


class Bucket:
    """A token bucket: it holds at most what a minute brings, refills evenly, and may be in debt."""

    def __init__(self, per_minute: float, now: float) -> None:
        self._level, self._at = max(1.0, per_minute), now

    def refill(self, per_minute: float, now: float) -> None:
        """Bring the level up to `now`, at the rate that holds now."""
        gained = max(0.0, now - self._at) * per_minute / 60
        self._level, self._at = min(max(1.0, per_minute), self._level + gained), now

    def missing(self, amount: float, per_minute: float) -> float:
        """Seconds until `amount` is there, 0 when it is."""
        seconds = (amount - self._level) * 60 / per_minute
        return seconds if seconds > ROUNDING else 0.0

    def spend(self, amount: float) -> None:
        """Take `amount`, which may leave a debt, or give it back when negative."""
        self._level -= amount


class KeyRates:
    """The buckets of every key that has limits: requests a minute, and tokens a minute.

    A request costs one request and the tokens of its prompt when it arrives, and each token it is given when it is
    produced. What it might produce is not taken in advance: a key may overdraw by what it has running, and waits for
    that afterwards, so that over time the rate holds exactly.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._requests: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}

    def take(self, key: str, prompt: int, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
        """Charge a request. Raises `Overloaded`, charging nothing, when a bucket has no room for it: `retry_after` is
        the first whole second at which it has; and `RequestError` (400) when it never will."""
        if tokens_per_minute is not None and prompt > tokens_per_minute:
            raise RequestError(
                f"the prompt has {prompt} tokens; this key may use {tokens_per_minute:g} a minute",
                code="prompt_exceeds_rate_limit",
            )
        asked = [
            ("requests_per_minute", self._requests, 1, requests_per_minute),
            ("tokens_per_minute", self._tokens, prompt, tokens_per_minute),
        ]
        waits = []
        for reason, buckets, amount, rate in asked:
            if rate is not None:
                bucket = buckets.setdefault(key, Bucket(rate, self._clock()))
                bucket.refill(rate, self._clock())
                waits.append((bucket.missing(amount, rate), reason, rate))
        wait, reason, rate = max(waits, default=(0.0, "", 0.0))
        if wait > 0:
            what = reason.removesuffix("_per_minute")
            raise Overloaded(f"this key may use {rate:g} {what} a minute", math.ceil(wait - ROUNDING), reason)
        for _, buckets, amount, rate in asked:
            if rate is not None:
                buckets[key].spend(amount)

    def spend(self, key: str, tokens: int) -> None:
        """Charge `tokens` more; negative gives back what was charged for a request that never ran."""
        if key in self._tokens:
            self._tokens[key].spend(tokens)

    def give_back(self, key: str, prompt: int) -> None:
        """All that `take` charged for a request that was refused: the server's queue is not the key's doing."""
        self.spend(key, -prompt)
        if key in self._requests:
            self._requests[key].spend(-1)


class Speed:
    """Tokens a second, averaged over the last tokens: `half_life` tokens later an observation counts half."""

    def __init__(self, start: float, half_life: float) -> None:
        self._half_life = half_life
        self._tokens, self._seconds = half_life / 4, half_life / 4 / start  # a guess gives way quickly

    def observe(self, tokens: float, seconds: float) -> None:
        """`tokens` took `seconds`."""
        keep = 0.5 ** (tokens / self._half_life)
        self._tokens = self._tokens * keep + tokens
        self._seconds = self._seconds * keep + max(seconds, 1e-9)

    @property
    def per_second(self) -> float:
        """The speed now."""
        return self._tokens / self._seconds
