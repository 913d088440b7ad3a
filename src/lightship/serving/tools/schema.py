"""What requests say about tools, as OpenAI's API has it, and what that means for one answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lightship.errors import RequestError

JSON = dict[str, Any]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
MANY = 128  # tools of one request, and calls of one message, as OpenAI's API has it


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class FunctionDefinition(_Body):
    """A function that the model may call. `parameters` is a JSON schema of an object; without it there are none."""

    name: Name
    description: Annotated[str, Field(max_length=100_000)] | None = None
    parameters: JSON | None = None
    strict: bool | None = None


class Tool(_Body):
    """One tool; OpenAI's `custom` tools are unknown here."""

    type: Literal["function"]
    function: FunctionDefinition

    def plain(self) -> JSON:
        """For the chat template, which may rely on each of the fields."""
        return {
            "type": "function",
            "function": {
                "name": self.function.name,
                "description": self.function.description or "",
                "parameters": self.function.parameters or {"type": "object", "properties": {}},
            },
        }


class NamedFunction(_Body):
    """The name of a function."""

    name: Name


class NamedTool(_Body):
    """The tool that must be called, or one of those that may."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(_Body):
    """Those of the tools that may be called, or one of which must."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MANY)]


class AllowedChoice(_Body):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


Tools = Annotated[list[Tool], Field(max_length=MANY)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedChoice


class CalledFunction(_Body):
    """What an assistant's message called; `arguments` is JSON text."""

    name: Name
    arguments: Annotated[str, Field(max_length=1_000_000)]


class AssistantToolCall(_Body):
    """One call in an assistant's message."""

    id: Annotated[str, Field(min_length=1, max_length=200)]
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self, param: str) -> JSON:
        """For the chat template, which takes the arguments as an object. Raises `RequestError` when they are none."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
            json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()  # no half of a character, no infinity
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise RequestError("the arguments of a tool call must be a JSON object", f"{param}.function.arguments")
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


AssistantToolCalls = Annotated[list[AssistantToolCall], Field(min_length=1, max_length=MANY)]
ToolCallId = Annotated[str, Field(min_length=1, max_length=200)]


@dataclass(frozen=True)
class Calling:
    """What one answer may do with tools: `tools` as the template takes them, all of them; `callable` those that may be
    called, each with its `strict`. `forced`: it is a call; `named`: of one function and no other. `parallel`: it may be
    several."""

    tools: list[JSON]
    callable: list[JSON]
    forced: bool
    named: bool
    strict: bool
    parallel: bool

    @property
    def names(self) -> list[str]:
        """Of the functions that may be called."""
        return [tool["function"]["name"] for tool in self.callable]


def calling(tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None) -> Calling | None:
    """What a request wants; None when nothing may be called. Raises `RequestError` when the choice does not fit."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice asks for a call, and no tools are given", "tool_choice")
        return None
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise RequestError("two tools have the same name", "tools")
    if choice == "none":
        return None
    wanted = names
    if isinstance(choice, NamedTool):
        wanted = [choice.function.name]
    elif isinstance(choice, AllowedChoice):
        wanted = [tool.function.name for tool in choice.allowed_tools.tools]
    if unknown := set(wanted) - set(names):
        raise RequestError(f"tool_choice names {min(unknown)!r}, which is none of the tools", "tool_choice")
    for index, tool in enumerate(tools):
        if (tool.function.parameters or {}).get("type", "object") != "object":
            raise RequestError("the parameters of a function are a schema of the type 'object'",
                               f"tools.{index}.function.parameters", "invalid_function_parameters")  # fmt: skip
    named = isinstance(choice, NamedTool)
    required = choice == "required" or (isinstance(choice, AllowedChoice) and choice.allowed_tools.mode == "required")
    may = [tool for tool in tools if tool.function.name in wanted]
    return Calling(
        [tool.plain() for tool in tools],
        [
            {"type": "function", "function": {**tool.plain()["function"], "strict": bool(tool.function.strict)}}
            for tool in may
        ],
        named or required,
        named,
        any(tool.function.strict for tool in may),
        parallel is not False and not named,
    )
