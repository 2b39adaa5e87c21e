"""Turn a conversation into the chunks of tokens that the model reads.

Answers keep the tokens that were generated; their text may encode to others. The chat template's text
between them is encoded piece by piece.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import ContextError
from ..model.marks import last_opens, thought_marks
from ..model.model import Model
from ..model.prefix import Chunk
from ..model.prompt import check_prompt, decode, drops_thoughts, encode_chat, render_chat
from .answer import Generation, PartialAnswer

KEPT_WHEN_FULL = 0.75  # of the context at most, once turns are dropped

Exchange = tuple[str, Sequence[int]]  # a question and its answer's tokens


@dataclass(frozen=True)
class Turn:
    """A question and its answer, with the steering under which the answer ended."""

    user: str
    reply: Generation


def lay_out(
    tokenizer: TokenizerWrapper, exchanges: Sequence[Exchange], question: str, system: str | None
) -> tuple[list[Chunk], int]:
    """Return the chunks of a conversation that ends with ``question``, and its last token.

    The chunks leave out that token: its output chooses the first token of the answer. Each answer is a
    chunk, together with the last token of its question.

    Some templates change earlier answers: they drop a reasoning model's thoughts. The whole conversation
    is then one chunk, encoded from text: all of it is prompt, and read again from the first such answer on.

    Raises:
        InputError: an empty question, no chat template, or one that refuses the conversation.
        ModelError: the chat template cannot be used.
    """
    check_prompt(tokenizer, question, system=system)
    texts = said = [decode(tokenizer, ids) for _, ids in exchanges]
    if drops_thoughts(tokenizer):
        said = _without_thoughts(tokenizer, exchanges, question)
    pieces = _between(tokenizer, exchanges, question, system) if said == texts else None
    if pieces is None:
        messages = _messages([q for q, _ in exchanges], said, question, system)
        *rest, last = encode_chat(tokenizer, render_chat(tokenizer, messages))
        return [Chunk(tuple(rest))], last
    chunks: list[Chunk] = []
    last = None
    for number, piece in enumerate(pieces):
        if last is not None:
            chunks.append(Chunk((last, *exchanges[number - 1][1]), answer=True))
        *rest, last = encode_chat(tokenizer, piece)
        chunks.append(Chunk(tuple(rest)))
    return chunks, last


def fit(
    lay_out: Callable[[Sequence[Turn]], tuple[list[Chunk], int]],
    turns: Sequence[Turn],
    model: Model,
    *,
    max_tokens: int,
    context: int,
    drop: bool,
) -> tuple[int, list[Chunk], int, int]:
    """Lay out as much of a conversation as leaves room for an answer.

    With ``drop`` the oldest turns may be left out. The others are then read again, so once a turn must
    go, a quarter of the context is freed.

    Args:
        lay_out: returns the chunks and the last token of the given turns and a next question.
        context: tokens that the conversation may have.

    Returns:
        The number of turns left out; the chunks; the last token; how long the answer may be.

    Raises:
        ContextError: no room.
    """
    full = context
    for dropped in range(len(turns) + 1):
        chunks, last = lay_out(turns[dropped:])
        length = sum(len(chunk.tokens) for chunk in chunks) + 1
        if length < full or (length < context and len(turns) - dropped <= 1) or not drop:
            break
        full = int(context * KEPT_WHEN_FULL) + 1
    try:
        room = model.room(length, max_tokens, limit=context, what="the conversation")
    except ContextError as error:
        raise ContextError(
            f"{error} You can also forget its oldest turns, or begin a new conversation."
        ) from None
    return dropped, chunks, last, room


def _without_thoughts(
    tokenizer: TokenizerWrapper, exchanges: Sequence[Exchange], question: str
) -> list[str]:
    """Return the answers as text, those with a thought without it; the template opens all of them or none."""
    said, marks = [], thought_marks(tokenizer)
    prompt = encode_chat(tokenizer, render_chat(tokenizer, _messages([], [], question, None)))
    opened = last_opens(prompt, *marks, tokenizer.eos_token_ids)
    for _, ids in exchanges:
        if not opened and not set(ids) & {*marks[0]}:
            said.append(decode(tokenizer, ids))
            continue
        answer = PartialAnswer(tokenizer, opens_thought=opened)
        for token in ids:
            answer.add(token)
        answer.finalize()
        said.append(answer.parts["answer"])
    return said


def _between(
    tokenizer: TokenizerWrapper, exchanges: Sequence[Exchange], question: str, system: str | None
) -> list[str] | None:
    """Return the text of ``render_chat`` before, between and after the answers.

    Return ``None`` if the template moves or changes an answer.
    """
    questions = [q for q, _ in exchanges]
    everything = "".join([system or "", question, *questions])
    mark = next(m for m in (f"answer{n}mark" for n in count()) if m not in everything)
    marks = [f"{mark}{number}." for number in range(len(exchanges))]
    rest = render_chat(tokenizer, _messages(questions, marks, question, system))
    pieces = []
    for one in marks:
        piece, found, rest = rest.partition(one)
        if not found or one in rest:
            return None
        pieces.append(piece)
    pieces.append(rest)
    for number in {0, len(exchanges) - 1} if exchanges else ():
        # the text before that answer when it was generated
        before = render_chat(
            tokenizer, _messages(questions[:number], marks, questions[number], system)
        )
        stands = "".join(p + m for p, m in zip(pieces[:number], marks, strict=False))
        if before != stands + pieces[number]:
            return None
    return pieces


def _messages(
    questions: Sequence[str], answers: Sequence[str], question: str, system: str | None
) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, answered in zip(questions, answers, strict=False):
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answered})
    return [*messages, {"role": "user", "content": question}]
