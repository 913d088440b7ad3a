"""Tool calls: the family of a template, its parser, its grammar, and chats with tools."""

import asyncio
import contextlib
import json
import re
from typing import Literal

import jsonschema
import openai
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from lightship.bundle import Bundle
from lightship.engine import EngineSettings, GenerationParams, Grammar
from lightship.errors import RequestError
from lightship.pipeline import ship
from lightship.recipe import Precision, Recipe
from lightship.serving.json_schema import any_object, to_grammar
from lightship.serving.model import ServedModel
from lightship.serving.server import running
from lightship.serving.text import TextStream
from lightship.serving.tools import Tools, detect, recognise, record
from lightship.serving.tools.parser import Arguments, Start, Text
from lightship.serving.tools.schema import AssistantToolCall, Tool, ToolChoice, calling
from lightship.serving.tools.tags import arguments_of
from lightship.targets import openvino
from lightship.template import ChatTemplate, load_template
from lightship.tokenizer import load_tokenizer
from tests.chat_templates import FAMILIES, HERMES, MISTRAL
from tests.serving.test_protocol import byte_tokenizer, served
from tests.tiny import TEMPLATE, tiny_llama, tiny_tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "", "parameters": {"type": "object"}}}
NAMES = ["weather", "clock"]


def read(family, pieces, names=NAMES, **options):
    """Content, and name and arguments of each call, as the deltas say it. Ids and indices are checked on the way."""
    parser = Tools(family, True, family == "mistral").parser(names, **options)
    content, calls = "", []
    for delta in [delta for piece in pieces for delta in parser.push(piece)] + parser.finish():
        if isinstance(delta, Text):
            assert delta.text
            content += delta.text
        elif isinstance(delta, Start):
            assert delta.index == len(calls)
            assert re.fullmatch("[A-Za-z0-9]{9}" if family == "mistral" else "call_[A-Za-z0-9]{24}", delta.id)
            calls.append([delta.name, ""])
        else:
            assert isinstance(delta, Arguments) and delta.index == len(calls) - 1
            calls[-1][1] += delta.text
    return content, [(name, text) for name, text in calls]


# ── Which family ────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_recognised_by_what_its_template_does(family):
    found = recognise(ChatTemplate(FAMILIES[family], {}))
    assert found == Tools(family, parallel=family != "llama3", short_ids=family == "mistral")


@pytest.mark.parametrize(
    "source",
    [
        TEMPLATE,  # writes no call
        HERMES.replace("{{ tool | tojson }}", ""),  # does not tell of the functions
        HERMES.replace("+ message.content + '\\n</tool_response>", "+ '\\n</tool_response>"),  # nor of the result
        HERMES.replace("<tool_call>", "<call>").replace("</tool_call>", "</call>"),  # calls in another form
        HERMES.replace("call.function.arguments | tojson", "call.function.arguments | string"),  # arguments not in JSON
        "{{ raise_exception('no') }}",
    ],
)
def test_other_templates_have_no_family(source):
    assert detect(ChatTemplate(source, {})) is None


def test_short_ids_stand_for_the_clients_own():
    """A chat that another server began, with ids in OpenAI's form, goes on with a template that refuses them."""
    tools = recognise(ChatTemplate(MISTRAL, {}))
    call = {"id": "call_" + "a" * 24, "type": "function", "function": {"name": "clock", "arguments": {}}}
    kept = {**call, "id": "abcDEF123"}
    asked, answer, result, other = tools.prepare(
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call, kept]},
         {"role": "tool", "tool_call_id": call["id"], "content": "5"},
         {"role": "tool", "tool_call_id": kept["id"], "content": "6"}]
    )  # fmt: skip
    assert re.fullmatch("[a-z0-9]{9}", answer["tool_calls"][0]["id"]) and result["name"] == "clock"
    assert result["tool_call_id"] == answer["tool_calls"][0]["id"]
    assert other["tool_call_id"] == answer["tool_calls"][1]["id"] == "abcDEF123"
    with pytest.raises(RequestError, match="must answer"):
        tools.prepare([asked, {**result, "tool_call_id": "call_other"}, answer])


# ── Templates ───────────────────────────────────────────────────────────────

CHAT = [
    {"role": "user", "content": "How is it?"},
    {"role": "assistant", "content": "",
     "tool_calls": [{"id": "abcdefghi", "type": "function",
                     "function": {"name": "weather", "arguments": {"city": "Zürich <b> & \"See\"", "days": 3}}}]},
    {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "Sun > rain"},
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tools", [None, [WEATHER, CLOCK]])
def test_renders_as_transformers(tmp_path, family, tools):
    from transformers import PreTrainedTokenizerFast

    tiny_tokenizer(tmp_path)
    judge = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    judge.chat_template = FAMILIES[family]
    judge.save_pretrained(tmp_path)
    ours = load_template(tmp_path).render(CHAT, tools=tools)
    assert ours == judge.apply_chat_template(CHAT, tools=tools, tokenize=False, add_generation_prompt=True)
    ids = judge.backend_tokenizer.encode(ours, add_special_tokens=False).ids
    assert ids == judge.apply_chat_template(CHAT, tools=tools, add_generation_prompt=True, return_dict=False)
    assert ("Zürich <b>" in ours) and ("clock" in ours) == bool(tools)


@pytest.mark.parametrize("files", [True, False])
def test_a_template_of_its_own_for_tools(tmp_path, files):
    """As transformers chooses among named templates, in files of their own or in the tokenizer's configuration."""
    from transformers import PreTrainedTokenizerFast

    tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    judge = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    judge.chat_template = {"default": TEMPLATE, "tool_use": HERMES}
    judge.save_pretrained(tmp_path, save_jinja_files=files)
    assert (tmp_path / "additional_chat_templates").exists() == files
    template = load_template(tmp_path)
    for tools in (None, [WEATHER]):
        expected = judge.apply_chat_template(CHAT[:1], tools=tools, tokenize=False)
        assert template.render(CHAT[:1], False, tools=tools) == expected
    assert detect(template) == "hermes"


# ── Parsers ─────────────────────────────────────────────────────────────────

ZURICH = ("weather", '{"city": "Zürich", "days": 3}')
NOW = ("clock", "{}")
H_ZURICH = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": 3}}\n</tool_call>'
H_NOW = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
L_ZURICH = '{"name": "weather", "parameters": {"city": "Zürich", "days": 3}}'
L_NOW = '{"name": "clock", "parameters": {}}'
M_ZURICH = '{"name": "weather", "arguments": {"city": "Zürich", "days": 3}}'
M_NOW = '{"name": "clock", "arguments": {}, "id": "abcdefghi"}'

READ = [
    # What models of the family write.
    ("hermes", H_ZURICH, "", [ZURICH]),
    ("hermes", f"\n{H_ZURICH}\n{H_NOW}\n", "", [ZURICH, NOW]),
    ("hermes", f"Let me see.\n\n{H_ZURICH}", "Let me see.", [ZURICH]),
    ("hermes", '<tool_call>\n{"arguments": {"a": 1}, "name": "clock"}\n</tool_call>', "", [("clock", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "clock"}</tool_call>', "", [NOW]),
    ("hermes", H_ZURICH.removesuffix("\n</tool_call>"), "", [ZURICH]),
    ("hermes", H_ZURICH.removesuffix("_call>"), "", [ZURICH]),
    ("hermes", H_ZURICH.removesuffix("\n</tool_call>") + H_NOW, "", [ZURICH, NOW]),
    ("hermes", f"{H_NOW} Done.", " Done.", [NOW]),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call>}{\\"\\\\"}}</tool_call>', "",
     [("weather", '{"city": "</tool_call>}{\\"\\\\"}')]),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "a\nb\tc"}}</tool_call>', "",
     [("weather", '{"city": "a\\nb\\tc"}')]),
    ("llama3", L_ZURICH, "", [ZURICH]),
    ("llama3", f"<|python_tag|>{L_ZURICH}", "", [ZURICH]),
    ("llama3", f"{L_ZURICH}; {L_NOW}", "", [ZURICH, NOW]),
    ("llama3", f"{L_ZURICH}\n<|python_tag|> {L_NOW}", "", [ZURICH, NOW]),
    ("llama3", f"I call:\n\n  {L_NOW}", "I call:", [NOW]),
    ("llama3", '{"type": "function", "name": "clock", "parameters": {}}', "", [NOW]),
    ("llama3", '{\n  "name": "clock",\n  "arguments": {"a": [1, {}]}\n}', "", [("clock", '{"a": [1, {}]}')]),
    ("mistral", f"[TOOL_CALLS] [{M_ZURICH}]", "", [ZURICH]),
    ("mistral", f"[TOOL_CALLS][{M_ZURICH}, {M_NOW}]", "", [ZURICH, NOW]),
    ("mistral", f"Well.[TOOL_CALLS] [{M_NOW}] So.", "Well. So.", [NOW]),
    ("mistral", f"[TOOL_CALLS] {M_NOW}", "", [NOW]),
    ("mistral", f"[TOOL_CALLS] [{M_ZURICH},{M_NOW}", "", [ZURICH, NOW]),
    # What only looks like a call is text.
    ("hermes", "No <tool_call> here.", None, []),
    ("hermes", "<tool", None, []),
    ("hermes", "  \n", None, []),
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Zür', None, []),
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": Zürich}}\n</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"days": NaN}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "weather", "arguments": "{}"}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "rain", "arguments": {}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": ["weather"], "arguments": {}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": {"a": 1}, "arguments": {}}</tool_call>', None, []),
    ("hermes", "<tool_call>" + '{"name":' * 3000 + "}" * 3000 + "</tool_call>", None, []),
    ("hermes", "<tool_call>{" + "9" * 5000 + "}</tool_call>", None, []),
    ("hermes", '<tool_call>{"name": "weather", "days": ' + "9" * 5000 + "}</tool_call>", None, []),
    ("hermes", '<tool_call>{"name": "clock, "arguments": {}}</tool_call>\n' + H_NOW,
     '<tool_call>{"name": "clock, "arguments": {}}</tool_call>', [NOW]),
    ("hermes", "<tool_call>{}" * 40 + H_NOW, "<tool_call>{}" * 40 + H_NOW, []),
    ("llama3", f"You could write {L_NOW}.", None, []),
    ("llama3", '{"name": "clock"}', None, []),
    ("llama3", '{"name": "Ada", "parameters": {}}\n', None, []),
    ("llama3", '{"name": "Ada", "parameters":\n{"name": "clock", "parameters": {}}}', None, []),
    ("llama3", 'int main() {\n  return {"name"};\n}', None, []),
    ("llama3", '<|python_tag|>clock.call(zone="CET")', None, []),
    ("llama3", '{"na', None, []),
    ("llama3", "{", None, []),
    ("mistral", "[TOOL_CALLS]", None, []),
    ("mistral", "[TOOL_CALLS] [clock]", None, []),
    ("mistral", f"[TOOL_CALLS] [{M_NOW}, clock]", ", clock]", [NOW]),
    ("mistral", f'[TOOL_CALLS] [{M_NOW}, {{"name": 5}}]', ', {"name": 5}]', [NOW]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "text", "content", "calls"), READ, ids=lambda value: str(value)[:50])
def test_an_answer_is_read(family, text, content, calls):
    expected = (text if content is None else content, calls)
    assert read(family, [text]) == expected
    assert read(family, text) == expected  # a character at a time


FRAGMENTS = st.sampled_from(
    [H_ZURICH, H_NOW, L_ZURICH, L_NOW, M_ZURICH, M_NOW, "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]",
     "[", "]", "{", "}", '"', "\\", "\n", " ", ", ", "; ", '{"name": "clock", ', '"arguments": {', '"parameters": {}}',
     '{"name', "<tool", "Zürich", "a", "\x01", "1"]
)  # fmt: skip


@given(st.sampled_from(list(FAMILIES)), st.lists(FRAGMENTS, max_size=12), st.data())
def test_where_an_answer_is_cut_plays_no_role(family, fragments, data):
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read(family, [text])
    assert read(family, pieces) == whole
    content, calls = whole
    assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)
    if not calls:
        assert content == text


@given(st.sampled_from(list(FAMILIES)), st.text(), st.dictionaries(st.text(), st.text() | st.integers()), st.booleans())
@example("hermes", "", {"a": "</tool_call>"}, True)
def test_what_a_family_writes_it_reads(family, text, arguments, ascii_only):
    """Any arguments, in the form of the family's own grammar, after any text."""
    body = json.dumps(arguments, ensure_ascii=ascii_only)
    before = text.rstrip()
    written = {
        "hermes": f'{before}\n<tool_call>\n{{"name": "clock", "arguments": {body}}}\n</tool_call>',
        "llama3": f'{before}\n{{"name": "clock", "parameters": {body}}}',
        "mistral": f'{before}[TOOL_CALLS] [{{"name": "clock", "arguments": {body}}}]',
    }[family]
    content, calls = read(family, [written])
    assert content == before and [(name, json.loads(found)) for name, found in calls] == [("clock", arguments)]
    if not before:
        sure = read(family, written.strip(), sure=True)
        assert sure == ("", calls)


def test_sure_arguments_are_passed_on_as_they_come():
    """And end where the answer does, as OpenAI's do at the limit of tokens."""
    parser = Tools("hermes", True, False).parser(NAMES, sure=True)
    pieces = ['<tool_call>\n{"name": "wea', 'ther", "arguments": {"city": "Z', "ür\x01", "ich"]
    found = [parser.push(piece) for piece in pieces]
    assert found[0] == [] and isinstance(found[1][0], Start)
    assert found[1][1:] + found[2] + found[3] == [
        Arguments(0, '{"city": "Z'), Arguments(0, "ür\\u0001"), Arguments(0, "ich")
    ]  # fmt: skip
    assert parser.finish() == []


def test_one_call_ends_the_answer_where_only_one_may_be():
    for family, text in (("hermes", H_NOW + H_ZURICH), ("mistral", f"[TOOL_CALLS] [{M_NOW}, {M_ZURICH}]")):
        for pieces in ([text], text):
            assert read(family, pieces, parallel=False) == ("", [NOW])
    parser = Tools("llama3", False, False).parser(NAMES)
    assert not parser.done and parser.push(L_NOW) and parser.done
    assert parser.push(f"; {L_ZURICH}") == parser.finish() == []


# ── What a bundle says ──────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def hermes_path(tmp_path_factory):
    """A tiny llama whose tokenizer_config.json carries a template of the hermes family, shipped."""
    source = tmp_path_factory.mktemp("hermes")
    tiny_llama(source)
    (source / "chat_template.jinja").unlink()
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": HERMES}))
    out = tmp_path_factory.mktemp("shipped") / "caller"
    ship(Recipe(source=str(source), precision=Precision(name="fp32")), out)
    return out


def test_a_bundle_says_how_its_model_calls(hermes_path):
    bundle = Bundle.open(hermes_path)
    folder = bundle.target_folder("openvino")
    assert json.loads((folder / "tools.json").read_text()) == {"family": "hermes"}
    assert "targets/openvino/tools.json" in bundle.manifest["files"]
    model = ServedModel.load("caller", bundle.digest, folder)
    assert model.tools == Tools("hermes", parallel=True, short_ids=False)
    text = model.tokenizer.decode(model.chat_tokens(CHAT, [WEATHER]), skip_special_tokens=False)
    assert text == model.template.render(CHAT, tools=[WEATHER])


def test_a_model_without_a_family_refuses_by_name(bundle_path):
    folder = Bundle.open(bundle_path).target_folder("openvino")
    assert not (folder / "tools.json").exists()
    model = ServedModel.load("plain", "", folder)
    for messages, functions, param in ((CHAT[:1], [WEATHER], "tools"), (CHAT, None, "messages")):
        with pytest.raises(RequestError, match="'plain' calls no functions") as found:
            model.chat_tokens(messages, functions)
        assert (found.value.param, found.value.code) == (param, "unsupported_parameter")
    assert model.chat_tokens(CHAT[:1])


# ── Requests ────────────────────────────────────────────────────────────────


def tools_of(*functions):
    return TypeAdapter(list[Tool]).validate_python([{"type": "function", "function": each} for each in functions])


def choice_of(value):
    return TypeAdapter(ToolChoice | None).validate_python(value)


@pytest.mark.parametrize(
    ("choice", "names", "forced", "named"),
    [
        (None, ["a", "b"], False, False),
        ("auto", ["a", "b"], False, False),
        ("required", ["a", "b"], True, False),
        ({"type": "function", "function": {"name": "b"}}, ["b"], True, True),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
            {"type": "function", "function": {"name": "b"}}]}}, ["b"], True, False),
    ],
)  # fmt: skip
def test_a_choice_says_what_may_be_called(choice, names, forced, named):
    found = calling(tools_of({"name": "a", "strict": True}, {"name": "b"}), choice_of(choice), None)
    assert (found.names, found.forced, found.named, found.parallel) == (names, forced, named, not named)
    assert len(found.tools) == 2 and found.strict == ("a" in names)
    empty = {"type": "object", "properties": {}}
    assert found.tools[0]["function"] == {"name": "a", "description": "", "parameters": empty}


def test_no_tools_no_calls():
    assert calling(None, None, False) is None
    assert calling([], choice_of("auto"), None) is None
    assert calling(tools_of({"name": "a"}), choice_of("none"), None) is None


@pytest.mark.parametrize(
    ("functions", "choice", "param"),
    [
        ([], "required", "tool_choice"),
        ([{"name": "a"}], {"type": "function", "function": {"name": "b"}}, "tool_choice"),
        ([{"name": "a"}, {"name": "a"}], None, "tools"),
        ([{"name": "a"}, {"name": "b", "parameters": {"type": "string"}}], None, "tools.1.function.parameters"),
    ],
)
def test_choices_that_do_not_fit(functions, choice, param):
    with pytest.raises(RequestError) as found:
        calling(tools_of(*functions), choice_of(choice), None)
    assert found.value.param == param


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "ä", "a\n"])
def test_names_of_functions_are_bounded(name):
    with pytest.raises(ValidationError):
        tools_of({"name": name})


@pytest.mark.parametrize(
    "arguments",
    ["[1]", "{", "NaN", '{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}', "[" * 100_000, '{"a": ' * 100_000],
    ids=lambda text: text[:20],
)
def test_arguments_that_are_no_object(arguments):
    call = AssistantToolCall.model_validate({"id": "x", "function": {"name": "a", "arguments": arguments}})
    with pytest.raises(RequestError) as found:
        call.plain("messages.1.tool_calls.0")
    assert found.value.param == "messages.1.tool_calls.0.function.arguments"


def test_arguments_become_the_object_that_templates_expect():
    call = AssistantToolCall.model_validate({"id": "x", "function": {"name": "a", "arguments": '{"b": [1, "ü"]}'}})
    assert call.plain("") == {
        "id": "x", "type": "function", "function": {"name": "a", "arguments": {"b": [1, "ü"]}}
    }  # fmt: skip
    assert '"arguments": {"b": [1, "ü"]}' in ChatTemplate(HERMES, {}).render(
        [{"role": "assistant", "content": "", "tool_calls": [call.plain("")]}]
    )


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
