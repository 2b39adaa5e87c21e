"""Encode messages and text as token ids, and compile what their answers have to match."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from ..errors import ContextError, InputError, ModelError
from ..files import parse_json
from ..generation.calls import CallReader
from ..generation.grammar import (
    ANY_OBJECT,
    Grammar,
    Tool,
    calls_are_json,
    can_constrain,
    json_grammar,
)
from ..generation.logits import LogitBias
from ..model.marks import marks_of
from ..model.model import Model
from ..model.prompt import decode, encode_chat, render_chat
from .faults import bad
from .schema import ChatRequest, CompletionRequest, Message, ToolCallPart

log = logging.getLogger(__name__)


class Encoder:
    """Encodes on threads of its own, so that a long prompt blocks neither the loop nor the model."""

    def __init__(self, model: Model):
        self._model, self._tokenizer = model, model.tokenizer
        self._vocabulary = model.vocabulary
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoding")
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="schemas")  # takes longer

    async def encode(self, request: ChatRequest | CompletionRequest) -> "Encoded":
        """Return the token ids of each prompt of a request, and what constrains its answers.

        Raises:
            Fault: an empty prompt, one that is too long, an unknown token id, or a schema that cannot be enforced.
        """
        loop = asyncio.get_running_loop()
        encoded = await loop.run_in_executor(self._thread, self._encode, request)
        if isinstance(request, ChatRequest) and (encoded.tools or request.response_format):
            grammar = await loop.run_in_executor(self._compiler, self._grammar, request)
            encoded = replace(encoded, grammar=grammar)
        return encoded

    def close(self) -> None:
        for thread in (self._thread, self._compiler):
            thread.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def knows_calls(self) -> bool:
        """Whether the model's marks tell where a tool call is, so that its text can be left unsteered."""
        try:
            return bool(marks_of(self._model.network).call)
        except ModelError:
            return False

    @property
    def call_ends(self) -> tuple[str, ...]:
        """The text that ends a tool call; empty for a model whose calls have none."""
        return tuple(filter(None, [self._tokenizer.tool_call_end]))

    def texts(self, encoded: "Encoded") -> list[str]:
        """Return the prompts as text."""
        return [decode(self._tokenizer, prompt) for prompt in encoded.prompts]

    def call_reader(self, encoded: "Encoded") -> Callable[[], CallReader]:
        """Return what makes a reader of the tool calls in one answer."""
        options = {"several": encoded.several, "bare": not encoded.in_json}
        return partial(CallReader, self._tokenizer, encoded.tools, **options)

    def _encode(self, request: ChatRequest | CompletionRequest) -> "Encoded":
        bias = request.bias
        if bias is not None:
            with _refused("logit_bias"):
                bias.check(self._vocabulary)
        if isinstance(request, ChatRequest):
            tools = self._tools(request)
            prompt = self._check(self._chat(request.messages, tools), "messages")
            several = request.parallel_tool_calls is not False
            return Encoded([prompt], tools, bias=bias, several=several)
        return Encoded([self._prompt(one) for one in request.prompts], bias=bias)

    def _tools(self, request: ChatRequest) -> list[dict[str, object]]:
        """Return the tools that the answer may call, for the chat template."""
        talks = any(one.tool_calls or one.role == "tool" for one in request.messages)
        if (talks or request.must_call) and not self._tokenizer.has_tool_calling:
            where = "messages" if talks else "tool_choice"
            raise bad("this model's chat template knows no tools.", where, "unsupported")
        if not self._tokenizer.has_tool_calling:
            return []
        return [
            {"type": "function", "function": one.function.model_dump(exclude_none=True)}
            for one in request.offered
        ]

    def _grammar(self, request: ChatRequest) -> Grammar | None:
        """Return what the answers have to match; calls are constrained wherever that is possible."""
        form = request.response_format
        schema = form and form.schema_of_answer
        tools = request.offered if calls_are_json(self._model) else []
        strict = [one.function.name for one in request.offered if one.function.strict]
        forced = request.must_call or bool(strict)
        if forced and not tools:
            what = f"the tool {strict[0]} is strict, which" if strict else "a call"
            param = "tools" if strict else "tool_choice"
            raise bad(
                f"{what} cannot be enforced: this model's calls are no JSON.", param, "unsupported"
            )
        if schema is None and not (tools and (forced or can_constrain())):
            return None
        described = [
            Tool(
                one.function.name, one.function.parameters or ANY_OBJECT, bool(one.function.strict)
            )
            for one in tools
        ]
        try:
            return json_grammar(self._model, schema, described, call_first=request.must_call)
        except InputError as error:
            if schema is None and not forced:  # then calls are read as they come
                log.warning(
                    "a request's tool calls are not constrained: their grammar cannot be compiled"
                )
                return None
            raise bad(str(error), "tools" if schema is None else "response_format") from error

    def _prompt(self, prompt: str | list[int]) -> list[int]:
        """Return the token ids of one text or of one list of token ids."""
        if isinstance(prompt, str):
            with _refused("prompt"):
                self._model.check_length(prompt)
            return self._check(self._tokenizer.encode(prompt) if prompt else [], "prompt")
        if max(prompt) >= self._vocabulary:
            raise bad(f"a token id is too large: expected less than {self._vocabulary}.", "prompt")
        return self._check(list(prompt), "prompt")

    def _chat(self, messages: Sequence[Message], tools: list[dict[str, object]]) -> list[int]:
        if not self._tokenizer.has_chat_template:
            raise bad("this model has no chat template: use /v1/completions.", "messages")
        if not any(one.role == "user" and one.text.strip() for one in messages):
            raise bad("no message of the user has text: expected at least one.", "messages")
        options = {"tools": tools} if tools else {}
        with _refused("messages"):
            self._model.check_length(*(one.text for one in messages))
            text = render_chat(self._tokenizer, [*map(_plain, messages)], **options)
            return encode_chat(self._tokenizer, text)

    def _check(self, tokens: list[int], param: str) -> list[int]:
        if not tokens:
            raise bad("the prompt is empty: expected at least one token.", param)
        with _refused(param):
            self._model.room(len(tokens), 1)
        return tokens


@dataclass(frozen=True)
class Encoded:
    """What a request asks the model: prompts, the tools it may call, and what changes the logits."""

    prompts: list[list[int]]
    tools: list[dict[str, object]] = field(default_factory=list)
    grammar: Grammar | None = None
    bias: LogitBias | None = None
    several: bool = True  # calls in one answer

    @property
    def in_json(self) -> bool:
        """Whether the answers have to match a schema."""
        return self.grammar is not None and self.grammar.answer is not None


@contextlib.contextmanager
def _refused(param: str) -> Iterator[None]:
    """Refuse a request for what the library says of its field ``param``."""
    try:
        yield
    except InputError as error:
        code = "context_length_exceeded" if isinstance(error, ContextError) else None
        raise bad(str(error), param, code) from error


def _plain(message: Message) -> dict[str, object]:
    """Return a message as chat templates expect it."""
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, object] = {"role": role, "content": message.text}
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "type": "function",
                "id": one.id or "",
                "function": {"name": one.function.name, "arguments": _arguments(one)},
            }
            for one in message.tool_calls
        ]
    return plain


def _arguments(call: ToolCallPart) -> object:
    """Return the arguments as templates expect them; text that is no JSON stays as it is."""
    arguments = call.function.arguments
    if isinstance(arguments, str):
        with contextlib.suppress(InputError):
            return parse_json(arguments, "arguments")
    return arguments
