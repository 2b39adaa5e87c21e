"""Rewriting with a local MLX model; the target itself may be the one."""

from collections.abc import Callable, Iterator, Sequence

from ...errors import ContextError
from ...generation.batch import ROWS, generate_batch
from ...model.config import origin
from ...model.model import Model, takes_model
from ...model.prompt import encode_prompt
from ..verification import most_tokens
from . import INSTRUCTION, SYSTEM, Original, Rewrite, read_answer, request, whole_characters


class ModelRewriter:
    """Asks a model, greedily and for several rewrites at once.

    A rewrite is cut off at ``most_tokens``, which ends a model that has fallen into a loop.
    Each precision of one model is a rewriter of its own.

    Args:
        name: the folder or Hub id of the model.
        rows: how many rewrites are decoded together.
        progress: called now and then with the number of tokens generated so far.
    """

    @takes_model
    def __init__(
        self,
        model: Model,
        name: str,
        *,
        rows: int = ROWS,
        progress: Callable[[int], None] | None = None,
    ):
        self._model, self._rows, self._progress = model, rows, progress
        info = model.info
        self.name = (
            f"mlx:{whole_characters(origin(name))} {info.fingerprint} {info.dtype} "
            f"quantization {info.quantization} instruction {INSTRUCTION}"
        )

    def rewrite(self, originals: Sequence[Original]) -> Iterator[tuple[int, Rewrite | None]]:
        prompts, asked = [], []
        for index, original in enumerate(originals):
            tokens = encode_prompt(self._model.tokenizer, request(original), system=SYSTEM)
            try:
                self._model.room(len(tokens), 1)
            except ContextError:  # the solution and the request do not fit: no rewrite of this one
                yield index, None
                continue
            prompts.append(tokens)
            asked.append(index)
        rewrites = generate_batch(
            self._model,
            prompts,
            rows=self._rows,
            max_tokens=[most_tokens(originals[index].tokens) for index in asked],
            progress=self._progress,
        )
        for number, made in rewrites:
            yield asked[number], Rewrite(read_answer(made.text), made.finish_reason == "length")
