"""``Session``: one conversation, whose steering can be changed between its turns.

The next token is always that of a new session with the same history and settings, bit for bit, in
float32 and bfloat16: ``prefix.py`` sees to that, by reading every part in the same chunks.
An answer is therefore read once more, as a whole, when the next question comes.

Not covered: several conversations at once (``batch.Batch``), tools, and more than one thread: use a
session on the thread that loaded the model.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.nn as nn
from mlx_lm.models.cache import KVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import SessionError
from ..model.block import deltas
from ..model.chunks import Chunk
from ..model.model import chat_template_sha256, fingerprint
from ..model.prefix import Prefix
from ..steering.steering import Positions, Steering
from ..steering.vector import SteeringVector
from .brake import Brake
from .conversation import Turn, fit, lay_out
from .prefix_file import load_prefix, save_prefix
from .reply import Reply
from .session_file import SavedSession, cache_path, read_session, write_session
from .speculation import Draft
from .stream import GREEDY, Sampling, Stream

KEEP_BYTES = 256 * 2**20


class Session:
    """One conversation with a model under a steering that can be changed at any time.

    Changing the steering costs nothing until the next question; then the layers above the lowest
    steered one are computed again for the history (``prefix.Prefix``).

    Args:
        model, tokenizer: as ``load`` returns them.
        steering: what to add to the residual stream; ``None`` is the stock model.
        system: the system message; ``None`` leaves it to the chat template.
        sampling, max_tokens, stop: of every answer, as in ``stream``; can be set at any time.
        draft: speculative decoding; a vector of the draft follows the session's strength.
        brake: cut off repetition and lower the strength, which then stays lowered.
        keep_bytes: how much of the residual stream to keep for re-steering; 0 keeps nothing.
        kv_bits: quantise keys and values to 4 or 8 bits.
        context: tokens that the conversation may have, by default as many as the model allows.
        drop_oldest: forget the oldest turns when the context is full, instead of an error; so many
            that a quarter of it is free, because the others are then read again.

    Raises:
        VectorMismatchError, SteeringError, InputError: as in ``stream``.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
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
    ):
        self.model, self.tokenizer = model, tokenizer
        self.system, self.sampling, self.max_tokens = system, sampling, max_tokens
        self.stop, self.brake, self.drop_oldest = tuple(stop), brake, drop_oldest
        self.context = context or model.args.max_position_embeddings
        self.draft = draft
        if draft is not None:
            draft.check(tokenizer)
        self.prefix = Prefix(model, keep_bytes=keep_bytes, kv_bits=kv_bits)
        self._draft_prefix = Prefix(draft.model, kv_bits=kv_bits) if draft else None
        self._turns: list[Turn] = []
        self._live: tuple[Reply, Turn | None] | None = None
        self.steer(steering)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The conversation so far, without an answer that is still coming."""
        return tuple(self._turns)

    @property
    def steering(self) -> Steering | None:
        return self._steering

    @property
    def strength(self) -> float:
        """Lambda; 0 without a steering."""
        return self._steering.strength if self._steering else 0.0

    def send(self, text: str) -> Reply:
        """Ask ``text``; iterate over the answer.

        Raises:
            InputError: an empty question.
            ContextError: no room for an answer in the context.
        """
        self._end_live()
        return self._start(text, None)

    def regenerate(self) -> Reply:
        """Answer the last question again, under the settings now in force.

        The old answer comes back if nothing of the new one was generated.
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
        """Take back the last question and its answer, and return them."""
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
        deltas(self.model, steering)
        self._end_live()
        self._steering = steering

    def set_strength(self, strength: float) -> None:
        """Turn the dial. 0 is the unsteered model, bit for bit."""
        self._change("strength", strength=strength)

    def set_layers(self, layers: Sequence[int]) -> None:
        self._change("layer", layers=tuple(layers))

    def set_positions(self, positions: Positions) -> None:
        self._change("positions", positions=positions)

    def set_vector(
        self, vector: SteeringVector | None, layers: Sequence[int] | None = None
    ) -> None:
        """Steer with another vector at the same strength and positions; ``None`` steers no more.

        ``layers`` are by default those steered now, if ``vector`` holds them, else all of its own.
        """
        if vector is None:
            self.steer(None)
            return
        now = self._steering
        if layers is None and now is not None and set(now.layers) <= set(vector.layers):
            layers = now.layers
        chosen = None if layers is None else tuple(layers)
        if now is None:
            self.steer(Steering(vector, layers=chosen))
        else:
            self._change("vector", vector=vector, layers=chosen)

    def prompt(self, text: str) -> list[int]:
        """Return the token ids of the whole conversation with ``text`` as its next question."""
        chunks, last = self._lay_out(self._turns, text)
        return [token for chunk in chunks for token in chunk.tokens] + [last]

    def caches_for(self, text: str, steering: Steering | None) -> tuple[list[int], list[KVCache]]:
        """Return what ``batch.Batch.add`` takes to answer ``text`` next, under any steering.

        The tokens that are left to read, and caches that hold the others. What this session has
        already computed is shared, and neither it nor its history changes.
        """
        self._end_live()
        chunks, last = self._lay_out(self._turns, text)
        twin = self.prefix.fork()
        twin.fill(chunks, steering)
        return [last], twin.caches

    def save(self, path: str | Path, *, cache: bool = False) -> Path:
        """Save the history and the settings, with the steering vectors, as one JSON file.

        ``cache`` saves the caches beside it (``PATH.cache``), so that the history need not be read
        again after ``load``. A draft, a brake and the limits of memory are not saved.

        Raises:
            SessionError: another kind of file is there; it stays.
            DiskError: the file cannot be written.
        """
        self._end_live()
        path = Path(path)
        held = self.prefix.fork()
        held.cut(self._lay_out(self._turns, "?")[0])  # no turns that were taken back or dropped
        saved = SavedSession(
            fingerprint(self.model), chat_template_sha256(self.tokenizer), self.system, self.sampling,
            self.max_tokens, self.stop, self._steering, self.turns,
        )  # fmt: skip
        write_session(path, saved)
        if cache and held.length:
            digest = save_prefix(held, cache_path(path))
            write_session(path, replace(saved, cache_sha256=digest))
        return path

    @classmethod
    def load(
        cls, path: str | Path, model: nn.Module, tokenizer: TokenizerWrapper, **options
    ) -> "Session":
        """Return a saved conversation; ``options`` as for a new session, beside what was saved.

        Caches that were saved with it are used if these weights filled them; if not, the history
        is read again with the next question.

        Raises:
            SessionError: no session file, or one of another model.
        """
        path = Path(path)
        saved = read_session(path)
        ours = fingerprint(model), chat_template_sha256(tokenizer)
        if ours != (saved.fingerprint, saved.chat_template_sha256):
            raise SessionError(
                f"{path}: saved with another model (fingerprint {saved.fingerprint}, this one has "
                f"{ours[0]}) or another chat template. Load it with the model that it was saved with."
            )
        session = cls(
            model, tokenizer, saved.steering, system=saved.system, sampling=saved.sampling,
            max_tokens=saved.max_tokens, stop=saved.stop, **options,
        )  # fmt: skip
        session._turns = list(saved.turns)
        if saved.cache_sha256:
            load_prefix(session.prefix, cache_path(path), saved.cache_sha256)
        return session

    def _lay_out(self, turns: Sequence[Turn], text: str) -> tuple[list[Chunk], int]:
        exchanges = [(turn.user, turn.reply.token_ids) for turn in turns]
        return lay_out(self.tokenizer, exchanges, text, self.system)

    def _start(self, text: str, before: Turn | None) -> Reply:
        """Begin an answer; ``before`` is the turn that it replaces."""
        dropped, chunks, last, length = fit(
            partial(self._lay_out, text=text), self._turns, self.context, drop=self.drop_oldest
        )
        stream = Stream(
            self.model, self.tokenizer, self.prefix, chunks, last,
            steering=self._steering, max_tokens=min(self.max_tokens, self.context - length),
            sampling=self.sampling, stop=self.stop, draft=self.draft,
            draft_prefix=self._draft_prefix, brake=self.brake,
        )  # fmt: skip
        del self._turns[:dropped]
        reply = Reply(text, stream, self._settle)
        self._live = reply, before
        return reply

    def _end_live(self) -> None:
        if self._live is not None:
            self._live[0].close()

    def _settle(self, reply: Reply) -> None:
        """Make a turn of an answer that has ended; only the live one counts."""
        if self._live is None or self._live[0] is not reply:
            return
        before, self._live = self._live[1], None
        result = reply.result
        if result.finish_reason == "interrupted" and not result.token_ids:
            if before is not None:
                self._turns.append(before)
            return
        self._turns.append(Turn(reply.user, result))
        if result.brakes:
            self._steering = result.steering

    def _change(self, what: str, **settings: object) -> None:
        """Replace some of the steering's settings."""
        deltas(self.model, replace(self._need_steering(what), **settings))  # refused: nothing ends
        self._end_live()  # a brake of that answer may have lowered the strength
        self._steering = replace(self._need_steering(what), **settings)

    def _last_turn(self, what: str) -> Turn:
        if not self._turns:
            raise SessionError(f"nothing to {what}: the conversation is empty.")
        return self._turns[-1]

    def _need_steering(self, what: str) -> Steering:
        if self._steering is None:
            raise SessionError(f"there is no {what} to set without a vector: set_vector first.")
        return self._steering
