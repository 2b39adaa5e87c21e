"""``Session``: one conversation, whose steering can be changed between its turns.

A session reuses what it has read and decoded. So its next token is that of a new session with the same
history and settings, unless the two likeliest tokens are closer than the rounding of matrix products of
another shape. An exact session gives that token bit for bit: ``prefix.py`` reads every part in the same
chunks, for which the next question first reads the last answer once more, as a whole.

Not covered: several conversations at once (``batch.Batch``), and tools. Use a session on the thread
that loaded the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mlx_lm.models.cache import KVCache

from ..errors import SessionError
from ..model.block import additions
from ..model.model import Model, takes_model
from ..model.prefix import Chunk, Prefix
from ..steering.places import Positions
from ..steering.request import Amount, request
from ..steering.steering import Steering
from ..steering.vector import SteeringVector
from .answer import Generation
from .brake import Brake
from .conversation import Turn, fit, lay_out
from .sampling import GREEDY, Sampling
from .session_file import SavedSession, read_session, write_session
from .speculation import Draft
from .stream import Stream

KEEP_BYTES = 256 * 2**20


class Reply(Iterator[str]):
    """Iterate over the pieces of an answer. At its end, it becomes a turn of the session."""

    def __init__(self, session: "Session", user: str, stream: Stream):
        self.user = user
        self._session, self._stream = session, stream

    def __next__(self) -> str:
        try:
            return next(self._stream)
        except StopIteration:
            self._session._settle(self)
            raise

    def close(self) -> None:
        """End the answer now. Its text so far becomes a turn; without any, the question is dropped too."""
        self._stream.close()
        self._session._settle(self)

    @property
    def result(self) -> Generation:
        return self._stream.result

    @property
    def shown(self) -> tuple[str | None, str]:
        """Thought and answer, as far as the pieces so far have them."""
        return self._stream.shown


class Session:
    """One conversation with a model under a steering that can be changed at any time.

    After a change, the next question computes the layers above the lowest steered one again for the
    history (``prefix.Prefix``).

    Args:
        model: what ``load`` returns, or mlx-lm's pair of model and tokenizer.
        steering: what to add to the residual stream; ``None`` is the stock model.
        system: the system message; ``None`` leaves it to the chat template.
        sampling: how every answer is sampled, as in ``stream``; like the next two, it can be set at any time.
        max_tokens: the longest answer, in tokens.
        stop: texts that end an answer.
        draft: speculative decoding.
        brake: cut off repetition and lower the strength, for later answers too.
        keep_bytes: how much of the residual stream to keep for re-steering; 0 keeps nothing.
        kv_bits: quantise keys and values to 4 or 8 bits.
        context: how many tokens the conversation may have, by default the model's context.
        drop_oldest: when the context is full, forget the oldest turns, until a quarter of it is free;
            without it, ``send`` raises.
        think_limit: end a thought of so many tokens by force; it can be set at any time.
        exact: answer as a new session with this history would, bit for bit. Every answer is then read once
            more before the next question.

    Raises:
        VectorMismatchError, SteeringError, InputError: as in ``stream``.
    """

    @takes_model
    def __init__(
        self,
        model: Model,
        steering: Steering | None = None,
        *,
        system: str | None = None,
        sampling: Sampling = GREEDY,
        max_tokens: int = 2048,
        stop: Sequence[str] = (),
        draft: Draft | None = None,
        brake: Brake | None = None,
        keep_bytes: int = KEEP_BYTES,
        kv_bits: int | None = None,
        context: int | None = None,
        drop_oldest: bool = False,
        exact: bool = False,
        think_limit: int | None = None,
    ):
        self.model = model
        self.system, self.sampling, self.max_tokens = system, sampling, max_tokens
        self.stop, self.brake, self.drop_oldest = tuple(stop), brake, drop_oldest
        self._context, self._exact, self.think_limit = context, exact, think_limit
        self.draft = draft
        if draft is not None:
            draft.check(model.tokenizer)
        options = {"kv_bits": kv_bits, "exact": exact}
        self.prefix = Prefix(model.network, keep_bytes=keep_bytes, **options)
        self._draft_prefix = Prefix(draft.model.network, **options) if draft else None
        self._turns: list[Turn] = []
        self._live: tuple[Reply, Turn | None] | None = None
        self.steer(steering)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The conversation so far, without an unfinished answer."""
        return tuple(self._turns)

    @property
    def exact(self) -> bool:
        """Whether answers are those of a new session, bit for bit."""
        return self._exact

    @property
    def context(self) -> int:
        """How many tokens the conversation may have, answer included."""
        return min(self.model.context, self._context or self.model.context)

    @context.setter
    def context(self, tokens: int | None) -> None:
        self._context = tokens

    @property
    def tokens(self) -> int:
        """How many tokens the conversation has, without an unfinished answer."""
        if not self._turns:
            return 0
        *before, last = self._turns
        chunks, _ = self._lay_out(before, last.user)
        return sum(len(chunk.tokens) for chunk in chunks) + 1 + last.reply.tokens

    @property
    def steering(self) -> Steering | None:
        return self._steering

    @property
    def strength(self) -> float:
        """Lambda; 0 without a steering."""
        return self._steering.strength if self._steering else 0.0

    def send(self, text: str) -> Reply:
        """Return an iterator over the answer to ``text``.

        Raises:
            InputError: an empty question.
            ContextError: no room for an answer in the context.
        """
        self._end_live()
        return self._start(text, None)

    def regenerate(self) -> Reply:
        """Answer the last question again, under the current settings.

        If the new answer ends before its first token, the old one is kept.
        """
        self._end_live()
        turn = self._last_turn("answer again")
        self._turns.pop()
        try:
            return self._start(turn.user, turn)
        except BaseException:
            self._turns.append(turn)
            raise

    def undo(self) -> Turn:
        """Remove the last question and its answer, and return them."""
        self._end_live()
        self._last_turn("undo")
        return self._turns.pop()

    def drop(self, count: int = 1) -> None:
        """Forget the ``count`` oldest turns."""
        self._end_live()
        if not 0 <= count <= len(self._turns):
            raise SessionError(f"cannot drop {count} of {len(self._turns)} turns.")
        del self._turns[:count]

    def reset(self) -> None:
        """Forget all turns; the settings stay."""
        self._end_live()
        self._turns.clear()

    def steer(self, steering: Steering | None) -> None:
        """Replace the steering.

        Raises:
            VectorMismatchError, SteeringError: it cannot be applied; the old one stays.
        """
        additions(self.model.network, steering)
        self._end_live()
        self._steering = steering

    def set_strength(self, strength: str | float | Amount) -> None:
        """Set lambda, a dose (``"20%"``) or a KL (``"0.1nats"``); a thinking budget stays as it is.

        0 is the unsteered model, bit for bit, up to a budget.

        Raises:
            InputError: no number, per cent or KL.
            SessionError: there is no vector.
        """
        now = self._need_steering("strength")
        asked = request(now.vector, strength, now.layers, now.positions)
        self._change("strength", strength=asked.steering(self.model).strength)

    def set_budget(self, tokens: int | None, late: str | float | Amount | None = None) -> None:
        """Steer a thought of more than so many tokens at ``late``, by default a dose of 20 % more; ``None`` ends it.

        Raises:
            InputError, SteeringError: not a number of tokens, or no strength.
            SessionError: there is no vector.
        """
        now = self._need_steering("thinking budget")
        where = now.vector, now.strength, now.layers, now.positions
        asked = request(*where, budget=tokens, late=late)
        self._change("thinking budget", budget=asked.steering(self.model).budget)

    def set_layers(self, layers: Sequence[int]) -> None:
        self._change("layer", layers=tuple(layers))

    def set_positions(self, positions: Positions) -> None:
        self._change("positions", positions=positions)

    def set_vector(self, vector: SteeringVector | None) -> None:
        """Steer with another vector at its default layer and strength; ``None`` ends the steering.

        A thinking budget stays, beyond which a dose of 20 % is added.
        """
        budget = self._steering.budget.tokens if self._steering and self._steering.budget else None
        made = None if vector is None else request(vector, budget=budget).steering(self.model)
        self.steer(made)

    def prompt(self, text: str, *, turns: int | None = None) -> list[int]:
        """Return the token ids of the whole conversation with ``text`` as its next question.

        Args:
            turns: how many turns precede the question, by default all.
        """
        chunks, last = self._lay_out(self._turns[:turns], text)
        return [token for chunk in chunks for token in chunk.tokens] + [last]

    def caches_for(
        self, text: str, steering: Steering | None, *, turns: int | None = None
    ) -> tuple[list[int], list[KVCache]]:
        """Return ``prompt`` and ``cache`` for ``batch.Batch.add``, to answer ``text`` under any steering.

        The caches share what this session has computed; the session does not change. The argument
        ``whole`` of ``Batch.add`` is ``prompt(text, turns=turns)``.
        """
        self._end_live()
        chunks, last = self._lay_out(self._turns[:turns], text)
        twin = self.prefix.fork()
        twin.fill(chunks, steering, last=last)
        return [last], twin.caches

    def save(self, path: str | Path) -> Path:
        """Save the history, the settings and the steering vectors as one JSON file.

        It does not hold ``draft``, ``brake``, ``keep_bytes``, ``kv_bits``, ``context``,
        ``drop_oldest`` and ``exact``.

        Raises:
            SessionError: another kind of file has this name; it is kept.
            DiskError: the file cannot be written.
        """
        self._end_live()
        path = Path(path)
        saved = SavedSession(
            fingerprint=self.model.fingerprint,
            chat_template_sha256=self.model.chat_template_sha256,
            system=self.system,
            sampling=self.sampling,
            max_tokens=self.max_tokens,
            stop=self.stop,
            think_limit=self.think_limit,
            steering=self._steering,
            turns=self.turns,
        )
        write_session(path, saved)
        return path

    @classmethod
    def load(cls, path: str | Path, model: Model, **options: object) -> "Session":
        """Return a saved conversation. ``options`` are those of a new session that ``save`` leaves out.

        Raises:
            SessionError: not a session file, damaged, or of another model.
        """
        model = Model.of(model)
        saved = read_session(Path(path), model.vocabulary)
        ours = model.fingerprint, model.chat_template_sha256
        if ours != (saved.fingerprint, saved.chat_template_sha256):
            raise SessionError(
                f"{path}: saved with another model (fingerprint {saved.fingerprint}, this one has "
                f"{ours[0]}) or another chat template. Load it with the model that it was saved with."
            )
        settings = {
            key: getattr(saved, key)
            for key in ("system", "sampling", "max_tokens", "stop", "think_limit")
        }
        session = cls(model, saved.steering, **settings | options)
        session._turns = list(saved.turns)
        return session

    def _lay_out(self, turns: Sequence[Turn], text: str) -> tuple[list[Chunk], int]:
        self.model.check_length(text, self.system, limit=self.context, what="the question")
        exchanges = [(turn.user, turn.reply.token_ids) for turn in turns]
        return lay_out(self.model.tokenizer, exchanges, text, self.system)

    def _start(self, text: str, before: Turn | None) -> Reply:
        """Begin an answer; ``before`` is the turn that it replaces."""
        limits = {"max_tokens": self.max_tokens, "context": self.context, "drop": self.drop_oldest}
        laid_out = partial(self._lay_out, text=text)
        dropped, chunks, last, room = fit(laid_out, self._turns, self.model, **limits)
        stream = Stream(
            self.model, self.prefix, chunks, last, steering=self._steering, max_tokens=room,
            sampling=self.sampling, stop=self.stop, draft=self.draft,
            draft_prefix=self._draft_prefix, brake=self.brake, think_limit=self.think_limit,
        )  # fmt: skip
        del self._turns[:dropped]
        reply = Reply(self, text, stream)
        self._live = reply, before
        return reply

    def _end_live(self) -> None:
        if self._live is not None:
            self._live[0].close()

    def _settle(self, reply: Reply) -> None:
        """Make a turn of the answer if it is the live one."""
        if self._live is None or self._live[0] is not reply:
            return
        before, self._live = self._live[1], None
        result = reply.result
        if result.finish_reason == "interrupted" and result.is_empty:
            if before is not None:
                self._turns.append(before)
            return
        self._turns.append(Turn(reply.user, result))
        if result.brakes:
            self._steering = result.steering
        reply._stream.keep_decoded()  # last: Ctrl-C here loses no turn

    def _change(self, what: str, **settings: object) -> None:
        """Replace some of the steering's settings; if they cannot be applied, nothing changes."""
        additions(self.model.network, replace(self._need_steering(what), **settings))
        self._end_live()  # whose brake may have changed the steering
        self._steering = replace(self._steering, **settings)

    def _last_turn(self, what: str) -> Turn:
        if not self._turns:
            raise SessionError(f"nothing to {what}: the conversation is empty.")
        return self._turns[-1]

    def _need_steering(self, what: str) -> Steering:
        if self._steering is None:
            raise SessionError(f"there is no {what} to set without a vector: set_vector first.")
        return self._steering
