"""Throughput against rows: this package's batch, every row steered, against mlx-lm's."""

import time
from collections.abc import Callable, Sequence
from functools import partial

from mlx_lm.generate import BatchGenerator
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..generation.batch import Batch
from ..model.model import Model
from .figures import Figure, Measurement, Tell, alternate, quiet, ratio, spread
from .subject import Subject

FIGURES = ("batch_ratio", "batch_gain")
QUICK = {"sizes": (1, 4, 16), "rounds": 2, "seconds": 4.0}
PROMPT = 16  # random tokens


def run(
    subject: Subject,
    *,
    sizes: Sequence[int] = (1, 2, 4, 8, 16),
    tokens: int = 10,
    rounds: int = 12,
    seconds: float = 8.0,
    tell: Tell = quiet,
) -> Measurement:
    """Decode batches of each size, steered and stock in turn.

    Ours is ``Batch`` as chat and sweep use it, text included, each row with its own strength at the
    middle layer. Stock is mlx-lm's ``BatchGenerator`` on stock blocks and caches, tokens only, and
    once more as the noise. Only steps that gave every row a token are timed, so prompts are not; an
    end-of-turn token does not end a row. A ratio is our tokens per second over mlx-lm's:
    ``batch_ratio`` at the last size; ``batch_gain`` is our throughput there over that of the first.

    Args:
        sizes: rows of a batch, one size after the other.
        tokens: tokens of each row.
        rounds: batches of each size and side.
        seconds: after which no new round begins, for each size.
    """
    text = subject.tokens(PROMPT)
    table, rates = [], []
    for size in sizes:
        prompts = [[*text[row:], *text[:row]] for row in range(size)]  # all different
        ours, stock = (partial(side, subject, prompts, tokens) for side in (_ours, _stock))
        steered, plain, again = alternate(
            [ours, stock, stock],
            rounds=rounds,
            seconds=seconds,
            tell=lambda message, size=size: tell(f"{size} rows, {message}"),
        )
        rates.append(size / spread(steered)["median"])
        stock_rate = size / spread(plain)["median"]
        table.append(
            Figure.of(
                "batch_ratio" if size == sizes[-1] else "",
                f"throughput of {size} rows, steered / stock",
                ratio(plain, steered),
                ratio(plain, again),
                f"{rates[-1]:.1f} tokens/s, stock {stock_rate:.1f}",
            )
        )
    name = f"throughput, {sizes[-1]} rows / {sizes[0]}"
    return Measurement([*table, Figure("batch_gain", name, rates[-1] / rates[0])])


def _ours(subject: Subject, prompts: list[list[int]], tokens: int) -> float:
    """Return the seconds of a full step of this package's batch."""
    middle, size = (subject.model.layer_count // 2,), len(prompts)
    endless = Model(subject.model.network, _Endless(subject.model.tokenizer), subject.name)
    with Batch(endless, rows=size) as batch:
        for row, prompt in enumerate(prompts):
            how = subject.steering(middle, strength=0.05 * (1 + row % 8))
            batch.add(prompt, steering=how, max_tokens=tokens)

        def step() -> int | None:
            if not batch.running:
                return None
            before = batch.tokens
            batch.step()
            return batch.tokens - before

        return seconds_of_full_steps(step, size)


def _stock(subject: Subject, prompts: list[list[int]], tokens: int) -> float:
    """Return the seconds of a full step of mlx-lm's batch generator."""
    subject.take_side(None)
    running = size = len(prompts)
    batch = BatchGenerator(
        subject.model.network,
        max_tokens=tokens,
        completion_batch_size=size,
        prefill_batch_size=min(size, 8),
    )
    batch.insert(prompts)

    def step() -> int | None:
        nonlocal running
        if not running:
            return None
        responses = batch.next_generated()
        running -= sum(one.finish_reason is not None for one in responses)
        return len(responses)

    try:
        return seconds_of_full_steps(step, size)
    finally:
        batch.close()


class _Endless:
    """A tokenizer without an end of turn: every row goes on to its last token."""

    eos_token_ids = frozenset[int]()
    has_chat_template = False  # whose end of turn would be an end, too

    def __init__(self, tokenizer: TokenizerWrapper):
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)


def seconds_of_full_steps(step: Callable[[], int | None], size: int) -> float:
    """Return the mean seconds of the steps that give ``size`` tokens, without the first of them.

    ``step`` returns its number of tokens, ``None`` when nothing runs. The first full step may have
    read prompts too.

    Raises:
        RuntimeError: fewer than two full steps.
    """
    taken = []
    while True:
        began = time.perf_counter()
        count = step()
        if count is None:
            break
        if count == size:
            taken.append(time.perf_counter() - began)
    if len(taken) < 2:
        raise RuntimeError(
            f"{len(taken)} steps gave all {size} rows a token, expected at least 2: ask for more "
            "tokens."
        )
    return sum(taken[1:]) / len(taken[1:])
