"""What a request may say: OpenAI's fields and ours. The OpenAPI description is made of these.

A field of OpenAI's that changes the answer and that we do not have is refused; one that means
nothing here is accepted (``NEUTRAL``). Fields that nobody knows are left aside and named in a header.
"""

import difflib
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .faults import bad, excerpt

CHOICES = 8
STOPS = 16
LAYERS = 1024
STRENGTH = 1e9  # at most, either way
UNKNOWN = 64  # fields that nobody knows

Layer = Annotated[int, Field(ge=0, lt=LAYERS)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-STRENGTH, le=STRENGTH)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
# fail_fast: a body of a million wrong things is told one of them, and holds up nobody.
Layers = Annotated[list[Layer], Field(max_length=LAYERS, fail_fast=True)]
Stops = Annotated[list[Stop], Field(fail_fast=True)]


class Strict(BaseModel):
    """An object of which every key is known."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        """Refuse an unknown key with those that there are, where pydantic only refuses it."""
        unknown = (
            [key for key in data if key not in cls.model_fields] if isinstance(data, dict) else []
        )
        if unknown:
            raise PydanticCustomError(
                "unknown_key", "unknown key {key}: expected {expected}",
                {"key": excerpt(unknown[0]), "expected": ", ".join(cls.model_fields)},
            )  # fmt: skip
        return data


class SteeringField(Strict):
    """Our field `steering`; what is left out is the vector's default."""

    vector: str | None = Field(None, description="Name of a vector, see /v1/steering.")
    strength: Number | None = Field(None, description="Lambda; positive is towards dense.")
    layer: Layer | Layers | None = Field(None, description="0-based.")
    layers: Layers | None = None
    positions: Literal["all", "generated", "prompt"] | None = None
    relative: bool = Field(
        False, description="Strength is a fraction of the residual stream's mean norm."
    )

    @model_validator(mode="after")
    def _once(self) -> "SteeringField":
        if self.layer is not None and self.layers is not None:
            raise ValueError("expected one of layer and layers")
        return self

    @property
    def chosen(self) -> tuple[int, ...] | None:
        return _layers(self.layer, self.layers)


class Apply(Strict):
    prompt: Literal["all", "none"] | None = "all"
    generation: Literal["all", "none"] | None = "all"


class EasySteerVector(Strict):
    """One vector in EasySteer's schema, for plain addition."""

    source: str
    algorithm: str | None = None
    scale: Number = 1.0
    layers: Layers | None = None
    target_layers: Layers | None = None
    normalize: bool = False
    apply: Apply = Apply()

    @property
    def chosen(self) -> tuple[int, ...] | None:
        return _layers(None, self.layers or self.target_layers)


class EasySteer(Strict):
    """EasySteer's field `steering`."""

    vectors: list[EasySteerVector] = Field(min_length=1, max_length=8)


AnySteering = Annotated[
    Annotated[SteeringField, Tag("ours")] | Annotated[EasySteer, Tag("easysteer")],
    Discriminator(
        lambda v: (
            "easysteer" if isinstance(v, EasySteer | dict) and "vectors" in dict(v) else "ours"
        )
    ),
]


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message; its content is text."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    include_usage: bool | None = None


class Completing(BaseModel):
    """What both kinds of request share."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str | None = Field(None, description="As in /v1/models, or NAME@VECTOR=STRENGTH.")
    steering: AnySteering | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float | None = Field(None, ge=0, le=2, description="Default 0, greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=CHOICES)
    stop: Stop | Stops | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)

    @field_validator("stop")
    @classmethod
    def _few(cls, stop: Any) -> Any:
        if isinstance(stop, list) and len(stop) > STOPS:
            raise ValueError(f"expected at most {STOPS} stop texts")
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Completing):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("expected one of max_tokens and max_completion_tokens")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


class CompletionRequest(Completing):
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=CHOICES, fail_fast=True)]
    )
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


# OpenAI's fields that we do not have, and the values that ask for nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
}
# Fields that cannot change an answer here.
IDLE = {
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key",
    "safety_identifier", "prompt_cache_retention", "verbosity", "reasoning_effort",
}  # fmt: skip


# What belongs in `steering`: beside it, it would silently do nothing.
OURS = {*SteeringField.model_fields, *EasySteer.model_fields, *EasySteerVector.model_fields}


def check_extra(request: Completing) -> list[str]:
    """Return the fields that are left aside because nobody knows them.

    Raises:
        Fault: a field that we do not have and that asks for something, or a slip of the pen.
    """
    ignored = []
    if len(request.model_extra or {}) > UNKNOWN:
        raise bad(f"{len(request.model_extra or {})} unknown fields: expected at most {UNKNOWN}.")
    known = [*type(request).model_fields, *NEUTRAL]
    for name, value in (request.model_extra or {}).items():
        if name in NEUTRAL:
            if value is not None and value not in NEUTRAL[name]:
                raise bad(
                    f"`{name}` is not supported by this server; leave it out.", name, "unsupported"
                )
        elif name in OURS:
            raise bad(f'`{name}` belongs in `steering`: {{"steering": {{"{name}": ...}}}}.', name)
        elif name not in IDLE:
            near = difflib.get_close_matches(name[:64], known, n=1, cutoff=0.85)
            if near:
                raise bad(f"unknown field {excerpt(name)}: did you mean `{near[0]}`?", name[:64])
            ignored.append(name)
    return ignored


def _layers(one: int | list[int] | None, several: list[int] | None) -> tuple[int, ...] | None:
    named = several if one is None else one if isinstance(one, list) else [one]
    return tuple(sorted(set(named))) if named else None
