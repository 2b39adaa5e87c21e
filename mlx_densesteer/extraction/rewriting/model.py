"""Rewriting with a local MLX model: another one, or the target itself, asked again under an instruction."""

import hashlib
from collections.abc import Iterator, Sequence

from ...errors import ContextError
from ...evaluation.condition import Condition
from ...files import whole_characters
from ...generation.batch import ROWS, generate_batch
from ...model.config import origin
from ...model.model import Model, takes_model
from ...model.prompt import encode_prompt
from ...text import one_line
from ..verification import most_tokens
from . import INSTRUCTION, SYSTEM, Original, Rewrite, Rewriter, read_answer, request


class ModelRewriter(Rewriter):
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
        self.name = f"mlx:{whole_characters(origin(name))} {_told(model)} instruction {INSTRUCTION}"

    def rewrite(self, originals: Sequence[Original]) -> Iterator[tuple[int, Rewrite | None]]:
        prompts = [
            encode_prompt(self._model.tokenizer, request(original), system=SYSTEM)
            for original in originals
        ]
        for index, made in _answers(self._model, originals, prompts, self._rows):
            yield index, made and Rewrite(read_answer(made.text), made.truncated)


class InstructionRewriter(Rewriter):
    """Has the target answer the problem again, greedily, under a system message that asks for density.

    So the dense side is the target's own words, and the pair is its answers with and without the
    instruction. It does not see the original.

    Args:
        instruction: follows the run's own system message, if there is one.
        rows: how many answers are decoded together.
    """

    @takes_model
    def __init__(
        self, model: Model, instruction: str, *, system: str | None = None, rows: int = ROWS
    ):
        self._model, self._rows = model, rows
        self._system = Condition(instruction=instruction).system(system) or instruction
        digest = hashlib.sha256(self._system.encode()).hexdigest()[:16]
        self.name = f"instruction:{one_line(instruction)} {digest} {_told(model)}"

    def rewrite(self, originals: Sequence[Original]) -> Iterator[tuple[int, Rewrite | None]]:
        prompts = [
            encode_prompt(self._model.tokenizer, original.prompt, system=self._system)
            for original in originals
        ]
        yield from _answers(self._model, originals, prompts, self._rows)


def _told(model: Model) -> str:
    info = model.info
    return f"{info.fingerprint} {info.dtype} quantization {info.quantization}"


def _answers(
    model: Model, originals: Sequence[Original], prompts: Sequence[list[int]], rows: int
) -> Iterator[tuple[int, Rewrite | None]]:
    """Yield each original's number and the answer to its prompt; ``None`` if the prompt does not fit."""
    fits = []
    for index, tokens in enumerate(prompts):
        try:
            model.room(len(tokens), 1)
            fits.append(index)
        except ContextError:
            yield index, None
    answers = generate_batch(
        model,
        [prompts[index] for index in fits],
        rows=rows,
        max_tokens=[most_tokens(originals[index].tokens) for index in fits],
    )
    for number, made in answers:
        yield fits[number], Rewrite(made.text, made.finish_reason == "length")
