"""Request bodies. Unknown fields are errors; known ones that cannot be honoured are refused by name, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lightship.engine import GenerationParams, Grammar
from lightship.errors import RequestError
from lightship.serving.json_schema import any_object, to_grammar
from lightship.serving.tools.schema import AssistantToolCalls, Calling, ToolCallId, ToolChoice, Tools, calling


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    """`include_usage` adds a last chunk with the usage; `continuous_usage_stats` puts into every other one what it is
    so far."""

    include_usage: bool = False
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


StopString = Annotated[str, Field(min_length=1, max_length=1000)]
MOST_CHOICES = 8  # n
MOST_PROMPTS = 32  # of one request
MOST_TOGETHER = 64  # prompts × n
MOST_ALTERNATIVES = 5  # logprobs of /v1/completions, as OpenAI's API has it


class Sampling(_Body):
    """What both completion routes share. Each parameter that openai-python can send is honoured, or taken where its
    value asks for nothing (`_refuse` lists those), or refused by name; any other is unknown."""

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
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None

    def choices(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1

    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else (self.stop or [])

    def params(self, max_tokens: int, logprobs: bool, grammar: Grammar | None = None) -> GenerationParams:
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
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            grammar=grammar,
        )

    def told(self) -> StreamOptions:
        """What a stream says besides the answer."""
        return self.stream_options or StreamOptions()

    def refuse_unsupported(self) -> None:
        """Raise for what this server cannot do."""
        _refuse("logit_bias", self.logit_bias, (None, {}))
        if self.stream_options is not None:
            _refuse("include_obfuscation", self.stream_options.include_obfuscation, (None, False))
            if not self.stream:
                raise RequestError("stream_options needs stream: true", "stream_options")
            if self.stream_options.continuous_usage_stats and not self.stream_options.include_usage:
                raise RequestError("continuous_usage_stats needs include_usage: true", "continuous_usage_stats")


class TextPart(_Body):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One chat message; content is text, or a list of text parts, and may be missing where an assistant calls tools."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=100)] | None = None
    name: str | None = None
    tool_calls: AssistantToolCalls | None = None
    tool_call_id: ToolCallId | None = None
    # What an answer of ours holds besides, so that a client can send it back as it came.
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None

    def plain(self, param: str) -> dict[str, Any]:
        """For the chat template. Raises `RequestError` for fields that do not go with the role; `param` names the
        message."""
        if self.tool_calls is not None and self.role != "assistant":
            raise RequestError("only a message of the role 'assistant' has tool_calls", f"{param}.tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise RequestError("tool_call_id goes with the role 'tool'", f"{param}.tool_call_id")
        if self.content is None and self.tool_calls is None:
            raise RequestError("the message has no content", f"{param}.content")
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content or ()]
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": "".join(parts)}
        if self.tool_calls is not None:
            found["tool_calls"] = [call.plain(f"{param}.tool_calls.{n}") for n, call in enumerate(self.tool_calls)]
        if self.tool_call_id is not None:
            found["tool_call_id"] = self.tool_call_id
        return found


class JsonSchema(_Body):
    """A schema with a name. It is enforced whether or not `strict` is set; without it any JSON object will do."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = Field(None, max_length=10_000)
    strict: bool | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(_Body):
    """What an answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> Grammar | None:
        """What the engine holds the answer to. Raises `RequestError` for a schema that is missing or out of place."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise RequestError("json_schema goes with the type json_schema, and with no other",
                               "response_format.json_schema")  # fmt: skip
        if self.type == "text":
            return None
        if self.json_schema is None or self.json_schema.schema_ is None:
            return Grammar("ebnf", any_object())
        return Grammar("ebnf", to_grammar(self.json_schema.schema_, "response_format"))


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Any], Field(max_length=128)] | None = None
    function_call: Any = None
    metadata: Metadata | None = None  # labels of stored answers; none is stored
    store: bool | None = None
    safety_identifier: str | None = Field(None, max_length=1000)
    prompt_cache_key: str | None = Field(None, max_length=1000)  # a hint
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    service_tier: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: Annotated[list[str], Field(max_length=10)] | None = None
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None

    def limit(self) -> int | None:
        """The most tokens asked for."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def wants_logprobs(self) -> bool:
        """Whether the tokens are to be given with their log-probabilities."""
        return bool(self.logprobs)

    def grammar(self) -> Grammar | None:
        """What the answer must be."""
        return self.response_format.grammar() if self.response_format else None

    def conversation(self) -> list[dict[str, Any]]:
        """The messages for the chat template. Raises `RequestError` for one whose fields do not fit its role."""
        return [message.plain(f"messages.{index}") for index, message in enumerate(self.messages)]

    def calling(self) -> Calling | None:
        """What tools the answer may call. Raises `RequestError` for a choice that does not fit."""
        found = calling(self.tools, self.tool_choice, self.parallel_tool_calls)
        if found is not None and self.response_format is not None and self.response_format.type != "text":
            raise RequestError("an answer in a response_format calls no tools; give one of them, or tool_choice none",
                               "response_format", "unsupported_parameter")  # fmt: skip
        return found

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
        for index, message in enumerate(self.messages):
            _refuse(f"messages.{index}.name", message.name, (None,))
        if self.top_logprobs:
            known = "the engine knows the log-probability of no token but the one it chose; top_logprobs must be 0"
            raise RequestError(known, "top_logprobs", "unsupported_parameter")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
        if self.ignore_eos and (self.tools or (self.response_format and self.response_format.type != "text")):
            raise RequestError("ignore_eos goes with plain text: what a grammar holds ends when it is complete",
                               "ignore_eos", "unsupported_parameter")  # fmt: skip
        for name, fine in TAKEN.items():
            _refuse(name, getattr(self, name), (None, *fine))


# Values that ask for nothing, or for what this server does anyway; any other is refused by name.
TAKEN: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "store": (False,),
    "prompt_cache_retention": ("in_memory",),
    "prompt_cache_options": (),
    "service_tier": ("auto", "default"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "moderation": (),
    "web_search_options": (),
}


PromptText = Annotated[str, Field(min_length=1)]
# Lists that only a union holds stop at the first fault: a million complaints would hold the server up for seconds.
TokenIds = Annotated[list[int], Field(min_length=1, max_length=1_000_000, fail_fast=True)]
Prompts = Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: PromptText | TokenIds | Annotated[list[PromptText], Prompts] | Annotated[list[TokenIds], Prompts]
    max_tokens: int | None = Field(None, ge=0, le=1_000_000)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    suffix: str | None = None
    best_of: int | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)

    def limit(self) -> int:
        """The most tokens asked for; 16 by default, as in OpenAI's API."""
        return 16 if self.max_tokens is None else self.max_tokens

    def wants_logprobs(self) -> bool:
        """Whether the tokens are to be given with their log-probabilities."""
        return self.logprobs is not None

    def scores_prompt(self) -> bool:
        """Whether the prompt's own tokens are to be scored."""
        return bool(self.echo) and self.logprobs is not None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        _refuse("suffix", self.suffix, (None, ""))
        _refuse("best_of", self.best_of, (None, self.choices()))
        together = len(self.prompts()) * self.choices()
        if together > MOST_TOGETHER:
            raise RequestError(f"prompts times n are {together}; at most {MOST_TOGETHER} are taken", "n")
        if not self.limit() and not self.echo:
            raise RequestError("max_tokens 0 needs echo: true, or there is nothing to answer", "max_tokens")
        if self.logprobs and not self.echo:
            known = "the engine knows the log-probability of no token but the one it chose; give logprobs 0, or echo"
            raise RequestError(known, "logprobs", "unsupported_parameter")


class PredictRequest(_Body):
    """POST /predict."""

    input: Annotated[str, Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float = Field(0.0, ge=0, le=2)
    seed: int | None = Field(None, ge=0, lt=2**31)


MANY = 2048  # inputs of one request, as OpenAI's API has it
Texts = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]


class ClassifyRequest(_Body):
    """POST /predict of a classifier: a text, or several."""

    input: str | Texts

    def inputs(self) -> list[str]:
        """The texts. Raises `RequestError` for none, an empty one, or more than `MANY`."""
        return _some([self.input] if isinstance(self.input, str) else self.input)


class Question(_Body):
    """What to look for, and the text that holds the answer."""

    question: Annotated[str, Field(min_length=1)]
    context: Annotated[str, Field(min_length=1)]


class AnswerRequest(_Body):
    """POST /predict of an extractive question answerer."""

    input: Question | Annotated[list[Question], Field(fail_fast=True)]

    def inputs(self) -> list[Question]:
        """The questions. Raises `RequestError` for none, or more than `MANY`."""
        return _some([self.input] if isinstance(self.input, Question) else self.input)


class EmbeddingsRequest(_Body):
    """POST /v1/embeddings: texts, or token ids of this model, special tokens included."""

    model: str | None = None
    input: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)]
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
