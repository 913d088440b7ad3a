"""Tool calls: the family of a template, its parser, and what a bundle says."""

import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lightship.bundle import Bundle
from lightship.errors import RequestError
from lightship.serving.model import ServedModel
from lightship.serving.tools import Tools, detect, recognise
from lightship.serving.tools.parser import Arguments, Start, Text
from lightship.template import ChatTemplate, load_template
from tests.chat_templates import FAMILIES, HERMES, MISTRAL
from tests.serving.tooling import CHAT, CLOCK, H_NOW, H_ZURICH, L_NOW, L_ZURICH, M_NOW, M_ZURICH, NOW, WEATHER, ZURICH
from tests.tiny import TEMPLATE, tiny_tokenizer

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
