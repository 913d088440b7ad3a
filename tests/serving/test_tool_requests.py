"""Requests with tools: what may be called, what does not fit, and how arguments become objects."""

import pytest
from pydantic import ValidationError

from lightship.errors import RequestError
from lightship.serving.tools.schema import AssistantToolCall, calling
from lightship.template import ChatTemplate
from tests.chat_templates import HERMES
from tests.serving.tooling import choice_of, tools_of


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
