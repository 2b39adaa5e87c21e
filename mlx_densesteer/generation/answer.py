"""One answer: while it comes, and when it is there."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import InputError
from ..steering.steering import Steering
from .brake import Brake, Braked, Repetition

_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")


def split_steps(text: str) -> list[str]:
    """Return the steps of a response, stripped, in order; blank blocks are none.

    A step is a block between blank lines. Source: arXiv 2605.29247, section 2.
    """
    return [step.strip() for step in _BLANK_LINE.split(text) if step.strip()]


def density(tokens: int, steps: int) -> float | None:
    """Return tokens per step, rho = N_tokens / N_steps; ``None`` for a response without a step."""
    return tokens / steps if steps else None


@dataclass(frozen=True)
class Generation:
    """A response, whole or so far.

    ``tokens`` counts what the model wrote, without the end-of-turn token but with those of a stop
    text. Times in seconds, ``tokens_per_second`` of decoding alone, ``peak_memory_bytes`` as mlx counts
    it, weights included. ``finish_reason`` is ``"stop"`` (end of turn or a stop text), ``"length"``, or
    ``"interrupted"``. ``steering`` is the one in force at the end. With a draft model,
    ``draft_accepted`` of the ``draft_proposed`` tokens were the target's choice too. ``brakes`` tells
    where repetition was cut off and the strength lowered.
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

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def steps(self) -> int:
        return len(split_steps(self.text))

    @property
    def density(self) -> float | None:
        return density(self.tokens, self.steps)


def check_limits(max_tokens: int, stop: Sequence[str]) -> None:
    """Check how long a response may be, and the texts that end it.

    Raises:
        InputError: ``max_tokens`` is below 1, or a stop text is empty.
    """
    if max_tokens < 1:
        raise InputError(f"max tokens {max_tokens}: expected at least 1.")
    if any(not text for text in stop):
        raise InputError("a stop text is empty; expected at least one character.")


class StopTexts:
    """The text of a response as it comes, held back where a stop text could be beginning.

    ``text`` is what has been released, ``held`` what may still turn out to be a stop text, and
    ``stopped`` says that one came. Only the end of the text is looked at again.
    """

    def __init__(self, stops: Sequence[str] = ()):
        self.text, self.held, self.stopped = "", "", False
        self._stops = tuple(stops)

    def feed(self, piece: str) -> None:
        """Add ``piece``. After a stop text, what precedes it is released and nothing more is taken."""
        if self.stopped:
            return
        self.held += piece
        if found := [at for at in map(self.held.find, self._stops) if at >= 0]:
            self.stopped = True
            self.text, self.held = self.text + self.held[: min(found)], ""
            return
        release = len(self.held) - self._could_begin()
        self.text, self.held = self.text + self.held[:release], self.held[release:]

    def _could_begin(self) -> int:
        """Return how many last characters of ``held`` could begin a stop text."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-length:]) for stop in self._stops):
                return length
        return 0


class PartialAnswer:
    """The tokens of an answer, their text, and how much of it can be shown.

    ``ids`` are the tokens without the end of turn. With a ``brake`` text is held back while it repeats
    itself. Stop texts are looked for in what was generated, shown or not: a stop text inside a loop
    ends the answer.
    """

    def __init__(
        self, tokenizer: TokenizerWrapper, brake: Brake | None = None, stops: Sequence[str] = ()
    ):
        self.ids: list[int] = []
        self._tokenizer, self._detokenizer = tokenizer, tokenizer.detokenizer
        self._stops = tuple(stops)
        self._text = StopTexts(stops)
        self._ends: list[int] = []  # characters of text after each token
        self._shown = 0
        self._repetition = Repetition(brake) if brake else None

    @property
    def loop_start(self) -> int | None:
        """How many tokens there are before a loop; ``None`` while there is none."""
        return self._repetition.loop_start if self._repetition else None

    @property
    def stopped(self) -> bool:
        """Whether a stop text came."""
        return self._text.stopped

    @property
    def text(self) -> str:
        """The whole text, shown or not, up to a stop text."""
        return self._text.text + self._text.held

    def add(self, token: int) -> None:
        """Take the next token, which does not end the turn."""
        self.ids.append(token)
        self._detokenizer.add_token(token)
        self._text.feed(self._detokenizer.last_segment)
        if self._repetition:
            self._ends.append(len(self._text.text) + len(self._text.held))
            self._repetition.feed(token)

    def finalize(self) -> None:
        """The model ended: add what the tokenizer held back of a character."""
        self._detokenizer.finalize()
        self._text.feed(self._detokenizer.last_segment)

    def show(self) -> str:
        """Return the text that was not shown yet and will not be taken back."""
        until = len(self._text.text)
        if self._repetition:
            safe = self._repetition.safe
            until = min(until, self._ends[safe - 1] if safe else 0)
        return self._show(until)

    def show_rest(self) -> str:
        """The answer has ended: return all that was not shown yet."""
        self._text.text, self._text.held = self.text, ""
        return self._show(len(self._text.text))

    def before_the_loop(self, *, watch: bool) -> "PartialAnswer":
        """Return the answer without its loop; what was shown stays. ``watch``: for the next loop."""
        kept = PartialAnswer(self._tokenizer)
        for token in self.ids[: self.loop_start]:
            kept.add(token)
        text, kept._shown, kept._stops = kept.text, self._shown, self._stops
        kept._text = StopTexts(self._stops)
        kept._text.text = text[: kept._shown]  # what was shown begins no stop text any more
        kept._text.feed(text[kept._shown :])
        if watch and self._repetition:
            kept._ends = self._ends[: self.loop_start]
            kept._repetition = self._repetition.after()
        return kept

    def _show(self, until: int) -> str:
        piece = self._text.text[self._shown : until]
        self._shown += len(piece)
        return piece
