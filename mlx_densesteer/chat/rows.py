"""Answer one question under several steerings at once, without changing the conversation."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import SessionError

if TYPE_CHECKING:
    from ..generation.answer import Generation
    from ..generation.session import Session
    from ..steering.steering import Steering


def last_question(session: "Session") -> str:
    """Return the last question.

    Raises:
        SessionError: there is none.
    """
    if not session.turns:
        raise SessionError("there is no last question yet: ask one first.")
    return session.turns[-1].user


@dataclass
class Row:
    """The answer so far under one steering; ``result`` is set when it ends."""

    steering: "Steering | None"
    text: str = ""
    thought: str | None = None  # of a reasoning model, and the rest of ``text``
    answer: str = ""
    result: "Generation | None" = None


class Rows(Iterable[tuple[int, str]]):
    """Iterate over ``(row, text)`` of the answers to one question, a row for each steering.

    The rows decode together, without a draft model and without the brake, which would change the
    strength. ``rows`` holds the answers so far. The rows share the session's caches; the session does
    not change.

    Args:
        text: the question; by default the last one, asked again at its place.

    Raises:
        SessionError: there is no last question.
        ContextError: no room for an answer.
        SteeringError, VectorMismatchError: as in ``Session.steer``.
    """

    def __init__(
        self, session: "Session", steerings: Sequence["Steering | None"], text: str | None = None
    ):
        from ..generation.batch import Batch

        turns = None if text else -1
        question = text or last_question(session)
        self.rows = [Row(steering) for steering in steerings]
        self._numbers: list[int] = []
        self._batch = Batch(session.model, rows=len(steerings))
        try:
            limits = {"limit": session.context, "what": "the conversation"}
            options = {
                "sampling": session.sampling,
                "stop": session.stop,
                "think_limit": session.think_limit,
                "whole": session.prompt(question, turns=turns),
            }
            for one in steerings:
                tokens, caches = session.caches_for(question, one, turns=turns)
                length = caches[0].offset + len(tokens)
                room = session.model.room(length, session.max_tokens, **limits)
                number = self._batch.add(
                    tokens, cache=caches, steering=one, max_tokens=room, **options
                )
                self._numbers.append(number)
        except BaseException:
            self._batch.close()
            raise

    def __iter__(self) -> Iterator[tuple[int, str]]:
        while self._batch.running:
            for piece in self._batch.step():
                number = self._numbers.index(piece.row)
                self.rows[number].text += piece.text
                self.rows[number].thought, self.rows[number].answer = piece.shown
                self.rows[number].result = piece.result
                yield number, piece.text

    def stop(self) -> list["Generation"]:
        """End the rows that still run, and return all answers. It may be called again."""
        for row, number in zip(self.rows, self._numbers, strict=True):
            if row.result is None and (result := self._batch.cancel(number)) is not None:
                row.result, row.text, row.answer = result, result.text, result.answer
        self._batch.close()
        return [row.result for row in self.rows if row.result is not None]
