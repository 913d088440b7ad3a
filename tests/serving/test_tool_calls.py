"""Chats with tools over HTTP, and calls that a real model is held to."""

import asyncio
import contextlib
import json
import re
from typing import Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel

from lightship.bundle import Bundle
from lightship.engine import EngineSettings, GenerationParams, Grammar
from lightship.serving.json_schema import any_object, to_grammar
from lightship.serving.server import running
from lightship.serving.text import TextStream
from lightship.serving.tools import Tools, record
from lightship.serving.tools.parser import Arguments, Start, Text
from lightship.serving.tools.tags import arguments_of
from lightship.targets import openvino
from lightship.template import load_template
from lightship.tokenizer import load_tokenizer
from tests.chat_templates import FAMILIES, HERMES, MISTRAL
from tests.serving.test_protocol import byte_tokenizer, served
from tests.serving.tooling import (
    CHAT,
    CLOCK,
    H_NOW,
    H_ZURICH,
    M_ZURICH,
    NOW,
    WEATHER,
    ZURICH,
)
from tests.tiny import TEMPLATE

# ── Chats over HTTP ─────────────────────────────────────────────────────────

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "[TOOL_CALLS]"]


@contextlib.contextmanager
def saying(folder, text, source, **fake):
    """A client of a server whose model says `text`, a byte a token, and has the chat template `source`."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 300, "max_position_embeddings": 100_000}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    record(load_template(folder), folder)
    script = tokenizer.encode(f"{text}<|end|>").ids
    fake = {"vocabulary": 300, "eos_token_id": script[-1], "script": script, **fake}
    (folder / "fake.json").write_text(json.dumps(fake))
    with served(folder) as (url, _):
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(client, messages=CHAT[:1], model="org/fake", **options):
    return client.chat.completions.create(model=model, messages=messages, **options)


def joined(stream):
    """A stream as the message it makes, by the shapes that OpenAI's chunks have; and its finish reason."""
    message, finish = {"content": None, "tool_calls": []}, None
    for number, chunk in enumerate(stream):
        (choice,) = chunk.choices
        assert finish is None and (choice.delta.role == "assistant") == (number == 0)
        finish = choice.finish_reason
        if choice.delta.content:
            message["content"] = (message["content"] or "") + choice.delta.content
        for part in choice.delta.tool_calls or ():
            if part.id is not None:
                assert part.index == len(message["tool_calls"]) and part.type == "function"
                message["tool_calls"].append({"name": part.function.name, "arguments": ""})
            else:
                assert part.type is None and part.function.name is None
            message["tool_calls"][part.index]["arguments"] += part.function.arguments
    return message, finish


def plain(choice):
    calls = [{"name": call.function.name, "arguments": call.function.arguments}
             for call in choice.message.tool_calls or ()]  # fmt: skip
    return {"content": choice.message.content, "tool_calls": calls}, choice.finish_reason


CALLS = [{"name": name, "arguments": arguments} for name, arguments in (ZURICH, NOW)]


def test_calls_whole_and_streamed(tmp_path):
    with saying(tmp_path, f"Let me see.\n{H_ZURICH}\n{H_NOW}", HERMES) as client:
        whole = ask(client, tools=[WEATHER, CLOCK])
        expected = ({"content": "Let me see.", "tool_calls": CALLS}, "tool_calls")
        assert plain(whole.choices[0]) == joined(ask(client, tools=[WEATHER, CLOCK], stream=True)) == expected
        ids = [call.id for call in whole.choices[0].message.tool_calls]
        assert len(set(ids)) == 2 and all(re.fullmatch("call_[A-Za-z0-9]{24}", each) for each in ids)
        assert whole.usage.completion_tokens == len(f"Let me see.\n{H_ZURICH}\n{H_NOW}".encode())
        # One of the two, then the end.
        first = ({"content": "Let me see.", "tool_calls": CALLS[:1]}, "tool_calls")
        for stream in (False, True):
            answer = ask(client, tools=[WEATHER, CLOCK], parallel_tool_calls=False, stream=stream)
            assert (joined(answer) if stream else plain(answer.choices[0])) == first
        # A function that was not offered is none; with tool_choice none nothing is.
        assert plain(ask(client, tools=[CLOCK]).choices[0])[0]["tool_calls"] == CALLS[1:]
        for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
            message, finish = plain(ask(client, **options).choices[0])
            assert message == {"content": f"Let me see.\n{H_ZURICH}\n{H_NOW}", "tool_calls": []} and finish == "stop"
        # The conversation goes on with the answer as it came.
        results = [{"role": "tool", "tool_call_id": each, "content": "5"} for each in ids]
        assert ask(client, [*CHAT[:1], whole.choices[0].message, *results], tools=[WEATHER, CLOCK]).choices
        with pytest.raises(openai.BadRequestError) as found:
            ask(client, [*CHAT[:1], whole.choices[0].message, {**results[0], "tool_call_id": "x"}], tools=[CLOCK])
        assert found.value.param == "messages.2.tool_call_id"
        choices = ask(client, tools=[WEATHER, CLOCK], n=2).choices
        assert [plain(choice) for choice in choices] == [expected, expected]


def test_calls_alone_have_no_content_and_a_cut_call_is_text(tmp_path):
    with saying(tmp_path, H_NOW, HERMES) as client:
        answer = ask(client, tools=[CLOCK])
        assert plain(answer.choices[0]) == ({"content": None, "tool_calls": CALLS[1:]}, "tool_calls")
        chunks = list(ask(client, tools=[CLOCK], stream=True))
        assert chunks[0].choices[0].delta.content is None and chunks[0].choices[0].delta.role == "assistant"
        assert joined(chunks) == plain(answer.choices[0])
        for stream in (False, True):
            answer = ask(client, tools=[CLOCK], max_tokens=20, stream=stream)
            found = joined(answer) if stream else plain(answer.choices[0])
            assert found == ({"content": H_NOW[:20], "tool_calls": []}, "length")


def test_a_call_that_begins_with_a_special_token(tmp_path):
    """`[TOOL_CALLS]` is special in the tokenizers of Mistral's models, which hides it from the text."""
    with saying(tmp_path, f"[TOOL_CALLS] [{M_ZURICH}]<|user|>", MISTRAL) as client:
        answer = ask(client, tools=[WEATHER])
        assert plain(answer.choices[0]) == ({"content": None, "tool_calls": CALLS[:1]}, "tool_calls")
        call = answer.choices[0].message.tool_calls[0]
        assert re.fullmatch("[A-Za-z0-9]{9}", call.id)
        chat = [*CHAT[:1], answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
        assert ask(client, chat, tools=[WEATHER]).choices[0].message.tool_calls
        assert ask(client).choices[0].message.content == f" [{M_ZURICH}]"
        scored = ask(client, tools=[WEATHER], logprobs=True).choices[0].logprobs.content
        assert "".join(each.token for each in scored[:4]) == "[TOOL_CALLS] [{"


REFUSED = [  # of a forced call, by what would translate its schema
    ({"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}, False, "invalid_schema"),
    ({"type": "object", "properties": {"a": {"enum": []}}}, False, "invalid_schema"),
    ({"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 3}}}, True, "unsupported_schema"),
    ({"anyOf": [{"type": "object"}, {"type": "string"}]}, True, "unsupported_schema"),
]


@pytest.mark.parametrize(("schema", "strict", "code"), REFUSED, ids=str)
def test_a_schema_that_cannot_be_held_is_refused(caller, schema, strict, code):
    """A keyword that would not be enforced only of a strict function; of others any object will do."""

    def force(**function):
        tool = {"type": "function", "function": {"name": "zone", **function}}
        return ask(caller, tools=[tool], tool_choice="required", max_tokens=5, model="caller")

    with pytest.raises(openai.BadRequestError) as found:
        force(parameters=schema, strict=strict)
    assert (found.value.param, found.value.code) == ("tools", code)
    if code == "unsupported_schema":
        assert force(parameters=schema).choices[0].finish_reason == "length"
    assert force(parameters=ZONE, strict=True).choices[0].finish_reason == "length"


@pytest.mark.parametrize("function", [{}, {"parameters": None}, {"parameters": {}},
                                      {"parameters": {"type": "object", "properties": {}}}], ids=str)  # fmt: skip
def test_without_parameters_the_arguments_are_empty(function):
    assert arguments_of({"name": "now", **function}) == to_grammar({"type": "object", "additionalProperties": False})
    assert arguments_of({"parameters": {"type": "object", "additionalProperties": {"type": "integer"}}}) != any_object()


BAD = [
    ({"tools": [{"type": "function"}]}, None),
    ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, None),
    ({"tools": [{"type": "function", "function": {"name": f"f{n}"}} for n in range(129)]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, None),
    ({"tools": [CLOCK, CLOCK]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": "any"}, None),
    ({"tools": [CLOCK], "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "tool", "content": "5"}]}, "messages.0.tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "messages.0.tool_call_id"),
    ({"messages": [{**CHAT[1], "role": "user"}]}, None),
    ({"tools": [CLOCK], "tool_choice": "required"}, "tools"),  # this engine holds an answer to no grammar
]


def test_bad_requests_are_named(tmp_path):
    with saying(tmp_path, H_NOW, HERMES) as client:
        for options, param in BAD:
            with pytest.raises(openai.BadRequestError) as found:
                ask(client, **options)
            assert param in (None, found.value.param), options
        assert ask(client, tools=[CLOCK]).choices[0].message.tool_calls


def test_a_model_without_a_family_refuses_tools(tmp_path):
    with saying(tmp_path, H_NOW, TEMPLATE) as client:
        with pytest.raises(openai.BadRequestError, match="'org/fake' calls no functions") as found:
            ask(client, tools=[CLOCK])
        assert (found.value.param, found.value.code) == ("tools", "unsupported_parameter")
        assert ask(client, tools=[CLOCK], tool_choice="none").choices[0].message.content == H_NOW


# ── Forced calls of a real model ────────────────────────────────────────────

TRIP = {
    "type": "object",
    "properties": {
        "städte": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2},
        "größe": {"enum": ["°F", "klein"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["städte", "größe", "days"],
    "additionalProperties": False,
}
ZONE = {"type": "object", "properties": {"zone": {"enum": ["CET", "UTC"]}}, "required": ["zone"]}
SCHEMAS = {"trip": TRIP, "zone": ZONE, "now": {"type": "object", "properties": {}}}
FUNCTIONS = [
    {"type": "function", "function": {"name": name, "description": "", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]


def check(calls):
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forced_call_parses_and_keeps_its_schema(bundle_path, family):
    """Whatever a model of random weights would say, in every family, beside an answer that is free."""
    folder = Bundle.open(bundle_path).target_folder("openvino")
    tools, tokenizer = Tools(family, True, False), load_tokenizer(folder)
    engine = openvino.open(folder, EngineSettings(kv_cache_gb=1))

    def say(*params):
        ids = [engine.submit([5, 6, 7], each) for each in params]
        said, ends = {each: [] for each in ids}, {}
        while engine.busy():
            for event in engine.step():
                said[event.request_id] += event.token_ids
                ends[event.request_id] = event.finish_reason
        return [(said[each], ends[each]) for each in ids]

    def forced(functions, parallel, seed):
        grammar = Grammar("tags", tools.grammar(functions, forced=True, parallel=parallel))
        return GenerationParams(max_tokens=700, temperature=1.0, seed=seed, grammar=grammar)

    free = GenerationParams(max_tokens=40, ignore_eos=True)
    ((alone, _),) = say(free)
    asked = [(FUNCTIONS, True), (FUNCTIONS, False), (FUNCTIONS[:1], False), (FUNCTIONS[1:2], False)] * 2
    (beside, _), *answers = say(free, *(forced(*each, seed) for seed, each in enumerate(asked)))
    engine.close()
    assert beside == alone
    ended = 0
    for (functions, parallel), (ids, end) in zip(asked, answers, strict=True):
        text = TextStream(tokenizer, hidden=frozenset())
        said = text.push(ids) + text.finish()
        names = [each["function"]["name"] for each in functions]
        for sure in (True, False):
            parser = tools.parser(names, sure=sure)
            deltas = parser.push(said) + parser.finish()
            if end != "stop":
                continue
            assert not any(isinstance(delta, Text) for delta in deltas)
            called = [delta for delta in deltas if isinstance(delta, Start)]
            assert len(called) == 1 or (parallel and called)
            check([(each.name, "".join(delta.text for delta in deltas if isinstance(delta, Arguments)
                                       and delta.index == each.index)) for each in called])  # fmt: skip
        ended += end == "stop"
    assert ended >= 4


@pytest.fixture(scope="module")
def caller(hermes_path):
    with running(hermes_path) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_a_forced_call_is_streamed_as_it_is_written_and_cut_at_the_limit(caller):
    """As OpenAI's is; and a call that was named ends with `stop`."""
    options = {"model": "caller", "messages": CHAT[:1], "tools": FUNCTIONS, "seed": 1,
               "tool_choice": {"type": "function", "function": {"name": "zone"}}}  # fmt: skip
    whole = caller.chat.completions.create(**options, max_tokens=900)
    message, finish = plain(whole.choices[0])
    assert finish == "stop"
    chunks = list(caller.chat.completions.create(**options, max_tokens=900, stream=True))
    pieces = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or ()]
    assert len(pieces) > 4 and joined(chunks) == (message, finish)
    again = list(caller.chat.completions.create(**options, max_tokens=900, stream=True))
    said = [[part.function.arguments for each in stream for part in each.choices[0].delta.tool_calls or ()]
            for stream in (chunks, again)]  # fmt: skip
    assert said[0] == said[1]  # a token each, however many came together
    cut, end = plain(caller.chat.completions.create(**options, max_tokens=whole.usage.completion_tokens - 4).choices[0])
    arguments, written = message["tool_calls"][0]["arguments"], cut["tool_calls"][0]["arguments"]
    assert end == "length" and written != arguments and arguments.startswith(written)


@pytest.mark.parametrize("choice", ["required", "zone", "now"])
def test_forced_calls_over_http(caller, choice):
    named = choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    options = {"model": "caller", "messages": CHAT[:1], "tools": FUNCTIONS[1:], "tool_choice": named, "max_tokens": 900}
    for seed in range(3):
        whole = caller.chat.completions.create(**options, seed=seed).choices[0]
        message, finish = plain(whole)
        assert joined(caller.chat.completions.create(**options, seed=seed, stream=True)) == (message, finish)
        assert message["content"] is None and message["tool_calls"]
        if finish != "length":
            assert finish == ("tool_calls" if choice == "required" else "stop")
            assert choice in ("required", *(call["name"] for call in message["tool_calls"]))
            check([(call["name"], call["arguments"]) for call in message["tool_calls"]])


def test_a_strict_tool_holds_the_calls_of_a_free_answer(caller):
    """Which may have none: the text is the model's own until a call begins."""
    strict = [{"type": "function", "function": {**FUNCTIONS[1]["function"], "strict": True}}]
    for seed in range(3):
        options = {"model": "caller", "messages": CHAT[:1], "tools": strict, "max_tokens": 100, "seed": seed}
        message, finish = plain(caller.chat.completions.create(**options).choices[0])
        assert joined(caller.chat.completions.create(**options, stream=True)) == (message, finish)
        assert message["content"] or message["tool_calls"]


class Zone(BaseModel):
    zone: Literal["CET", "UTC"]


def test_the_clients_own_helpers_read_the_calls(caller):
    """openai-python joins the chunks, checks the arguments against the model and makes one of them."""
    options = {"model": "caller", "messages": CHAT[:1], "tools": [openai.pydantic_function_tool(Zone, name="zone")],
               "tool_choice": "required", "parallel_tool_calls": False, "seed": 1, "max_tokens": 900}  # fmt: skip
    with caller.chat.completions.stream(**options) as stream:
        streamed = stream.get_final_completion().choices[0]
    whole = caller.chat.completions.parse(**options).choices[0]
    for choice in (streamed, whole):
        (call,) = choice.message.tool_calls
        assert isinstance(call.function.parsed_arguments, Zone) and choice.finish_reason == "tool_calls"

    async def ask_later():
        async with openai.AsyncOpenAI(base_url=caller.base_url, api_key="none", max_retries=0) as client:
            return (await client.chat.completions.create(**options)).choices[0]

    assert plain(asyncio.run(ask_later())) == plain(whole) == plain(streamed)
