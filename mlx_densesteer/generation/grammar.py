"""Answers that match a JSON schema: the tokens that the schema excludes cannot be chosen.

llguidance (github.com/guidance-ai/llguidance) tells which tokens may follow. Its mask is applied with
operations that every device has. To know the last token, a step waits for it, once for each row.

JSON is written on one line, with a blank after commas and colons. A model that may write any blanks sometimes
writes nothing else, and such JSON has fewer tokens.
"""

import json
import logging
import re
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import InputError, install_command
from ..model.marks import call_marks
from ..model.model import Model
from ..text import one_line
from .thought import LogitsProcessor, Parting

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

log = logging.getLogger(__name__)

# Of llguidance. A keyword that it cannot enforce is an error (not ``lenient``).
OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}
ANY_OBJECT = {"type": "object"}
SECONDS = 5  # to compile a schema
KNOWN = 1000  # schemas that are not compiled again to find out what is wrong with them
# On a thread with less stack than any that compiles later: a long chain of references takes some at each link.
_CHECK = """
import json, sys, threading
from llguidance import LLMatcher

def check():
    found = (LLMatcher.validate_grammar_with_warnings(one) for one in json.load(sys.stdin))
    print(json.dumps([messages[0] if failed else "" for failed, messages in found]))

threading.stack_size(2**20)
thread = threading.Thread(target=check)
thread.start()
thread.join()
"""
_TOO_HARD = f"is too large or too intricate: it does not compile in {SECONDS} seconds. Simplify it."
_known_faults: dict[str, str] = {}  # by grammar
MATCHERS = 64  # of each model, kept compiled


class _Vocabulary(NamedTuple):
    """A model's vocabulary for llguidance, and matchers by their rules."""

    tokens: "LLTokenizer"
    matchers: "OrderedDict[str, LLMatcher]"


_vocabularies: "WeakKeyDictionary[Model, _Vocabulary]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    Args:
        parameters: the JSON schema of its arguments, an object.
        strict: a schema that cannot be enforced is an error.
    """

    name: str
    parameters: Mapping[str, object] = field(default_factory=lambda: ANY_OBJECT)
    strict: bool = False


@dataclass(frozen=True)
class Grammar:
    """What an answer has to match, and the tool calls in it; of one model. A thought is free.

    Args:
        answer: the matcher's state at the beginning of an answer; it is copied, not changed. ``None``: text.
        call: likewise of a tool call, between the tokens ``opens`` and ``closes``. ``None``: anything.
        call_first: the answer begins with a call.
    """

    model: Model
    answer: "LLMatcher | None" = None
    call: "LLMatcher | None" = None
    opens: tuple[int, ...] = ()
    closes: tuple[int, ...] = ()
    call_first: bool = False

    def processor(self, answer: Sequence[int], *, opened: bool, skip: int) -> LogitsProcessor:
        """Return a logits processor of mlx-lm for one answer.

        Args:
            answer: tokens of the answer that the processor is not given, before those that it is.
            opened: whether the prompt opens the thought.
            skip: how many tokens it is given that precede the answer.
        """
        return _Matching(self, answer, opened, skip)


def json_grammar(
    model: Model,
    schema: Mapping[str, object] | None = None,
    tools: Sequence[Tool] = (),
    *,
    call_first: bool = False,
) -> Grammar:
    """Return the grammar of an answer in JSON, or of one that may call tools.

    A tool whose parameters cannot be enforced may be called with any object, unless it is ``strict``.

    Args:
        schema: of the answer, JSON Schema; ``None``: it is text.
        tools: for a model whose calls are JSON (``calls_are_json``).
        call_first: the answer begins with a call.

    Raises:
        InputError: a schema is wrong, or uses a keyword that cannot be enforced, which the message names; tools of
            another model; or the extra ``json`` is not installed.
    """
    if tools and not calls_are_json(model):
        raise InputError("this model's tool calls are no JSON: they cannot be constrained.")
    answer = call = None
    opens, closes = call_marks(model.tokenizer)
    if schema is not None and tools and len(opens) != 1:
        raise InputError(
            "this model marks a tool call with several tokens: expected tools or a JSON schema, not both."
        )
    if schema is not None:
        check_schema(schema)
        answer = _matcher(model, f"start: %json {_with_options(schema)}")
    if tools:
        rules, names = [], [f"call{number}" for number in range(len(tools))]
        objects = [ANY_OBJECT | dict(tool.parameters) for tool in tools]  # where no type is given
        faults = _faults(objects)
        for name, tool, parameters, fault in zip(names, tools, objects, faults, strict=True):
            if fault and tool.strict:
                raise InputError(f"the parameters of the tool {tool.name}: {fault}")
            begin = f'{{"name": {json.dumps(tool.name)}, "arguments": '
            rules.append(f'{name}: {json.dumps(begin)} of_{name} "}}"')
            rules.append(f"of_{name}: %json {_with_options(ANY_OBJECT if fault else parameters)}")
        start = f'start: "\\n" ( {" | ".join(names)} ) "\\n"'
        call = _matcher(model, "\n".join([start, *rules]))
    return Grammar(model, answer, call, opens, closes, call_first)


def can_constrain() -> bool:
    """Tell whether the extra ``json`` is installed."""
    return find_spec("llguidance") is not None


def calls_are_json(model: Model) -> bool:
    """Tell whether the model's tool calls are JSON between two marks, as Qwen2.5's are."""
    from mlx_lm.tool_parsers import json_tools

    tokenizer = model.tokenizer
    return tokenizer.has_tool_calling and tokenizer.tool_parser is json_tools.parse_tool_call


def check_schema(schema: object, what: str = "the JSON schema") -> None:
    """Raise ``InputError`` if a schema cannot be enforced; needs no model. ``what`` is its name for the message."""
    if not isinstance(schema, Mapping):
        raise InputError(f"{what}: expected a JSON Schema, which is an object.")
    if fault := _faults([schema])[0]:
        raise InputError(f"{what} {fault}")


def _faults(schemas: Sequence[Mapping[str, object]]) -> list[str]:
    """Return what is wrong with each schema, "" for nothing.

    A schema may be a puzzle: a few patterns that all have to match take for ever. So another process compiles
    new ones first, and is ended after ``SECONDS``. What took too long is not remembered.
    """
    rules = [f"start: %json {_with_options(one)}" for one in schemas]
    found = {one: _known_faults[one] for one in rules if one in _known_faults}
    unknown = [one for one in dict.fromkeys(rules) if one not in found]
    new = _compile(unknown)
    if new is None and len(unknown) > 1:  # one of them is to blame
        deadline = time.monotonic() + 2 * SECONDS
        for one in unknown:
            alone = _compile([one]) if time.monotonic() < deadline else None
            found[one] = _TOO_HARD if alone is None else alone[0]
    elif new is None:
        found[unknown[0]] = _TOO_HARD
    else:
        found |= dict(zip(unknown, new, strict=True))
    for one in rules:
        if found[one] != _TOO_HARD:
            _known_faults[one] = found[one]
    while len(_known_faults) > KNOWN:
        _known_faults.pop(next(iter(_known_faults)), None)
    return [found[one] for one in rules]


def _compile(rules: Sequence[str]) -> list[str] | None:
    """Compile grammars in another process; return what is wrong with each, ``None`` if it did not end well."""
    if not rules:
        return []
    try:
        done = subprocess.run(
            # not from the current folder, where any file may have a module's name
            [sys.executable, "-P", "-c", _CHECK],
            input=json.dumps(rules), capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        return None
    return [one and _reason(one) for one in json.loads(done.stdout)]


def _reason(message: str) -> str:
    text = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", message)
    first, *rest = text.split("\n")
    first = first.partition(" Enable '")[0]  # an option that nobody can set here
    more = next((line for line in rest if line.startswith("error: ")), "")
    return (
        f"cannot be enforced: {one_line(f'{first} {more}', 200).rstrip('. ')}. Expected JSON Schema, with the "
        "keywords that llguidance knows."
    )


class _Matching:
    """Masks the logits of one answer; a logits processor.

    It reads all tokens at each call, so it follows a draft's tokens that are taken back.
    """

    def __init__(self, grammar: Grammar, answer: Sequence[int], opened: bool, skip: int):
        self._grammar, self._before, self._opened, self._skip = grammar, [*answer], opened, skip
        self.failed = False  # it could not go on, and ended the answer
        self._ends = _ends(grammar.model)
        self._bits = np.empty((1, -(-grammar.model.vocabulary // 32)), np.int32)
        self._start()

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        # Enqueue the token before the logits: the device computes the logits while Python waits for the token.
        read = tokens[self._skip :]
        mx.async_eval(read)
        mx.async_eval(logits)
        answer = self._before + read.tolist()
        if answer[: len(self._read)] != self._read:
            self._start()
        for token in answer[len(self._read) :]:
            self._feed(token)
        allowed = self._allowed()
        if allowed is None:
            return logits
        mask = np.zeros(logits.shape[-1], bool)
        mask[: len(allowed)] = allowed[: len(mask)]
        return mx.where(mx.array(mask), logits, mx.array(-mx.inf, logits.dtype))

    def _start(self) -> None:
        grammar = self._grammar
        self._read: list[int] = []
        self._parting = Parting(grammar.model.tokenizer, self._opened)
        self._matcher = grammar.answer and grammar.answer.deep_copy()
        self._in_call = self._called = self._begun = False
        self._forced = [*grammar.opens] if grammar.call_first else []  # what has to come next

    def _feed(self, token: int) -> None:
        self._read.append(token)
        inside = self._parting.open
        self._parting.add(token, 0)
        if inside or self._parting.open:
            return
        grammar = self._grammar
        if self._forced:
            del self._forced[0]
        if not self._in_call and self._may_call and self._ends_with(grammar.opens):
            self._matcher, self._in_call, self._called = grammar.call.deep_copy(), True, True
            return
        self._begun = True
        if self._matcher is None or self._matcher.is_stopped():
            return
        if self._matcher.consume_token(token) and self._in_call and self._matcher.is_stopped():
            self._matcher, self._in_call, self._forced = None, False, [*grammar.closes]

    @property
    def _may_call(self) -> bool:
        """Whether a call may begin here: in text, before an answer in JSON, and after another call."""
        grammar = self._grammar
        if grammar.call is None:
            return False
        return grammar.answer is None or self._called or not self._begun

    def _ends_with(self, mark: tuple[int, ...]) -> bool:
        return tuple(self._read[-len(mark) :]) == mark

    def _allowed(self) -> np.ndarray | None:
        """Return which tokens may follow, bool ``(vocabulary,)``; ``None`` for all."""
        grammar = self._grammar
        if self._parting.open or (self._read and self._read[-1] in self._ends):
            return None
        if self._forced:
            allowed = self._only([self._forced[0]])
        elif self._matcher is not None:
            allowed = self._matching()
        elif grammar.answer is None:
            return None
        else:  # after a call
            allowed = self._only(self._ends)
        if not self._in_call and not self._forced and self._may_call:
            allowed[grammar.opens[0]] = True
        marks = self._parting.opens
        if not self._read and len(marks) == 1:  # a model that thinks may do so first
            allowed[marks[0]] = True
        return allowed

    def _matching(self) -> np.ndarray:
        """Return what the matcher allows; only the end, if it failed."""
        from llguidance.numpy import fill_next_token_bitmask

        if not self._matcher.is_error():
            fill_next_token_bitmask(self._matcher, self._bits)
            allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little").astype(bool)
            if allowed.any() and not self._matcher.is_error():
                return allowed
        if not self.failed:
            log.warning("a grammar cannot go on: %s", self._matcher.stop_reason())
            self.failed = True
        return self._only(self._ends)

    def _only(self, tokens: Sequence[int]) -> np.ndarray:
        allowed = np.zeros(self._grammar.model.vocabulary, bool)
        allowed[tokens] = True
        return allowed


def _with_options(schema: Mapping[str, object]) -> str:
    return json.dumps({**schema, "x-guidance": OPTIONS})


def _matcher(model: Model, rules: str) -> "LLMatcher":
    engine, vocabulary = _engine(), _vocabulary(model)
    if (known := vocabulary.matchers.get(rules)) is not None:
        return known
    text = engine.LLMatcher.grammar_from_lark(rules)
    quiet = engine.LLParserLimits(verbose_errors=False)  # else a log would show the answer
    matcher = engine.LLMatcher(vocabulary.tokens, text, log_level=0, limits=quiet)
    if matcher.is_error():  # each schema was checked, so perhaps too large
        reason = one_line(matcher.get_error(), 200)
        raise InputError(f"the JSON schema cannot be enforced: {reason}. Simplify it.")
    vocabulary.matchers[rules] = matcher
    if len(vocabulary.matchers) > MATCHERS:
        vocabulary.matchers.popitem(last=False)
    return matcher


def _vocabulary(model: Model) -> _Vocabulary:
    """Return the model's vocabulary for llguidance, which takes seconds to make."""
    if model not in _vocabularies:
        engine = _engine().LLTokenizer
        try:
            made = engine(
                _without_names(model.tokenizer),
                n_vocab=model.vocabulary,
                eos_token=_ends(model),
                slices=engine.json_slices(),
            )
        except ValueError as error:
            raise InputError(
                f"answers of this model cannot be made to match a JSON schema: its tokenizer is not one "
                f"that llguidance reads ({one_line(error, 200)})."
            ) from error
        _vocabularies[model] = _Vocabulary(made, OrderedDict())
    return _vocabularies[model]


def _without_names(tokenizer: TokenizerWrapper) -> str:
    """Return a fast tokenizer as JSON, in which no text is an added token.

    llguidance would write the text of a control token, where a schema demands it, as that token.

    Raises:
        ValueError: it is not a fast tokenizer.
    """
    if not tokenizer.is_fast:
        raise ValueError("it is no fast tokenizer")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts |= {"post_processor": None, "padding": None, "truncation": None}
    vocabulary = parts["model"]["vocab"]
    for token in parts["added_tokens"]:
        name = f"\ue000{token['id']}\ue000"  # private use
        if isinstance(vocabulary, dict) and token["content"] in vocabulary:
            vocabulary[name] = vocabulary.pop(token["content"])
        elif isinstance(vocabulary, list) and token["id"] < len(vocabulary):
            vocabulary[token["id"]][0] = name
        token |= {"content": name, "special": True}  # special: not part of any text
    return json.dumps(parts)


def _ends(model: Model) -> list[int]:
    """Return the tokens that end an answer in the chat template."""
    ends = {*model.tokenizer.eos_token_ids, model.end_of_turn} - {None}
    return sorted(end for end in ends if end < model.vocabulary)


def _engine():
    try:
        import llguidance
    except ImportError as error:
        raise InputError(
            f"answers that match a JSON schema need the package llguidance: {install_command('json')}"
        ) from error
    return llguidance
