"""One question under several steerings at once: rows of one batch, beside the conversation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ContextError, SessionError

if TYPE_CHECKING:
    from mlx_lm.models.cache import KVCache

    from ..generation.answer import Generation
    from ..generation.conversation import Turn
    from ..generation.session import Session
    from ..steering.steering import Steering


@dataclass(frozen=True)
class Asked:
    """A question, and the turns that precede it."""

    text: str
    before: tuple["Turn", ...]


def last_question(session: "Session") -> Asked:
    """Return the last question where it was asked.

    Raises:
        SessionError: there is none.
    """
    if not session.turns:
        raise SessionError("there is no last question yet: ask one first.")
    return Asked(session.turns[-1].user, session.turns[:-1])


@dataclass
class State:
    """What there is of one row's answer; ``result`` comes with its end."""

    steering: "Steering | None"
    text: str = ""
    result: "Generation | None" = None


class Rows(Iterator[tuple[int, str]]):
    """Iterate over ``(row, text)`` of the answers to one question, a row for each steering.

    They decode together, without a draft model and without the brake: what is shown is what the
    strength does. ``states`` holds what has come. The session stays as it is, and what it has
    computed is shared.

    Raises:
        ContextError: no room for an answer.
        SteeringError, VectorMismatchError: as in ``Session.steer``.
    """

    def __init__(self, session: "Session", asked: Asked, steerings: Sequence["Steering | None"]):
        from ..generation.batch import Batch

        self.states = [State(steering) for steering in steerings]
        self._batch = Batch(session.model, session.tokenizer, rows=len(steerings))
        try:
            self._numbers = [self._add(session, asked, one) for one in steerings]
        except BaseException:
            self._batch.close()
            raise
        self._pieces = self._run()

    def __next__(self) -> tuple[int, str]:
        return next(self._pieces)

    def stop(self) -> list["Generation"]:
        """End the rows that still run, and return all answers; harmless when repeated."""
        for state, number in zip(self.states, self._numbers, strict=True):
            if state.result is None and (result := self._batch.cancel(number)) is not None:
                state.result, state.text = result, result.text
        self._batch.close()
        return [state.result for state in self.states if state.result is not None]

    def _run(self) -> Iterator[tuple[int, str]]:
        while self._batch.running:
            for piece in self._batch.step():
                row = self._numbers.index(piece.row)
                self.states[row].text += piece.text
                self.states[row].result = piece.result
                yield row, piece.text

    def _add(self, session: "Session", asked: Asked, steering: "Steering | None") -> int:
        last, caches, length = _caches(session, asked, steering)
        return self._batch.add(
            [last], steering=steering, max_tokens=min(session.max_tokens, session.context - length),
            sampling=session.sampling, stop=session.stop, cache=caches,
        )  # fmt: skip


def _caches(
    session: "Session", asked: Asked, steering: "Steering | None"
) -> tuple[int, list["KVCache"], int]:
    """Return the question's last token, caches of all that precedes it, and how long that is."""
    from ..generation.conversation import lay_out

    exchanges = [(turn.user, turn.reply.token_ids) for turn in asked.before]
    chunks, last = lay_out(session.tokenizer, exchanges, asked.text, session.system)
    length = sum(len(chunk.tokens) for chunk in chunks) + 1
    if length >= session.context:
        raise ContextError(
            f"the conversation has {length} tokens, and the context {session.context}: no room for an "
            "answer. Shorten the question, or drop the oldest turns."
        )
    twin = session.prefix.fork()
    twin.fill(chunks, steering)
    return last, twin.caches, length


def context_tokens(session: "Session") -> int:
    """Return how many tokens the conversation has."""
    if not session.turns:
        return 0
    from ..generation.conversation import lay_out

    *before, turn = session.turns
    exchanges = [(one.user, one.reply.token_ids) for one in before]
    chunks, _ = lay_out(session.tokenizer, exchanges, turn.user, session.system)
    return sum(len(chunk.tokens) for chunk in chunks) + 1 + turn.reply.tokens
