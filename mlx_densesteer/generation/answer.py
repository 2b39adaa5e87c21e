"""An answer while it is being generated."""

from collections.abc import Sequence

from mlx_lm.tokenizer_utils import TokenizerWrapper

from .brake import Brake, Repetition
from .stopping import Pending


class PartialAnswer:
    """The tokens of an answer, their text, and how much of it can be shown.

    ``ids`` are the tokens without the end of turn. With a ``brake`` text is shown a few tokens
    late, so that no loop has to be taken back. Stop texts are looked for in what was generated,
    shown or not: a stop text inside a loop ends the answer.
    """

    def __init__(self, tokenizer: TokenizerWrapper, brake: Brake | None, stops: Sequence[str] = ()):
        self.ids: list[int] = []
        self._tokenizer, self._detokenizer = tokenizer, tokenizer.detokenizer
        self._stops, self._pending = stops, Pending(stops)
        self._free = ""  # cannot be the beginning of a stop text
        self._ends: list[int] = []  # characters of text after each token
        self._shown = 0
        self._repetition = Repetition(brake) if brake else None

    @property
    def loop_start(self) -> int | None:
        return self._repetition.loop_start if self._repetition else None

    @property
    def stopped(self) -> bool:
        """Whether a stop text came."""
        return self._pending.stopped

    @property
    def text(self) -> str:
        """The whole text, shown or not, up to a stop text."""
        return self._free + self._pending.held

    def add(self, token: int) -> None:
        self.ids.append(token)
        self._detokenizer.add_token(token)
        self._free += self._pending.feed(self._detokenizer.last_segment)
        self._ends.append(len(self._free) + len(self._pending.held))
        if self._repetition:
            self._repetition.feed(token)

    def finalize(self) -> None:
        """The model ended: add what the tokenizer held back of a character."""
        self._detokenizer.finalize()
        self._free += self._pending.feed(self._detokenizer.last_segment)

    def show(self) -> str:
        """Return the text that was not shown yet and will not be taken back."""
        until = len(self._free)
        if self._repetition:
            safe = self._repetition.safe
            until = min(until, self._ends[safe - 1] if safe else 0)
        return self._show(self._free[:until])

    def show_rest(self) -> str:
        """The answer has ended: return all that was not shown yet."""
        return self._show(self.text)

    def before_the_loop(self, *, watch: bool) -> "PartialAnswer":
        """Return the answer without its loop; what was shown stays. ``watch``: for the next loop."""
        kept = PartialAnswer(self._tokenizer, None)
        for token in self.ids[: self.loop_start]:
            kept.add(token)
        text, kept._shown = kept.text, self._shown
        kept._stops, kept._pending = self._stops, Pending(self._stops)
        # what was shown begins no stop text any more
        kept._free = text[: kept._shown] + kept._pending.feed(text[kept._shown :])
        kept._repetition = self._repetition.after() if watch and self._repetition else None
        return kept

    def _show(self, text: str) -> str:
        piece = text[self._shown :]
        self._shown += len(piece)
        return piece
