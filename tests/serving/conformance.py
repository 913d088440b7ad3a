"""What clients nobody here wrote get from the server: one check a function, its first line is what it proves.

`python -m tests.serving.conformance` ships a tiny random model, serves it, runs every check and writes
docs/conformance.md. `test_conformance.py` runs the same checks. lm-eval, with its 38 packages, is no part of the test
extra: where it is not installed its own check is not run; the request that it sends is.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import jsonschema
import numpy as np
import openai
from pydantic import BaseModel

from lightship.sampling import log_softmax
from lightship.serving.server import running

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
NAME = "caller"
MESSAGES: list[Any] = [{"role": "user", "content": "Hello there"}]
CHAT: dict[str, Any] = {"model": NAME, "messages": MESSAGES}


class NotHere(Exception):
    """The client is not installed."""


@dataclass(frozen=True)
class Place:
    """A server, and what it serves."""

    url: str
    source: Path
    folder: Path

    @property
    def base(self) -> str:
        """What clients are given."""
        return f"{self.url}/v1"

    def client(self) -> openai.OpenAI:
        """openai-python."""
        return openai.OpenAI(base_url=self.base, api_key="none", max_retries=0)


def made(folder: Path) -> tuple[Path, Path]:
    """(checkpoint, bundle) of a tiny random llama that calls tools as Hermes does."""
    from lightship.pipeline import ship
    from lightship.recipe import Precision, Recipe
    from tests.chat_templates import HERMES
    from tests.tiny import tiny_llama

    source = folder / "source"
    source.mkdir()
    tiny_llama(source)
    (source / "chat_template.jinja").write_text(HERMES, encoding="utf-8")
    ship(Recipe(source=str(source), precision=Precision(name="fp32")), folder / NAME)
    return source, folder / NAME


# ── openai-python ───────────────────────────────────────────────────────────


def openai_models(place: Place) -> None:
    """`models.list` and `models.retrieve`; another name is `NotFoundError` with the code `model_not_found`."""
    client = place.client()
    assert [model.id for model in client.models.list()] == [NAME] and client.models.retrieve(NAME).id == NAME
    assert failure(lambda: client.models.retrieve("other"), openai.NotFoundError).code == "model_not_found"


def openai_chat(place: Place) -> None:
    """`chat.completions.create`: role, content, finish reason, exact usage, fingerprint."""
    answer = place.client().chat.completions.create(**CHAT, max_tokens=7, temperature=0)
    choice, usage = answer.choices[0], answer.usage
    assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason == "length"
    assert usage is not None and (usage.completion_tokens, usage.total_tokens) == (7, usage.prompt_tokens + 7)
    assert (answer.system_fingerprint or "").startswith("fp_")


def openai_stream(place: Place) -> None:
    """`stream=True` with `include_usage`: joined, the chunks are the whole answer, the last chunk has its usage."""
    client, options = place.client(), {**CHAT, "max_tokens": 20, "temperature": 1.0, "seed": 5}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == content(whole)
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def openai_stream_helper(place: Place) -> None:
    """`chat.completions.stream`, the client's own accumulator, parses what it streamed into the pydantic model."""
    with place.client().chat.completions.stream(**CHAT, max_tokens=200, seed=1, response_format=Ship) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Ship)


def openai_choices(place: Place) -> None:
    """`n=3` with a seed: three answers in order, each another, and the same three again the next time."""
    client, options = place.client(), {**CHAT, "max_tokens": 12, "temperature": 1.0, "seed": 9}
    several = client.chat.completions.create(**options, n=3)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in several.choices]
    assert len(set(texts)) == 3
    assert [choice.message.content for choice in client.chat.completions.create(**options, n=3).choices] == texts


def openai_stop(place: Place) -> None:
    """`stop` ends before the string, also one that spans tokens."""
    client, options = place.client(), {**CHAT, "max_tokens": 30, "temperature": 0}
    text = content(client.chat.completions.create(**options))
    stopped = client.chat.completions.create(**options, stop=[text[3:7], "never there"])
    assert content(stopped) == text[: text.index(text[3:7])] and stopped.choices[0].finish_reason == "stop"


def openai_logprobs(place: Place) -> None:
    """`logprobs=True`: every token with its exact bytes, which join to the text."""
    answer = place.client().chat.completions.create(**CHAT, max_tokens=12, temperature=0, logprobs=True)
    entries = answer.choices[0].logprobs.content if answer.choices[0].logprobs else None
    assert entries is not None and len(entries) == 12 and all(entry.logprob <= 0 for entry in entries)
    joined = bytes(byte for entry in entries for byte in entry.bytes or ())
    assert joined.decode("utf-8", "replace") == content(answer)


def openai_json_object(place: Place) -> None:
    """`response_format` `json_object`: what is finished is a JSON object."""
    texts = finished(place, response_format={"type": "json_object"})
    assert texts and all(isinstance(json.loads(text), dict) for text in texts)


def openai_json_schema(place: Place) -> None:
    """`response_format` `json_schema`, strict and not: what is finished is valid by jsonschema."""
    for strict in (True, False):
        form = {"type": "json_schema", "json_schema": {"name": "ship", "schema": SCHEMA, "strict": strict}}
        texts = finished(place, response_format=form)
        assert texts
        for text in texts:
            jsonschema.validate(json.loads(text), SCHEMA)


def openai_parse(place: Place) -> None:
    """`chat.completions.parse` with a pydantic model gives an instance of it."""
    client = place.client()
    found = [
        client.chat.completions.parse(**CHAT, max_tokens=200, seed=seed, response_format=Ship).choices[0].message.parsed
        for seed in range(3)
    ]
    assert all(isinstance(each, Ship) for each in found)


def openai_tools(place: Place) -> None:
    """`tools` with `tool_choice="required"`, whole and streamed: a call whose arguments fit its schema."""
    client, options = place.client(), {**CHAT, "tools": TOOLS, "tool_choice": "required", "max_tokens": 400, "seed": 2}
    options |= {"parallel_tool_calls": False}
    (call,) = client.chat.completions.create(**options).choices[0].message.tool_calls or [None]
    assert call is not None and call.function.name == "book"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    with client.chat.completions.stream(**options) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or [None]
    assert streamed is not None and streamed.function.arguments == call.function.arguments


def openai_tool_results(place: Place) -> None:
    """A call and its result are sent back as the client holds them, and answered."""
    client = place.client()
    options = {"tools": TOOLS, "max_tokens": 300, "model": NAME}
    message = client.chat.completions.create(
        **options, messages=MESSAGES, tool_choice={"type": "function", "function": {"name": "book"}}, seed=1
    ).choices[0].message  # fmt: skip
    calls = message.tool_calls or []
    results = [{"role": "tool", "tool_call_id": call.id, "content": "done"} for call in calls]
    answer = client.chat.completions.create(
        **{**options, "max_tokens": 5, "messages": [*MESSAGES, message, *results]}, tool_choice="none"
    )
    assert calls and answer.choices[0].finish_reason in ("stop", "length")


def openai_completions(place: Place) -> None:
    """`completions.create` with two prompts and `n=2`: prompt by prompt, each prompt counted once."""
    client = place.client()
    answer = client.completions.create(model=NAME, prompt=["Hello", "Once"], n=2, max_tokens=4, temperature=0)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3] and texts[0] == texts[1] != texts[2] == texts[3]
    alone = [client.completions.create(model=NAME, prompt=prompt, max_tokens=1).usage for prompt in ("Hello", "Once")]
    assert answer.usage and answer.usage.prompt_tokens == sum(usage.prompt_tokens for usage in alone if usage)


def openai_errors(place: Place) -> None:
    """Errors are the client's own classes, with `param`, `code` and `type` as OpenAI has them."""
    client = place.client()
    refused = failure(lambda: client.chat.completions.create(**CHAT, logit_bias={"5": 1}), openai.BadRequestError)
    assert (refused.param, refused.code) == ("logit_bias", "unsupported_parameter")
    unknown = failure(
        lambda: client.chat.completions.create(**CHAT, extra_body={"best_ever": 1}), openai.BadRequestError
    )
    assert (unknown.param, unknown.code, unknown.type) == ("best_ever", "unknown_parameter", "invalid_request_error")
    long = failure(lambda: client.completions.create(model=NAME, prompt=[5] * 3000), openai.BadRequestError)
    assert long.code == "context_length_exceeded"


def openai_async(place: Place) -> None:
    """`AsyncOpenAI`: eight at once, whole and streamed, get eight answers, and the same eight again."""

    async def everything() -> list[str]:
        async with openai.AsyncOpenAI(base_url=place.base, api_key="none", max_retries=0) as client:

            async def one(number: int) -> str:
                options: dict[str, Any] = {
                    **CHAT, "messages": [{"role": "user", "content": f"Number {number}"}], "max_tokens": 8,
                    "temperature": 0,
                }  # fmt: skip
                if number % 2:
                    return content(await client.chat.completions.create(**options))
                stream = await client.chat.completions.create(**options, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return list(await asyncio.gather(*map(one, range(8))))

    texts = asyncio.run(everything())
    assert all(texts) and len(set(texts)) > 1 and asyncio.run(everything()) == texts


# ── langchain-openai ────────────────────────────────────────────────────────


def langchain(place: Place, **options: Any) -> Any:
    """`ChatOpenAI` for the server."""
    try:
        from langchain_openai import ChatOpenAI
    except ImportError as error:
        raise NotHere("langchain-openai") from error
    return ChatOpenAI(base_url=place.base, api_key="none", model=NAME, max_retries=0, **options)


def langchain_invoke(place: Place) -> None:
    """`ChatOpenAI.invoke`: the text that openai-python gets, with its usage."""
    model = langchain(place, temperature=0, max_tokens=9)
    said = model.invoke("Hello there")
    assert said.content == content(place.client().chat.completions.create(**CHAT, temperature=0, max_tokens=9))
    assert said.usage_metadata["output_tokens"] == 9


def langchain_stream(place: Place) -> None:
    """`ChatOpenAI.stream`: joined, the chunks are what `invoke` gives."""
    model = langchain(place, temperature=0, max_tokens=15, stream_usage=True)
    chunks = list(model.stream("Hello there"))
    assert "".join(chunk.content for chunk in chunks) == model.invoke("Hello there").content
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 15


def langchain_structured(place: Place) -> None:
    """`with_structured_output` by `json_schema` and by `function_calling` gives instances of the pydantic model."""
    for method in ("json_schema", "function_calling"):
        model = langchain(place, max_tokens=400, seed=4).with_structured_output(Ship, method=method)
        assert isinstance(model.invoke("Hello there"), Ship)


def langchain_tools(place: Place) -> None:
    """`bind_tools` with a tool that must be called: the call is parsed."""
    model = langchain(place, max_tokens=400, seed=3).bind_tools(TOOLS, tool_choice="book")
    (call,) = model.invoke("Hello there").tool_calls
    assert call["name"] == "book"
    jsonschema.validate(call["args"], SCHEMA)


# ── lm-eval ─────────────────────────────────────────────────────────────────


CASES = [("The if statement is used for", " conditional execution"), ("Hello", " there, naïve 漢字\n\tand more"),
         ("A long context. " * 30 + "To", " its end")]  # fmt: skip


def in_process(place: Place, context: str, rest: str) -> tuple[float, bool]:
    """Log-probability of `rest` after `context`, and whether it is what greedy decoding says."""
    from lightship.engine import EngineSettings
    from lightship.find import find
    from lightship.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(place.folder)
    ids, begin = tokenizer.encode(context + rest).ids, len(tokenizer.encode(context).ids)
    scorer = find("targets", "openvino").open_scorer(place.folder, EngineSettings())
    logprobs = log_softmax(scorer.logits(np.array([ids]), np.ones((1, len(ids)), np.int64))[0, begin - 1 : -1])
    return float(logprobs[np.arange(len(ids) - begin), ids[begin:]].sum()), bool(
        (logprobs.argmax(axis=1) == ids[begin:]).all()
    )


def lm_eval_request(place: Place) -> None:
    """The request that local-completions sends (ids, `echo`, `logprobs=1`, `max_tokens=1`) scores as in process."""
    from lightship.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(place.folder)
    for context, rest in CASES:
        ids, begin = tokenizer.encode(context + rest).ids, len(tokenizer.encode(context).ids)
        answer = place.client().completions.create(
            model=NAME, prompt=[ids], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
        )
        given = answer.choices[0].logprobs
        assert given is not None and given.token_logprobs and given.top_logprobs
        found, tops = given.token_logprobs[begin:-1], given.top_logprobs[begin:-1]
        greedy = all(value == max(top.values()) for value, top in zip(found, tops, strict=True))
        expected, likeliest = in_process(place, context, rest)
        assert abs(sum(found) - expected) < 1e-4 and greedy == likeliest


def lm_eval_client(place: Place) -> None:
    """`lm_eval`'s own local-completions: `loglikelihood` equals the same scores in process to 1e-4."""
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.openai_completions import LocalCompletionsAPI
    except ImportError as error:
        raise NotHere("lm-eval") from error
    model = LocalCompletionsAPI(
        base_url=f"{place.base}/completions", model=NAME, tokenizer=str(place.source), tokenizer_backend="huggingface",
        max_length=2048,
    )  # fmt: skip
    requests = [Instance("loglikelihood", {}, case, number) for number, case in enumerate(CASES)]
    for case, (score, greedy) in zip(CASES, model.loglikelihood(requests), strict=True):
        expected, likeliest = in_process(place, *case)
        assert abs(score - expected) < 1e-4 and greedy == likeliest


# ── What the checks share ───────────────────────────────────────────────────


class Ship(BaseModel):
    """A ship."""

    kind: Literal["cog", "cog of war", "caravel"]
    masts: int
    sails: bool


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["cog", "cog of war"]}, "masts": {"type": "integer", "minimum": 1, "maximum": 12},
                   "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,6}$"}},
    "required": ["kind", "masts", "name"],
    "additionalProperties": False,
}  # fmt: skip
TOOLS: list[Any] = [{"type": "function", "function": {"name": "book", "description": "Book it.", "parameters": SCHEMA}}]


def content(answer: Any) -> str:
    """The text of the first choice."""
    return str(answer.choices[0].message.content)


def failure(call: Callable[[], Any], kind: type[openai.APIStatusError]) -> Any:
    """The error that `call` raises."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def finished(place: Place, **options: Any) -> list[str]:
    """Texts of some seeds that ended by themselves; a random model also writes what is no Unicode."""
    client = place.client()
    answers = [client.chat.completions.create(**CHAT, max_tokens=200, seed=seed, **options) for seed in range(6)]
    return [content(answer) for answer in answers
            if answer.choices[0].finish_reason == "stop" and "\ufffd" not in content(answer)]  # fmt: skip


CLIENTS = {"openai": "openai-python", "langchain": "langchain-openai", "lm_eval": "lm-eval"}
PACKAGES = {"openai": "openai", "langchain": "langchain-openai", "lm_eval": "lm-eval"}


def checks() -> dict[str, Callable[[Place], None]]:
    """Every check by its name, as they stand in this file."""
    functions = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    found = [(name, each) for name, each in functions if client_of(name) and name not in CLIENTS]
    return dict(sorted(found, key=lambda pair: inspect.getsourcelines(pair[1])[1]))


def client_of(name: str) -> str | None:
    """The client that a check belongs to."""
    return next((client for client in CLIENTS if name.startswith(f"{client}_")), None)


def proof(check: Callable[[Place], None]) -> str:
    """What it proves."""
    return (inspect.getdoc(check) or "").split("\n")[0]


def page(results: dict[str, str]) -> str:
    """docs/conformance.md."""
    lines = [
        "# Conformance",
        "",
        "What clients nobody here wrote get from the server. Written by `python -m tests.serving.conformance`, which",
        "ships a tiny random model, serves it by OpenVINO over HTTP and runs the checks; the test suite runs the same.",
    ]
    for client, title in CLIENTS.items():
        try:
            version = importlib.metadata.version(PACKAGES[client])
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        lines += ["", f"## {title} {version}", "", "| check | result |", "|---|---|"]
        own = [(name, each) for name, each in checks().items() if client_of(name) == client]
        lines += [f"| {proof(each)} | {results[name]} |" for name, each in own]
    stack = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("openvino-genai", "fastapi", "uvicorn"))
    return "\n".join([*lines, "", f"{datetime.now(UTC):%Y-%m-%d}; {stack}.", ""])


def results(place: Place) -> Iterator[tuple[str, str]]:
    """Each check and how it went."""
    for name, each in checks().items():
        try:
            each(place)
            yield name, "passed"
        except NotHere:
            yield name, "not run"
        except Exception as error:
            yield name, f"**failed**: {type(error).__name__}"


def main() -> None:
    """Run all, write the page; the exit code tells whether all passed."""
    with tempfile.TemporaryDirectory() as scratch:
        source, bundle = made(Path(scratch))
        with running(bundle) as url:
            found = dict(results(Place(url, source, bundle / "targets" / "openvino")))
    PAGE.write_text(page(found), encoding="utf-8")
    sys.exit(any(result.startswith("**") for result in found.values()))


if __name__ == "__main__":
    main()
