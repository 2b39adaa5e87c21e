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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from ..errors import InputError, install_command
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
_CHECK = """
import json, sys
from llguidance import LLMatcher
check = lambda text: LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_lark(text))
found = {what: check(text) for what, text in json.load(sys.stdin).items()}
print(json.dumps({what: messages[0] if failed else "" for what, (failed, messages) in found.items()}))
"""
_checked: set[str] = set()  # grammars that can be compiled
_vocabularies: "WeakKeyDictionary[Model, LLTokenizer]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Tool:
    """A function that a model may call; ``parameters`` is the JSON schema of its arguments, an object."""

    name: str
    parameters: Mapping[str, object] = field(default_factory=lambda: ANY_OBJECT)


@dataclass(frozen=True)
class Grammar:
    """What an answer, or each tool call in it, has to match; of one model.

    A thought is free. Without ``opens`` the rest of the answer is constrained, from its first token on. With
    ``opens`` what follows those tokens is, and then come ``closes``.

    Args:
        start: the matcher's state at the beginning; it is copied, not changed.
        opens, closes: the tokens around a tool call.
        at_once: the answer, after a thought, begins with ``opens``.
    """

    model: Model
    start: "LLMatcher"
    opens: tuple[int, ...] = ()
    closes: tuple[int, ...] = ()
    at_once: bool = False

    def processor(self, answer: Sequence[int], *, opened: bool, skip: int) -> LogitsProcessor:
        """Return a logits processor of mlx-lm for one answer.

        Args:
            answer: tokens of the answer that the processor is not given, before those that it is.
            opened: whether the prompt opens the thought.
            skip: how many tokens it is given that precede the answer.
        """
        return _Matching(self, answer, opened, skip)


def json_grammar(model: Model, schema: Mapping[str, object]) -> Grammar:
    """Return the grammar of JSON that a schema admits.

    Raises:
        InputError: the schema is wrong, or uses a keyword that cannot be enforced, which the message names; or the
            extra ``json`` is not installed.
    """
    check_schemas({"the JSON schema": schema})
    return _grammar(model, f"start: %json {_with_options(schema)}")


def check_schemas(schemas: Mapping[str, Mapping[str, object]]) -> None:
    """Raise ``InputError`` for the first schema that cannot be enforced; needs no model.

    A schema may be a puzzle: a few patterns that all have to match take for ever. So another process compiles
    it first, which ends after ``SECONDS``.

    Args:
        schemas: by what a message calls them.
    """
    _engine()
    for what, one in schemas.items():
        if not isinstance(one, Mapping):
            raise InputError(f"{what}: expected a JSON Schema, which is an object.")
    grammars = {what: f"start: %json {_with_options(one)}" for what, one in schemas.items()}
    unknown = {what: one for what, one in grammars.items() if one not in _checked}
    if not unknown:
        return
    command = [sys.executable, "-c", _CHECK]
    try:
        done = subprocess.run(
            command, input=json.dumps(unknown), capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{next(iter(unknown))} takes more than {SECONDS} seconds to compile. Simplify it."
        ) from None
    if done.returncode:
        raise InputError(f"{next(iter(unknown))} cannot be compiled. Simplify it.")
    for what, wrong in json.loads(done.stdout).items():
        if wrong:
            reason = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", wrong)
            reason = one_line(reason.partition("\n")[0], 200)
            raise InputError(
                f"{what} cannot be enforced: {reason}. Expected JSON Schema, with the keywords that "
                "llguidance knows."
            )
    if len(_checked) > 1000:
        _checked.clear()
    _checked.update(unknown.values())


def call_grammar(model: Model, tools: Sequence[Tool], *, at_once: bool = False) -> Grammar:
    """Return the grammar of calls of ``tools``, in the format of the model's chat template.

    Args:
        at_once: the answer has to begin with a call.

    Raises:
        InputError: as ``json_grammar``, naming the tool; or the template's calls are no JSON
            (``calls_are_json``).
    """
    if not calls_are_json(model):
        raise InputError("this model writes tool calls in another format than JSON.")
    tokenizer, rules = model.tokenizer, []
    check_schemas({f"the parameters of the tool {tool.name}": tool.parameters for tool in tools})
    for number, tool in enumerate(tools):
        begin = f'{{"name": {json.dumps(tool.name)}, "arguments": '
        rules.append(f'call{number}: {json.dumps(begin)} arguments{number} "}}"')
        rules.append(f"arguments{number}: %json {_with_options(tool.parameters)}")
    choice = " | ".join(f"call{number}" for number in range(len(tools)))
    return _grammar(
        model,
        "\n".join([f'start: "\\n" ( {choice} ) "\\n"', *rules]),
        opens=tuple(tokenizer.tool_call_start_tokens),
        closes=tuple(tokenizer.tool_call_end_tokens),
        at_once=at_once,
    )


def calls_are_json(model: Model) -> bool:
    """Tell whether the model's tool calls are JSON between two marks, as Qwen2.5's are."""
    from mlx_lm.tool_parsers import json_tools

    tokenizer = model.tokenizer
    return tokenizer.has_tool_calling and tokenizer.tool_parser is json_tools.parse_tool_call


class _Matching:
    """Masks the logits of one answer; a logits processor.

    It reads all tokens at each call, so it follows a draft's tokens that are taken back.
    """

    def __init__(self, grammar: Grammar, answer: Sequence[int], opened: bool, skip: int):
        self._grammar, self._before, self._opened, self._skip = grammar, [*answer], opened, skip
        self._bits = np.empty((1, -(-grammar.model.vocabulary // 32)), np.int32)
        self._start()

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        mx.async_eval(logits)  # the device goes on while this waits for the last token
        answer = self._before + tokens[self._skip :].tolist()
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
        self._matcher = None if grammar.opens else grammar.start.deep_copy()
        self._forced = [*grammar.opens] if grammar.at_once else []  # tokens that have to come next

    def _feed(self, token: int) -> None:
        self._read.append(token)
        inside = self._parting.open
        self._parting.add(token, 0)
        if inside or self._parting.open:
            return
        grammar = self._grammar
        if self._forced:
            del self._forced[0]
        elif (
            self._matcher is not None
            and not self._matcher.is_stopped()
            and not self._matcher.consume_token(token)
        ):
            log.warning("a grammar cannot go on: %s", one_line(self._matcher.get_error(), 200))
        if not grammar.opens:
            return
        if self._matcher is None:
            if tuple(self._read[-len(grammar.opens) :]) == grammar.opens:
                self._matcher = grammar.start.deep_copy()
        elif self._matcher.is_stopped() and not self._matcher.is_error():
            self._matcher, self._forced = None, [*grammar.closes]

    def _allowed(self) -> np.ndarray | None:
        """Return which tokens may follow, bool ``(vocabulary,)``; ``None`` for all."""
        if self._parting.open:
            return None
        if self._forced:
            allowed = self._only([self._forced[0]])
        elif self._matcher is None:
            return None
        else:
            allowed = self._matching()
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
        return self._only(_ends(self._grammar.model))

    def _only(self, tokens: Sequence[int]) -> np.ndarray:
        allowed = np.zeros(self._grammar.model.vocabulary, bool)
        allowed[tokens] = True
        return allowed


def _with_options(schema: Mapping[str, object]) -> str:
    return json.dumps({**schema, "x-guidance": OPTIONS})


def _grammar(model: Model, rules: str, **marks: object) -> Grammar:
    engine = _engine()
    text = engine.LLMatcher.grammar_from_lark(rules)
    quiet = engine.LLParserLimits(verbose_errors=False)  # else a log would show the answer
    matcher = engine.LLMatcher(_vocabulary(model), text, log_level=0, limits=quiet)
    if matcher.is_error():  # checked before, so perhaps too large
        reason = one_line(matcher.get_error(), 200)
        raise InputError(f"the JSON schema cannot be enforced: {reason}. Simplify it.")
    return Grammar(model, matcher, **marks)


def _vocabulary(model: Model) -> "LLTokenizer":
    """Return the model's vocabulary for llguidance, which takes seconds to make."""
    if model not in _vocabularies:
        from llguidance.hf import from_tokenizer

        engine = _engine()
        made = from_tokenizer(
            model.tokenizer._tokenizer,
            n_vocab=model.vocabulary,
            eos_token=_ends(model),
            slices=engine.LLTokenizer.json_slices(),
        )
        _vocabularies[model] = made
    return _vocabularies[model]


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
