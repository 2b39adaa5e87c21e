"""Rewriting with a local MLX model, which may be the target itself."""

from collections.abc import Iterator, Sequence

from ...errors import ContextError
from ...files import whole_characters
from ...generation.batch import ROWS, generate_batch
from ...model.config import origin
from ...model.model import Model, takes_model
from ...model.prompt import encode_prompt
from ..verification import most_tokens
from . import INSTRUCTION, SYSTEM, Original, Rewrite, read_answer, request


class ModelRewriter:
    """Asks a model for rewrites, greedily and in batches.

    A rewrite is cut off at ``most_tokens``, which ends loops. Each precision of a model is a
    rewriter of its own.

    Args:
        name: the folder or Hub id of the model.
        rows: how many rewrites are decoded together.
    """

    @takes_model
    def __init__(self, model: Model, name: str, *, rows: int = ROWS):
        self._model, self._rows = model, rows
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
            except ContextError:  # the request does not fit: no rewrite
                yield index, None
                continue
            prompts.append(tokens)
            asked.append(index)
        rewrites = generate_batch(
            self._model,
            prompts,
            rows=self._rows,
            max_tokens=[most_tokens(originals[index].tokens) for index in asked],
        )
        for number, made in rewrites:
            yield asked[number], Rewrite(read_answer(made.text), made.finish_reason == "length")
