"""The fields of a request: OpenAI's, and ``steering``. The OpenAPI description comes from here.

OpenAI's other fields are refused where they would change the answer, and else accepted
(``NEUTRAL``, ``IDLE``). Unknown fields are ignored and named in a header.
"""

import difflib
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ..generation.grammar import ANY_OBJECT
from ..generation.logits import LogitBias
from ..generation.sampling import Sampling
from ..steering.places import POSITIONS, is_positions
from .faults import bad, excerpt

CHOICES = 8
STOPS = 16
LAYERS = 1024
UNKNOWN = 64  # unknown fields of one request


def _positions(value: str) -> str:
    if not is_positions(value):
        raise PydanticCustomError(
            "positions", "expected one of {expected}", {"expected": ", ".join(POSITIONS)}
        )
    return value


_PATTERN = f"^({'|'.join(POSITIONS[:-1])}|first:[1-9][0-9]{{0,8}})$"
Positions = Annotated[
    str, AfterValidator(_positions), WithJsonSchema({"type": "string", "pattern": _PATTERN})
]
Layer = Annotated[int, Field(ge=0, lt=LAYERS)]
Stop = Annotated[str, Field(max_length=256)]
# fail_fast: a list of a million invalid items costs the time of one
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Layers = Annotated[list[Layer], Field(max_length=LAYERS, fail_fast=True)]
Stops = Annotated[list[Stop], Field(max_length=STOPS, fail_fast=True)]
# -1, as LM Studio and llama.cpp have it, is no limit of the request's own
MaxTokens = Annotated[int, Field(ge=1, le=2**31)] | Literal[-1]
Strength = Annotated[float, Field(allow_inf_nan=False)] | Annotated[str, Field(max_length=64)]


class _Open(BaseModel):
    """An object whose unknown keys are left aside."""

    model_config = ConfigDict(strict=True, extra="allow")


class SteeringField(BaseModel):
    """The field ``steering``; a key left out takes the vector's default."""

    model_config = ConfigDict(strict=True, extra="forbid")
    vector: str | None = Field(None, description="A vector's name, as in /v1/steering.")
    strength: Strength | None = Field(
        None,
        description="Lambda as a number; as text a dose in per cent of the residual stream, or a KL in nats "
        "that the vector's calibration knows (0.1nats). Positive is towards dense.",
        examples=["20%", 1.5],
    )
    layer: Layer | Layers | None = Field(
        None, description="0-based; one, or a list as in `layers`."
    )
    layers: Layers | None = None
    positions: Positions | None = None
    brake: bool | None = Field(None, description="Cut off repetition, and go on at less strength.")
    tool_calls: bool | None = Field(None, description="Steer the text of tool calls too.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        """Refuse an unknown key and name the known ones, which pydantic's message lacks."""
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields:
                raise PydanticCustomError(
                    "unknown_key",
                    "unknown key {key}: expected {expected}",
                    {"key": excerpt(key), "expected": ", ".join(cls.model_fields)},
                )
        return data

    @model_validator(mode="after")
    def _layers_once(self) -> "SteeringField":
        if self.layer is not None and self.layers is not None:
            raise ValueError("expected one of layer and layers")
        return self

    @property
    def chosen_layers(self) -> tuple[int, ...] | None:
        """The layers of ``layer`` or ``layers``; ``None`` where neither names one."""
        named = [self.layer] if isinstance(self.layer, int) else self.layer
        named = self.layers if named is None else named
        return None if named is None else tuple(named)


class TextPart(_Open):
    type: Literal["text"]
    text: str


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Object = dict[str, Any]


class CalledFunction(_Open):
    name: str = Field(max_length=256)  # whatever a model has called
    arguments: str | Object = "{}"


class ToolCallPart(_Open):
    """A tool call in an earlier answer."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] | None = None


class Message(_Open):
    """One message; its content is text. One of role ``tool`` is what a tool returned."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[ToolCallPart], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class FunctionPart(_Open):
    name: Name
    description: str | None = None
    parameters: Object | None = Field(None, description="JSON Schema of an object.")
    strict: bool | None = None


class ToolPart(_Open):
    type: Literal["function"]
    function: FunctionPart


class NamedTool(_Open):
    type: Literal["function"]
    function: CalledFunction


class JsonSchemaPart(_Open):
    json_schema: Object | None = Field(None, alias="schema")


class ResponseFormat(_Open):
    """Text, any JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchemaPart | None = None
    object_schema: Object | None = Field(None, alias="schema", description="As llama.cpp has it.")

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.schema_of_answer is None:
            raise ValueError('expected a schema in json_schema: {"name": ..., "schema": {...}}')
        return self

    @property
    def schema_of_answer(self) -> Object | None:
        """The JSON schema that the answer has to match; ``None`` for text."""
        if self.type == "json_schema":
            return self.json_schema and self.json_schema.json_schema
        return (self.object_schema or ANY_OBJECT) if self.type == "json_object" else None


class StreamOptions(_Open):
    include_usage: bool | None = None


class CompletionFields(_Open):
    """The fields of both kinds of request."""

    model: str | None = Field(None, description="A name as in /v1/models, or NAME@VECTOR=STRENGTH.")
    steering: SteeringField | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: MaxTokens | None = Field(
        None, description="-1 and none: as many as the server allows."
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy, the default.")
    top_p: float | None = Field(None, ge=0, le=1, description="0 leaves the likeliest token alone.")
    n: int | None = Field(None, ge=1, le=CHOICES)
    stop: Stop | Stops | None = Field(None, description="Empty texts are ignored.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[TokenKey, Bias] | None = Field(
        None, max_length=1024, description="Numbers for logits, by token id."
    )

    @property
    def stops(self) -> tuple[str, ...]:
        given = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return tuple(filter(None, given))

    @property
    def limit(self) -> int | None:
        """The most tokens that the request asks for; ``None``: it leaves that to the server."""
        return None if self.max_tokens == -1 else self.max_tokens

    @property
    def sampling(self) -> Sampling:
        """How to choose tokens: greedily, unless a temperature is given."""
        temperature = 0.0 if self.top_p == 0 else self.temperature or 0.0
        top_p = 1.0 if not self.top_p else self.top_p
        return Sampling(temperature, top_p, None if self.seed is None else self.seed % 2**64)

    @property
    def bias(self) -> LogitBias | None:
        """What to add to logits; ``None`` for nothing."""
        tokens = {int(token): value for token, value in (self.logit_bias or {}).items() if value}
        found = LogitBias(self.presence_penalty or 0.0, self.frequency_penalty or 0.0, tokens)
        return None if found == LogitBias() else found

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(CompletionFields):
    """A request for a chat's next answer.

    ``reasoning_effort`` and ``thinking_budget`` are of models that think; of others they are ignored.
    """

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    reasoning_effort: str | None = Field(None, max_length=64, description="low, medium or high.")
    thinking_budget: int | None = Field(
        None,
        ge=1,
        le=2**30,
        description="Tokens of thought, then steered more; without a vector, cut.",
    )
    thinking_budget_hard: bool | None = Field(None, description="Cut the thought by force.")
    tools: Annotated[list[ToolPart], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: one call an answer.")
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> "ChatRequest":
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        names = [tool.function.name for tool in self.tools or ()]
        if len({*names}) < len(names):
            raise ValueError("tools: expected each name once")
        if (named is not None and named not in names) or (
            self.tool_choice == "required" and not names
        ):
            raise ValueError("tool_choice: expected one of the request's tools")
        if len({self.max_tokens, self.max_completion_tokens} - {None, -1}) > 1:
            raise ValueError("expected one of max_tokens and max_completion_tokens")
        return self

    @property
    def offered(self) -> list[ToolPart]:
        """The tools that the answer may call."""
        if self.tool_choice == "none":
            return []
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return [tool for tool in self.tools or () if tool.function.name == name]
        return self.tools or []

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def limit(self) -> int | None:
        found = {self.max_completion_tokens, self.max_tokens} - {None, -1}
        return next(iter(found), None)

    @property
    def alternatives(self) -> int | None:
        """How many likeliest tokens to return at each place; ``None``: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, max_length=CHOICES, fail_fast=True)]
SeveralIds = Annotated[list[TokenIds], Field(min_length=1, max_length=CHOICES, fail_fast=True)]


class CompletionRequest(CompletionFields):
    prompt: str | TokenIds | Texts | SeveralIds
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = Field(None, description="Begin with the prompt, and its log-probabilities.")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return self.prompt if several else [self.prompt]

    @property
    def alternatives(self) -> int | None:
        """As in ``ChatRequest``."""
        return self.logprobs


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of a response that is an error."""

    error: ErrorDetail


# OpenAI's fields that are not supported, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "tools": ([],),  # of /v1/completions, as the next two
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"}, {}),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "suffix": ("",),
    "best_of": (1,),
}
NOT_IN_MESSAGES = ("function_call", "audio")
# Fields that cannot change an answer here.
IDLE = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "prompt_cache_key",
    "safety_identifier",
    "prompt_cache_retention",
    "verbosity",
}


def check_extra(request: CompletionFields) -> list[str]:
    """Return the names of the unknown fields, which are ignored; those of messages as ``messages.NAME``.

    Raises:
        Fault: an unsupported field that asks for something, a misspelt one, or a key of
            ``steering`` outside of it.
    """
    extra = request.model_extra or {}
    if len(extra) > UNKNOWN:
        raise bad(f"{len(extra)} unknown fields: expected at most {UNKNOWN}.")
    known = [*type(request).model_fields, *NEUTRAL]
    ignored = []
    for name, value in extra.items():
        if name in NEUTRAL:
            _check_neutral(name, value, NEUTRAL[name], name)
        elif name in SteeringField.model_fields:
            raise bad(f'`{name}` belongs in `steering`: {{"steering": {{"{name}": ...}}}}.', name)
        elif name not in IDLE:
            near = difflib.get_close_matches(name[:64], known, n=1, cutoff=0.85)
            if near:
                raise bad(f"unknown field {excerpt(name)}: did you mean `{near[0]}`?", name[:64])
            ignored.append(name)
    in_messages: dict[str, None] = {}  # each name once, in their order
    for number, message in enumerate(request.messages if isinstance(request, ChatRequest) else ()):
        for name, value in (message.model_extra or {}).items():
            if name in NOT_IN_MESSAGES:
                _check_neutral(name, value, (), f"messages[{number}].{name}")
            elif value is not None and len(in_messages) < UNKNOWN:
                in_messages[f"messages.{name}"] = None
    return [*ignored, *in_messages]


def _check_neutral(name: str, value: object, neutral: tuple[object, ...], where: str) -> None:
    """Raise unless the value of an unsupported field asks for nothing."""
    if value is not None and value not in neutral:
        place = "" if where == name else f" ({where})"
        raise bad(
            f"`{name}`{place} is not supported by this server; leave it out.", where, "unsupported"
        )
