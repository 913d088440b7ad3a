"""Functions and calls that several tests of tools share."""

from pydantic import TypeAdapter

from lightship.serving.tools.schema import Tool, ToolChoice

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
CHAT = [
    {"role": "user", "content": "How is it?"},
    {"role": "assistant", "content": "",
     "tool_calls": [{"id": "abcdefghi", "type": "function",
                     "function": {"name": "weather", "arguments": {"city": "Zürich <b> & \"See\"", "days": 3}}}]},
    {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "Sun > rain"},
]  # fmt: skip
ZURICH = ("weather", '{"city": "Zürich", "days": 3}')
NOW = ("clock", "{}")
H_ZURICH = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": 3}}\n</tool_call>'
H_NOW = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
L_ZURICH = '{"name": "weather", "parameters": {"city": "Zürich", "days": 3}}'
L_NOW = '{"name": "clock", "parameters": {}}'
M_ZURICH = '{"name": "weather", "arguments": {"city": "Zürich", "days": 3}}'
M_NOW = '{"name": "clock", "arguments": {}, "id": "abcdefghi"}'


def tools_of(*functions):
    return TypeAdapter(list[Tool]).validate_python([{"type": "function", "function": each} for each in functions])


def choice_of(value):
    return TypeAdapter(ToolChoice | None).validate_python(value)
