"""One answer, while it is generated and afterwards."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import InputError
from ..model.marks import BLANK_LINE
from ..model.prompt import decode
from ..steering.steering import Steering
from ..text import count, signed
from .brake import Brake, Braked, Repetition
from .thought import Parting


def split_steps(text: str) -> list[str]:
    """Return the steps of a response: its blocks between blank lines, stripped.

    Source: arXiv 2605.29247, section 2.
    """
    return [step.strip() for step in BLANK_LINE.split(text) if step.strip()]


_FENCE = re.compile(r"\s*(`{3,}(?=[^`]*$)|~{3,})")
_HEADING = re.compile(r"\s*#{1,6}\s")
_ITEM = re.compile(r"(\s*)([-*+]|\d{1,9}[.)])\s")


def step_starts(text: str) -> list[int]:
    """Return where the steps begin, in characters, if code and lists are kept whole.

    These are the blocks of ``split_steps``, of which some are joined: a blank line separates no steps

    - in a fenced code block;
    - in an item of a list: the next block is indented at least as far as the item's text;
    - between the bullets of one list. The items of a numbered list are steps: so models write them.

    A heading or a code block that is indented less than the item's text ends the list.

    The page shows these steps. All that is measured, and the positions ``steps``, follow ``split_steps``.
    """
    starts: list[int] = []
    fence: str | None = None  # what opened the code block
    item: re.Match[str] | None = None  # the last outermost item of the list that the step ends in
    blank, at = True, 0
    for line in text.split("\n"):
        if not line.strip():
            blank, at = True, at + len(line) + 1
            continue
        if fence is None:
            found, opened = _ITEM.match(line), _FENCE.match(line)
            inside = item is not None and _indent(line) >= len(item[0])
            if blank and not inside and not (item and found and _same_list(item, found)):
                starts.append(at)
                item = None
            if not inside:
                item = None if opened or _HEADING.match(line) else found or item
            fence = opened[1] if opened else None
        elif len(line.strip()) >= len(fence) and not line.strip().strip(fence[0]):
            fence = None
        blank, at = False, at + len(line) + 1
    return starts


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _same_list(item: re.Match[str], found: re.Match[str]) -> bool:
    """Tell whether two bullets with a blank line between them are of one list."""
    return found[2] == item[2] and found[2] in "-*+"


def density(tokens: int, steps: int) -> float | None:
    """Return tokens per step, rho = N_tokens / N_steps; ``None`` for no steps."""
    return tokens / steps if steps else None


@dataclass(frozen=True)
class Generation:
    """A response, complete or so far.

    ``tokens`` counts what the model wrote, without the end-of-turn token but with those of a stop
    text. Times are in seconds; ``tokens_per_second`` is that of decoding alone.
    ``peak_memory_bytes`` includes the weights. ``finish_reason`` is ``"stop"`` (end of turn or a
    stop text), ``"length"`` (also of a grammar that could not go on), or ``"interrupted"``. ``steering`` is the one in force at the end.
    With a draft model, ``draft_accepted`` counts the tokens of the ``draft_proposed`` that the
    target chose too. ``brakes`` lists where repetition was cut off and the strength lowered.
    ``compute_seconds`` is the answer's share of the time of a ``Batch``; ``None`` outside of one.

    ``text`` is all that the model wrote. Of a reasoning model it has two parts, without the marks between
    them and the blanks around them: ``thought``, ``None`` if there was none, and ``answer``.
    ``thought_tokens`` counts those of the thought, which are among ``tokens``; ``thought_closed``
    says whether it came to its end; ``thought_limit`` is where it was to be ended by force. Of other models ``answer`` is ``text``.
    ``gave_up``: a grammar was too intricate to go on with, and ended the answer (``finish_reason="length"``).
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    tokens_per_second: float
    time_to_first_token: float
    peak_memory_bytes: int
    finish_reason: str
    steering: Steering | None = None
    draft_accepted: int | None = None
    draft_proposed: int | None = None
    brakes: tuple[Braked, ...] = ()
    compute_seconds: float | None = None
    thought: str | None = None
    answer: str = None  # type: ignore[assignment]
    thought_tokens: int = 0
    thought_closed: bool = False
    thought_limit: int | None = None
    gave_up: bool = False

    def __post_init__(self) -> None:
        if self.answer is None:
            object.__setattr__(self, "answer", self.text)

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was said: not even a thought came to its end."""
        return not self.token_ids or (self.thought is not None and not self.answer)

    @property
    def steps(self) -> int:
        return len(split_steps(self.text))

    @property
    def density(self) -> float | None:
        return density(self.tokens, self.steps)


def receipt(result: Generation, context: int) -> str:
    """Return one line on an answer: its length, density and speed, and why it was cut off.

    ``context`` is the most tokens that prompt and answer may have together.
    """
    parts = [count(result.tokens, "token"), count(result.steps, "step")]
    if result.density:
        parts.append(f"density {result.density:.1f}")
    if result.thought is not None:
        parts.append(f"{count(result.thought_tokens, 'token')} of them thought{_budget(result)}")
    parts.append(f"first token after {result.time_to_first_token:.2f} s")
    parts.append(f"then {result.tokens_per_second:.1f} tokens/s")
    if result.draft_proposed:
        accepted, proposed = result.draft_accepted, result.draft_proposed
        parts.append(f"{accepted} of {proposed} draft tokens accepted ({accepted / proposed:.0%})")
    if result.gave_up:
        parts.append("ended early: the JSON schema is too intricate to go on with")
    elif result.finish_reason == "length":
        full = result.prompt_tokens + result.tokens >= context
        parts.append(f"cut off at {f'the context of {context} tokens' if full else '--max-tokens'}")
        if result.thought is not None and not result.thought_closed:
            parts[-1] += " within its thought, so there is no answer"
    if result.finish_reason == "interrupted":
        parts.append("interrupted")
    return ", ".join(parts)


def _budget(result: Generation) -> str:
    """Say what the budget of a thought did."""
    budget = result.steering.budget if result.steering else None
    if result.thought_limit == result.thought_tokens and result.thought_closed:
        return " (ended at its limit)"
    if budget is not None and result.thought_tokens >= budget.tokens:
        return f" (from {budget.tokens} on at strength {signed(budget.strength)})"
    return ""


def brake_lines(result: Generation) -> list[str]:
    """Return a line for each time that the brake cut repetition off."""
    return [
        f"the answer began to repeat itself: {count(one.dropped, 'token')} cut off after token "
        f"{one.at_token}, strength {signed(one.strength_before)} -> {signed(one.strength_after)} "
        "(--no-brake lets it repeat)"
        for one in result.brakes
    ]


def check_limits(max_tokens: int, stop: Sequence[str]) -> None:
    """Raise ``InputError`` if ``max_tokens`` is below 1, or a stop text is empty."""
    if max_tokens < 1:
        raise InputError(f"max tokens {max_tokens}: expected at least 1.")
    if any(not text for text in stop):
        raise InputError("a stop text is empty; expected at least one character.")


def could_begin(marks: Sequence[str], text: str) -> int:
    """Return how many last characters of a text could begin one of ``marks``."""
    longest = max(map(len, marks), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks):
            return length
    return 0


class StopTexts:
    """The text of a response while it is generated, up to the first stop text.

    ``text`` has been released. ``held`` may still be the beginning of a stop text. ``stopped`` says
    that a stop text came.
    """

    def __init__(self, stops: Sequence[str] = ()):
        self.text, self.held, self.stopped = "", "", False
        self._stops = tuple(stops)

    def feed(self, piece: str) -> None:
        """Add ``piece``. A stop text releases what precedes it; after it, nothing is added."""
        if self.stopped:
            return
        self.held += piece
        if found := [at for at in map(self.held.find, self._stops) if at >= 0]:
            self.stopped = True
            self.text, self.held = self.text + self.held[: min(found)], ""
            return
        release = len(self.held) - could_begin(self._stops, self.held)
        self.text, self.held = self.text + self.held[:release], self.held[release:]

    def pass_on(self, piece: str) -> None:
        """Add ``piece`` without looking for a stop text: it is of a thought."""
        self.text, self.held = self.text + self.held + piece, ""


# At most so many tokens without a whole character wait; then all but the last 16 are told.
_PENDING = 32


class Detokenizer:
    """The text of tokens as they come: the joined pieces are ``decode`` of all tokens."""

    def __init__(self, tokenizer: TokenizerWrapper):
        self._tokenizer = tokenizer
        # The tokens of the last piece, told already, and those after it. The former stay, since some
        # tokenizers decode the first token of a text differently.
        self._tokens: list[int] = []
        self._told_tokens = self._told = 0  # tokens, characters

    def add(self, token: int) -> str:
        """Return the text that the next token makes certain."""
        self._tokens.append(token)
        text = decode(self._tokenizer, self._tokens)
        if text.endswith("\ufffd"):  # what an incomplete character decodes to
            return self._tell_half(text)
        piece = text[self._told :]
        if piece:
            del self._tokens[: self._told_tokens]
            self._told_tokens = len(self._tokens)
            self._told = len(decode(self._tokenizer, self._tokens))
        elif self._told_tokens:
            self._tokens.pop()  # an id that the tokenizer does not have
        return piece

    def finish(self) -> str:
        """Return the rest of the text: no token follows."""
        return decode(self._tokenizer, self._tokens)[self._told :]

    def _tell_half(self, text: str) -> str:
        """Tell a part of many bytes that are no text, so that a token's time does not grow with them."""
        half = len(self._tokens) - _PENDING // 2
        if len(self._tokens) - self._told_tokens <= _PENDING:
            return ""
        first, second = (
            decode(self._tokenizer, part) for part in (self._tokens[:half], self._tokens[half:])
        )
        if first + second != text or len(second) < 2:  # the cut is within a character
            return ""
        piece = first[self._told :]
        self._tokens, self._told_tokens, self._told = self._tokens[half:], 0, 0
        return piece


class PartialAnswer:
    """The tokens of an answer, their text, and how much of it can be shown.

    Stop texts are looked for outside of a thought.

    ``ids`` are the tokens without the end of turn; the text is ``decode`` of them. With a ``brake``,
    text is held back while it repeats itself; a stop text in it ends the answer all the same.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        brake: Brake | None = None,
        stops: Sequence[str] = (),
        *,
        opens_thought: bool = False,
    ):
        self.ids: list[int] = []
        self._tokenizer, self._detokenizer = tokenizer, Detokenizer(tokenizer)
        self._stops, self._opens_thought = tuple(stops), opens_thought
        self._text = StopTexts(stops)
        self._parting = Parting(tokenizer, opens_thought)
        self._ends: list[int] = []  # characters of text after each token
        self._shown = 0
        self._repetition = Repetition(brake) if brake else None

    @property
    def loop_start(self) -> int | None:
        """How many tokens precede a loop; ``None`` while there is none."""
        return self._repetition.loop_start if self._repetition else None

    @property
    def shown_length(self) -> int:
        """How many characters were shown."""
        return self._shown

    @property
    def safe(self) -> int:
        """How many first tokens will not be taken back."""
        return self._repetition.safe if self._repetition else len(self.ids)

    @property
    def stopped(self) -> bool:
        """Whether a stop text came."""
        return self._text.stopped

    @property
    def text(self) -> str:
        """The whole text, shown or not, up to a stop text."""
        return self._text.text + self._text.held

    def add(self, token: int) -> str:
        """Add the next token, which does not end the turn; return the text that it makes certain."""
        self.ids.append(token)
        piece = self._detokenizer.add(token)
        if self._parting.open:
            self._text.pass_on(piece)
        else:
            self._text.feed(piece)
        length = len(self._text.text) + len(self._text.held)
        self._parting.add(token, length)
        if self._repetition:
            self._ends.append(length)
            self._repetition.feed(token)
        return piece

    def finalize(self) -> str:
        """Add what was held back of an incomplete character, and return it: no token follows."""
        rest = self._detokenizer.finish()
        self._text.feed(rest)
        return rest

    def show(self) -> str:
        """Return the text that was not shown yet and will not be taken back."""
        until = len(self._text.text)
        if (certain := self._parting.certain) is not None:
            until = min(until, certain)
        if self._repetition:
            safe = self._repetition.safe
            until = min(until, self._ends[safe - 1] if safe else 0)
        return self._show(until)

    def show_rest(self) -> str:
        """Return all text that was not shown yet, at the end of the answer."""
        self._text.text, self._text.held = self.text, ""
        return self._show(len(self._text.text))

    def before_the_loop(self, *, watch: bool) -> "PartialAnswer":
        """Return the answer without its loop, but with all that was shown; ``watch`` for the next loop."""
        kept = PartialAnswer(self._tokenizer, opens_thought=self._opens_thought)
        for token in self.ids[: self.loop_start]:
            kept.add(token)
        text, kept._shown, kept._stops = kept.text, self._shown, self._stops
        kept._text = StopTexts(self._stops)
        kept._text.text = text[: kept._shown]  # shown, so it begins no stop text
        kept._text.feed(text[kept._shown :])
        if watch and self._repetition:
            kept._ends = self._ends[: self.loop_start]
            kept._repetition = self._repetition.after()
        return kept

    @property
    def shown(self) -> tuple[str | None, str]:
        """Thought and answer as far as they were shown."""
        return self._parting.split(self._text.text[: self._shown])

    @property
    def parts(self) -> dict[str, object]:
        """What a ``Generation`` has of thought and answer."""
        thought, answer = self._parting.split(self.text)
        parts = {"thought": thought, "answer": answer, "thought_tokens": self._parting.tokens}
        return parts | {"thought_closed": self._parting.closed}

    def _show(self, until: int) -> str:
        piece = self._text.text[self._shown : until]
        self._shown += len(piece)
        return piece


def brake_answer(
    answer: PartialAnswer, steering: Steering, brake: Brake, number: int
) -> tuple[PartialAnswer, Steering, Braked]:
    """Cut off an answer's loop and lower the strength; ``number`` counts the brakes of the answer, from 1 on."""
    parts, before, budget = answer.parts, steering.strength, steering.budget
    late = budget is not None and parts["thought_tokens"] >= budget.tokens
    if budget is not None and (not before or (late and not parts["thought_closed"])):
        before = budget.strength
    factor = brake.factor if number < brake.tries else 0.0
    kept = answer.before_the_loop(watch=bool(factor))
    dropped = len(answer.ids) - len(kept.ids)
    done = Braked(len(kept.ids), dropped, before, before * factor)
    return kept, steering.weaker(factor), done
