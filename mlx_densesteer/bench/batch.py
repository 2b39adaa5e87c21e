"""Throughput against rows: our batch, every row steered, against mlx-lm's batch generator."""

import time
from collections.abc import Callable

from mlx_lm.generate import BatchGenerator
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..generation.batch import Batch
from ..model.block import unpatch
from ..steering.steering import Steering
from .report import Row, ratio
from .subject import Subject
from .timing import Tell, alternate, over, quiet, spread

FIGURES = ("batch_ratio", "batch_gain")
SUITE = {"tokens": 10, "rounds": 12, "seconds": 8.0}
QUICK = {"rows": "1,4,16", "tokens": 8, "rounds": 2, "seconds": 4.0}


def run(
    subject: Subject,
    *,
    rows: str = "1,2,4,8,16",
    prompt_tokens: int = 8,
    tokens: int = 32,
    rounds: int = 3,
    seconds: float = 0.0,
    tell: Tell = quiet,
) -> dict[str, object]:
    """Decode batches of each size, steered and stock in turn; only full steps count.

    Ours is ``Batch`` as chat and sweep use it, text included, each row with a strength of its own
    at the middle layer. Stock is mlx-lm's ``BatchGenerator`` on stock blocks and caches, tokens only,
    and once more as the null. The seconds of the steps that gave every row a token are counted, so
    prompts are not; the end-of-turn token ends no row. A ratio is our tokens per second over mlx-lm's:
    ``batch_ratio`` at the largest size; ``batch_gain`` is its throughput over that of one row.

    Args:
        rows: sizes, in order.
        prompt_tokens: random tokens of each prompt.
        tokens: tokens of each row.
        rounds: batches of each size and side.
        seconds: for each size: then no new round is begun; 0 is no limit.
    """
    sizes = [int(size) for size in rows.split(",")]
    prompt = subject.tokens(prompt_tokens)
    sizes_found = {}
    for size in sizes:
        sides = [
            lambda size=size: _ours(subject, size, prompt, tokens),
            lambda size=size: _stock(subject, size, prompt, tokens),
            lambda size=size: _stock(subject, size, prompt, tokens),
        ]
        steered, stock, again = alternate(
            sides, rounds=rounds, seconds=seconds,
            tell=lambda message, size=size: tell(f"{size} rows, {message}"),
        )  # fmt: skip
        sizes_found[str(size)] = {
            "ratio": spread(over(stock, steered)),
            "null": spread(over(stock, again)),
            "tokens_per_second": size / spread(steered)["median"],
            "stock_tokens_per_second": size / spread(stock)["median"],
        }
    first, last = sizes_found[str(sizes[0])], sizes_found[str(sizes[-1])]
    return {
        "batch_ratio": last["ratio"]["median"],
        "batch_gain": last["tokens_per_second"] / first["tokens_per_second"],
        "details": {"rows": sizes_found, "prompt_tokens": prompt_tokens, "tokens": tokens},
    }


def rows(result: dict) -> list[Row]:
    """Return the table's rows."""
    found = result["details"]["rows"]
    first, *_, last = found
    table = [
        ratio(f"throughput of {size} rows, steered / stock", of["ratio"], of["null"],
              f"{of['tokens_per_second']:.1f} tokens/s, stock {of['stock_tokens_per_second']:.1f}")
        for size, of in found.items()
    ]  # fmt: skip
    return [*table, Row(f"throughput, {last} rows / {first}", f"{result['batch_gain']:.2f}")]


def _ours(subject: Subject, size: int, prompt: list[int], tokens: int) -> float:
    """Return the seconds of a full step of our batch."""
    strengths = [0.05 * (1 + row % 8) for row in range(size)]
    middle = (subject.layer_count // 2,)
    with Batch(subject.model, _Endless(subject.tokenizer), rows=size) as batch:
        for row, strength in enumerate(strengths):
            how: Steering = subject.steering(middle, strength=strength)
            batch.add(_turned(prompt, row), steering=how, max_tokens=tokens)

        def step() -> int | None:
            if not batch.running:
                return None
            before = batch.tokens
            batch.step()
            return batch.tokens - before

        return _seconds_of_full_steps(step, size)


def _stock(subject: Subject, size: int, prompt: list[int], tokens: int) -> float:
    """Return the seconds of a full step of mlx-lm's batch generator."""
    batch = BatchGenerator(
        unpatch(subject.model), max_tokens=tokens, completion_batch_size=size,
        prefill_batch_size=min(size, 8),
    )  # fmt: skip
    batch.insert([_turned(prompt, row) for row in range(size)])
    running = size

    def step() -> int | None:
        nonlocal running
        if not running:
            return None
        responses = batch.next_generated()
        running -= sum(one.finish_reason is not None for one in responses)
        return len(responses)

    try:
        return _seconds_of_full_steps(step, size)
    finally:
        batch.close()


class _Endless:
    """A tokenizer without an end of turn: every row goes on to its last token."""

    eos_token_ids = frozenset[int]()

    def __init__(self, tokenizer: TokenizerWrapper):
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)


def _turned(prompt: list[int], row: int) -> list[int]:
    """Return the prompt begun elsewhere: no two rows need be alike."""
    at = row % len(prompt)
    return [*prompt[at:], *prompt[:at]]


def _seconds_of_full_steps(step: Callable[[], int | None], size: int) -> float:
    """Return the mean seconds of the steps that give ``size`` tokens, but the first of them.

    ``step`` returns its number of tokens, ``None`` when nothing runs. The first full step
    may have read prompts too.
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
            f"{len(taken)} steps gave all {size} rows a token, expected at least 2: ask for more tokens."
        )
    return sum(taken[1:]) / len(taken[1:])
