"""Rewriting with a local MLX model; the target itself may be the one."""

from collections.abc import Callable, Iterator, Sequence

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...generation.batch import ROWS, generate_batch
from ...generation.answer import split_steps
from ...model.model import inspect
from ..verification import most_tokens
from .draft import Draft, Rewrite, whole_characters
from .instruction import SYSTEM, VERSION, read_answer, request


class ModelRewriter:
    """Asks a model, greedily and many drafts at once.

    A rewrite is cut off at ``most_tokens``, which ends a model that has fallen into a loop.
    ``name`` is the folder or Hub id. Each precision of one model is a rewriter of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        name: str,
        *,
        rows: int = ROWS,
        progress: Callable[[int], None] | None = None,
    ):
        self._model, self._tokenizer = model, tokenizer
        self._rows, self._progress = rows, progress
        info = inspect(model, name)
        self.name = (
            f"mlx:{whole_characters(info.name)} {info.fingerprint} {info.dtype} "
            f"quantization {info.quantization} instruction {VERSION}"
        )

    def rewrite(self, drafts: Sequence[Draft]) -> Iterator[tuple[int, Rewrite]]:
        requests = [request(draft, len(split_steps(draft.response))) for draft in drafts]
        for index, made in generate_batch(
            self._model, self._tokenizer, requests, system=SYSTEM, rows=self._rows,
            max_tokens=[most_tokens(draft.tokens) for draft in drafts],
            progress=self._progress,
        ):  # fmt: skip
            yield index, Rewrite(read_answer(made.text), made.finish_reason == "length")
