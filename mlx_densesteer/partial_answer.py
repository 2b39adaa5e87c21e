"""An answer while it is being generated."""

from mlx_lm.tokenizer_utils import TokenizerWrapper

from .brake import Brake, Repetition


class PartialAnswer:
    """The tokens of an answer, their text, and how much of it can be shown.

    ``ids`` are the tokens without the end of turn. With a ``brake`` text is shown a few tokens
    late, so that no loop has to be taken back.
    """

    def __init__(self, tokenizer: TokenizerWrapper, brake: Brake | None):
        self.ids: list[int] = []
        self._tokenizer, self._detokenizer = tokenizer, tokenizer.detokenizer
        self._text = ""
        self._ends: list[int] = []  # characters of text after each token
        self._shown = 0
        self._repetition = Repetition(brake) if brake else None

    @property
    def loop_start(self) -> int | None:
        return self._repetition.loop_start if self._repetition else None

    @property
    def held(self) -> str:
        """The text that was not shown yet."""
        return self._text[self._shown :]

    def add(self, token: int) -> None:
        self.ids.append(token)
        self._detokenizer.add_token(token)
        self._text += self._detokenizer.last_segment
        self._ends.append(len(self._text))
        if self._repetition:
            self._repetition.feed(token)

    def finalize(self) -> None:
        self._detokenizer.finalize()
        self._text += self._detokenizer.last_segment

    def show(self, *, everything: bool = False) -> str:
        """Return the text that was not shown yet and will not be taken back."""
        until = len(self._text)
        if self._repetition and not everything:
            safe = self._repetition.safe
            until = self._ends[safe - 1] if safe else 0
        piece = self._text[self._shown : until]
        self._shown = max(self._shown, until)
        return piece

    def before_the_loop(self, *, watch: bool) -> "PartialAnswer":
        """Return the answer without its loop; what was shown stays. ``watch``: for the next loop."""
        kept = PartialAnswer(self._tokenizer, None)
        for token in self.ids[: self.loop_start]:
            kept.add(token)
        kept._shown = min(self._shown, len(kept._text))
        kept._repetition = self._repetition.after() if watch and self._repetition else None
        return kept
