"""Request bodies. Unknown fields are errors; known ones that cannot be honoured are refused by name, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lightship.engine import GenerationParams
from lightship.errors import RequestError


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    """`include_usage` adds a last chunk with the usage."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class Sampling(_Body):
    """What both completion routes share."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=1000)
    n: int | None = None
    logit_bias: dict[str, float] | None = None

    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else (self.stop or [])

    def params(self, max_tokens: int) -> GenerationParams:
        """For the engine. The temperature defaults to 1, as in OpenAI's API."""
        return GenerationParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            seed=None if self.seed is None else self.seed & 0x7FFFFFFF,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
        )

    def refuse_unsupported(self) -> None:
        """Raise for what this server cannot do."""
        _refuse("n", self.n, (None, 1))
        _refuse("logit_bias", self.logit_bias, (None, {}))
        if self.stream_options is not None:
            _refuse("include_obfuscation", self.stream_options.include_obfuscation, (None, False))
            if not self.stream:
                raise RequestError("stream_options needs stream: true", "stream_options")


class TextPart(_Body):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One chat message; content is text, or a list of text parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=100)]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """For the chat template."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None

    def limit(self) -> int | None:
        """The most tokens asked for."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
        for index, message in enumerate(self.messages):
            _refuse(f"messages.{index}.name", message.name, (None,))
        _refuse("response_format", self.response_format, (None, {"type": "text"}))
        _refuse("logprobs", self.logprobs, (None, False))
        _refuse("top_logprobs", self.top_logprobs, (None, 0))
        _refuse("tools", self.tools, (None, []))
        _refuse("tool_choice", self.tool_choice, (None, "none", "auto"))


PromptText = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[int], Field(min_length=1, max_length=1_000_000)]


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: PromptText | TokenIds | Annotated[list[PromptText] | list[TokenIds], Field(min_length=1, max_length=1000)]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    best_of: int | None = None

    def single(self) -> str | list[int]:
        """The prompt, alone or in a list of one. Raises `RequestError` for several."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return prompt
        if isinstance(prompt[0], int):
            return prompt
        if len(prompt) > 1:
            raise RequestError(f"one prompt a request; {len(prompt)} were given", "prompt", "unsupported_parameter")
        return prompt[0]

    def limit(self) -> int | None:
        """The most tokens asked for; 16 by default, as in OpenAI's API."""
        return 16 if self.max_tokens is None else self.max_tokens

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        _refuse("echo", self.echo, (None, False))
        _refuse("logprobs", self.logprobs, (None,))
        _refuse("suffix", self.suffix, (None, ""))
        _refuse("best_of", self.best_of, (None, 1))


class PredictRequest(_Body):
    """POST /predict."""

    input: Annotated[str, Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float = Field(0.0, ge=0, le=2)
    seed: int | None = Field(None, ge=0, lt=2**31)


MANY = 2048  # inputs of one request, as OpenAI's API has it


class ClassifyRequest(_Body):
    """POST /predict of a classifier: a text, or several."""

    input: str | list[str]

    def inputs(self) -> list[str]:
        """The texts. Raises `RequestError` for none, an empty one, or more than `MANY`."""
        return _some([self.input] if isinstance(self.input, str) else self.input)


class Question(_Body):
    """What to look for, and the text that holds the answer."""

    question: Annotated[str, Field(min_length=1)]
    context: Annotated[str, Field(min_length=1)]


class AnswerRequest(_Body):
    """POST /predict of an extractive question answerer."""

    input: Question | list[Question]

    def inputs(self) -> list[Question]:
        """The questions. Raises `RequestError` for none, or more than `MANY`."""
        return _some([self.input] if isinstance(self.input, Question) else self.input)


class EmbeddingsRequest(_Body):
    """POST /v1/embeddings: texts, or token ids of this model, special tokens included."""

    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = Field(None, max_length=1000)

    def inputs(self) -> list[str] | list[list[int]]:
        """The inputs, one or several. Raises `RequestError` for none, an empty one, or more than `MANY`."""
        given: Any = self.input
        single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        found: list[str] | list[list[int]] = _some([given] if single else given)
        return found


def _some(inputs: list[Any]) -> list[Any]:
    if not inputs or "" in inputs or [] in inputs:
        raise RequestError("the input is empty", "input")
    if len(inputs) > MANY:
        raise RequestError(f"{len(inputs)} inputs in one request; at most {MANY} are taken", "input")
    return inputs


def _refuse(name: str, value: Any, fine: tuple[Any, ...]) -> None:
    if value not in fine:
        raise RequestError(f"{name} is not supported by this server yet", name, "unsupported_parameter")
