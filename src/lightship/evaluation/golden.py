"""Golden cases: prompts with an expected answer, run on the original and on the candidate, compared case by case.

A file of JSON lines: {"id"?, "prompt" | "messages", "expect": {"exact" | "regex" | "json": …}, "max_tokens"?}.
`exact` compares without surrounding white space, `regex` searches, `json` wants an answer that parses and contains
the expected value (objects may hold more keys; arrays match element by element).
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightship.checkpoint import Checkpoint
from lightship.engine import Engine, GenerationParams
from lightship.errors import EngineError, UsageError
from lightship.report import Metric
from lightship.template import load_template
from lightship.tokenizer import load_tokenizer

Prompt = str | list[dict[str, Any]]
Generate = Callable[[Prompt, int], str]
Kind = Literal["exact", "regex", "json"]

MAX_TOKENS = 64
REGEX_LENGTH = 1000
REGEX_SECONDS = 2.0
KEYS = {"id", "prompt", "messages", "expect", "max_tokens"}
SEARCH = "import json,re,sys;p,t=json.load(sys.stdin);sys.exit(0 if re.search(p,t) else 3)"


@dataclass(frozen=True)
class Case:
    """One golden case. `where` is "FILE, line N", for errors."""

    id: str
    prompt: Prompt
    kind: Kind
    expected: Any
    max_tokens: int
    where: str


@dataclass(frozen=True)
class Outcome:
    """One case on both models: what they answered and whether it passed."""

    case: Case
    original: str
    candidate: str
    original_passed: bool
    candidate_passed: bool


@dataclass(frozen=True)
class GoldenResult:
    """The paired outcomes of all cases."""

    outcomes: tuple[Outcome, ...]

    @property
    def both(self) -> tuple[Outcome, ...]:
        """Passed by original and candidate."""
        return tuple(one for one in self.outcomes if one.original_passed and one.candidate_passed)

    @property
    def lost(self) -> tuple[Outcome, ...]:
        """Passed by the original only."""
        return tuple(one for one in self.outcomes if one.original_passed and not one.candidate_passed)

    @property
    def gained(self) -> tuple[Outcome, ...]:
        """Passed by the candidate only."""
        return tuple(one for one in self.outcomes if one.candidate_passed and not one.original_passed)

    def metrics(self) -> list[Metric]:
        """Pass rate, original as baseline, with the standard error of the paired difference (McNemar)."""
        n, lost, gained = len(self.outcomes), len(self.lost), len(self.gained)
        stderr = math.sqrt(max(lost + gained - (lost - gained) ** 2 / n, 0.0)) / n
        method = (
            f"share of cases passed, greedy; {len(self.both)} passed by both, {lost} lost, {gained} gained; s.e. is of "
            "the paired difference, √(lost + gained − (lost − gained)²/n)/n; "
            f"exact McNemar p = {mcnemar(lost, gained):.3g}"
        )
        return [
            Metric("golden", (len(self.both) + gained) / n, "share", n, stderr, "higher",
                   (len(self.both) + lost) / n, method),
            Metric("golden_lost", float(lost), "cases", n, None, "lower", 0.0,
                   "cases the original passes and this does not"),
        ]  # fmt: skip


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p-value that `lost` and `gained` are equally likely (binomial sign test)."""
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1))
    return float(min(1.0, 2 * tail / 2**n))


def read_cases(path: Path) -> tuple[Case, ...]:
    """The cases in `path`. Raises `UsageError` naming the line at fault."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    cases = [_case(line, number, path) for number, line in enumerate(lines, 1) if line.strip()]
    if not cases:
        raise UsageError(f"{path} holds no golden case", hint='write lines like {"prompt": …, "expect": {"regex": …}}')
    seen: dict[str, Case] = {}
    for case in cases:
        if case.id in seen:
            raise UsageError(f"{case.where}: the id {case.id!r} was used before ({seen[case.id].where})")
        seen[case.id] = case
    return tuple(cases)


def _case(line: str, number: int, path: Path) -> Case:
    where = f"{path}, line {number}"
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: expected an object, got {type(entry).__name__}")
    if unknown := sorted(entry.keys() - KEYS):
        raise UsageError(f"{where}: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(KEYS))}")
    kind, expected = _expectation(entry.get("expect"), where)
    limit = entry.get("max_tokens", MAX_TOKENS)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise UsageError(f"{where}: max_tokens must be a whole number above 0, not {limit!r}")
    return Case(str(entry.get("id", f"line-{number}")), _prompt(entry, where), kind, expected, limit, where)


def _prompt(entry: dict[str, Any], where: str) -> Prompt:
    if ("prompt" in entry) == ("messages" in entry):
        raise UsageError(f'{where}: give either "prompt" or "messages"')
    if "prompt" in entry:
        if not isinstance(entry["prompt"], str) or not entry["prompt"]:
            raise UsageError(f'{where}: "prompt" must be text')
        return str(entry["prompt"])
    messages = entry["messages"]
    fine = isinstance(messages, list) and messages and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in messages
    )  # fmt: skip
    if not fine:
        raise UsageError(f'{where}: "messages" must be a list of {{"role", "content"}}')
    found: list[dict[str, Any]] = messages
    return found


def _expectation(expect: Any, where: str) -> tuple[Kind, Any]:
    if not isinstance(expect, dict) or len(expect) != 1 or next(iter(expect)) not in ("exact", "regex", "json"):
        raise UsageError(f'{where}: "expect" must hold exactly one of "exact", "regex", "json", not {expect!r}')
    kind, expected = next(iter(expect.items()))
    if kind != "json" and not isinstance(expected, str):
        raise UsageError(f'{where}: "{kind}" must be text, not {expected!r}')
    if kind == "regex":
        if len(expected) > REGEX_LENGTH:
            raise UsageError(f"{where}: the regex has {len(expected)} characters, at most {REGEX_LENGTH} are allowed")
        try:
            re.compile(expected)
        except (re.error, OverflowError, RecursionError) as error:
            raise UsageError(f"{where}: not a regular expression: {error}") from error
    return kind, expected


def run(cases: Sequence[Case], generate: Generate) -> list[str]:
    """The answer to every case, in order; `generate(prompt or messages, max_tokens)` must be greedy."""
    return [generate(case.prompt, case.max_tokens) for case in cases]


def compare(cases: Sequence[Case], original: Sequence[str], candidate: Sequence[str]) -> GoldenResult:
    """Judge the answers of both models. Raises `UsageError` for a regex that takes too long."""
    if not cases:
        raise UsageError("there is no golden case to compare")
    return GoldenResult(
        tuple(
            Outcome(case, before, after, passes(case, before), passes(case, after))
            for case, before, after in zip(cases, original, candidate, strict=True)
        )
    )


def passes(case: Case, answer: str) -> bool:
    """Whether `answer` meets the expectation."""
    if case.kind == "exact":
        return answer.strip() == str(case.expected).strip()
    if case.kind == "regex":
        return _search(case, answer)
    try:
        return contains(json.loads(answer), case.expected)
    except (ValueError, RecursionError):
        return False


def contains(found: Any, expected: Any) -> bool:
    """Whether JSON `found` holds `expected`: objects may have more keys, all else must be equal. 1 is 1.0, not true."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(key in found and contains(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        same = isinstance(found, list) and len(found) == len(expected)
        return same and all(contains(one, other) for one, other in zip(found, expected, strict=True))
    return isinstance(found, bool) == isinstance(expected, bool) and bool(found == expected)


def _search(case: Case, answer: str) -> bool:
    """`re.search` in a process of its own: a pattern that backtracks for ever holds the interpreter lock, so only
    another process can be given a deadline."""
    command = [sys.executable, "-I", "-S", "-c", SEARCH]
    try:
        done = subprocess.run(command, input=json.dumps([case.expected, answer]), text=True, capture_output=True,
                              timeout=REGEX_SECONDS)  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise UsageError(
            f"{case.where}: the regex {case.expected!r} took more than {REGEX_SECONDS:g} s on an answer of "
            f"{len(answer)} characters",
            hint="avoid nested repetition such as (a+)+",
        ) from error
    if done.returncode not in (0, 3):
        raise UsageError(f"{case.where}: the regex {case.expected!r} failed: {done.stderr.strip()[-200:]}")
    return done.returncode == 0


def answerer(engine: Engine, checkpoint: Checkpoint) -> Generate:
    """A function that answers a prompt or messages greedily with `engine`."""
    tokenizer = load_tokenizer(checkpoint.folder)
    template = load_template(checkpoint.folder)

    def generate(prompt: str | Sequence[dict[str, Any]], max_tokens: int) -> str:
        if isinstance(prompt, str):
            tokens = tokenizer.encode(prompt).ids
        elif template is None:
            raise UsageError("golden cases with messages need a model with a chat template", hint="use prompt instead")
        else:
            tokens = tokenizer.encode(template.render(prompt), add_special_tokens=False).ids
        engine.submit(tokens, GenerationParams(max_tokens=max_tokens))
        found: list[int] = []
        while engine.busy():
            for event in engine.step():
                if event.error:
                    raise EngineError(f"a golden case could not be answered: {event.error}")
                found.extend(event.token_ids)
        return str(tokenizer.decode(found))

    return generate
