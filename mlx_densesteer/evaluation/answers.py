"""Many problems under many steerings, as rows of shared batches; every response is kept.

This is the engine under ``evaluation`` and ``grid``. The journal holds one record for each
(problem, steering) and later one for its NLL, so one file can grow over several runs, and a
strength that was already tried on a problem is not tried again.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite

import mlx.nn as nn
import mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .._version import __version__
from ..distributed.ranks import ALONE, Ranks
from ..errors import InputError, ModelError
from ..generation.batch import ROWS, generate_batch
from ..generation.answer import Generation
from ..model.likelihood import nll
from ..model.model import chat_template_sha256, inspect
from ..model.prompt import encode_prompt
from ..steering.steering import UNSTEERED, Steering
from .grading import grade
from .journal import Journal
from .tasks import Problem

FORMAT = "mlx-densesteer answers 1"


@dataclass(frozen=True)
class Answer:
    """One response to one problem, graded.

    ``steering`` is the steering's fingerprint, ``"unsteered"`` at strength 0. ``nll`` is the
    mean negative log-likelihood of the response under the *unsteered* model given its prompt,
    in nats per token. ``seconds`` is from the row's start to its end, with its neighbours'
    share of the batch.
    """

    problem: str
    content: str  # a hash of prompt and gold answer: another file under the same ids is noticed
    steering: str
    text: str
    token_ids: tuple[int, ...]
    steps: int
    finish_reason: str
    correct: bool
    found: str | None
    by_reference: bool
    by_math_verify: bool | None
    seconds: float
    nll: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from every other answer."""
        return self.problem, self.content, self.steering

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


Progress = Callable[[list[Answer], int], None]  # answers so far, tokens generated in this run


def journal_header(
    model: nn.Module, tokenizer: TokenizerWrapper, max_tokens: int, system: str | None = None
) -> dict:
    """Return what must be equal for two runs to share a journal: all but problems and steering."""
    info = inspect(model, tokenizer.name_or_path)
    return {
        "format": FORMAT,
        "model": info.name,
        "fingerprint": info.fingerprint,
        "dtype": info.dtype,
        "quantization": info.quantization,
        "chat_template_sha256": chat_template_sha256(tokenizer),
        "system": system,
        "max_tokens": max_tokens,
    }


def answer(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    problems: Sequence[Problem],
    steerings: Sequence[Steering | None],
    journal: Journal | None = None,
    *,
    system: str | None = None,
    max_tokens: int = 2048,
    rows: int = ROWS,
    with_nll: bool = True,
    ranks: Ranks = ALONE,
    progress: Progress = lambda answers, tokens: None,
) -> list[Answer]:
    """Return the greedy responses to all problems under all steerings, problem by problem.

    What the journal holds already is taken from there and graded anew, the rest is added to it. Rows are ordered by problem, so that
    an interrupted run has whole problems, on which settings can be compared.

    Several ``ranks``, each with the whole model and a journal of its own, answer every n-th of what is missing and
    tell each other; all of them return all answers, and rank 0's journal has them too.
    """
    prints = [steering.fingerprint if steering else UNSTEERED for steering in steerings]
    wanted = {(p.id, _content(p), print_): None for p in problems for print_ in prints}
    ranks.same(_digest(wanted, max_tokens, system), "problems, vectors, settings or versions")
    there = _read(journal) if journal else {}
    _exchange(ranks, journal, there, list(there.values()))  # all: their files go when they are done
    by_print = dict(zip(prints, steerings, strict=True))
    by_id = {problem.id: problem for problem in problems}
    found = {key: _regraded(by_id[key[0]], there[key]) for key in wanted if key in there}
    missing = ranks.mine([key for key in wanted if key not in found])
    generated = 0

    def tell(tokens: int) -> None:
        nonlocal generated
        generated = tokens
        progress(list(found.values()), tokens)

    runs = generate_batch(
        model, tokenizer, [by_id[key[0]].prompt for key in missing],
        steering=[by_print[key[2]] for key in missing], system=system, max_tokens=max_tokens,
        rows=rows, progress=tell,
    )  # fmt: skip
    for index, generation in runs:
        key = missing[index]
        found[key] = _graded(by_id[key[0]], key, generation)
        if journal:
            journal.append(asdict(found[key]))
        progress(list(found.values()), generated)
    for key in _exchange(ranks, journal, found, [found[key] for key in missing]):
        found[key] = _regraded(by_id[key[0]], found[key])
    if with_nll:
        todo = [key for key in wanted if found[key].nll is None and found[key].token_ids]
        mine = ranks.mine(todo)
        _add_likelihoods(model, tokenizer, by_id, found, journal, system, mine)
        _exchange(ranks, journal, found, [found[key] for key in mine])
        progress(list(found.values()), generated)
    return [found[key] for key in wanted]


LIKELIHOODS = 16  # responses whose NLL is worked out between two records


def _add_likelihoods(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    problems: dict[str, Problem],
    found: dict[tuple, Answer],
    journal: Journal | None,
    system: str | None,
    todo: Sequence[tuple],
) -> None:
    """Work out the NLL of ``todo``; an empty response has none."""
    for first in range(0, len(todo), LIKELIHOODS):
        keys = todo[first : first + LIKELIHOODS]
        prompts = [encode_prompt(tokenizer, problems[k[0]].prompt, system=system) for k in keys]
        values = nll(model, prompts, [found[key].token_ids for key in keys])
        if bad := [key for key, value in zip(keys, values, strict=True) if not isfinite(value)]:
            raise ModelError(
                f"the NLL of the response to {bad[0][0]} is not finite: the model overflows its "
                "dtype. Convert it with --dtype bfloat16 or float32, or leave the NLL out (--no-nll)."
            )
        for key, value in zip(keys, values, strict=True):
            found[key] = replace(found[key], nll=value)
            if journal:
                journal.append({"nll_of": list(key), "nll": value})


def _digest(wanted: Iterable[tuple], max_tokens: int, system: str | None) -> str:
    document = json.dumps([list(wanted), max_tokens, system, __version__, mlx_lm.__version__])
    return hashlib.sha256(document.encode()).hexdigest()[:16]


def _exchange(
    ranks: Ranks, journal: Journal | None, known: dict[tuple, Answer], mine: Sequence[Answer]
) -> list[tuple]:
    """Tell the other ranks what this one has, and add what they have; rank 0 keeps it all.

    Returns the keys that were new here.
    """
    new: list[tuple] = []
    if ranks.size == 1:
        return new
    parts = ranks.gather([asdict(one) for one in mine])
    for rank, part in enumerate(parts):
        for record in part if rank != ranks.rank else ():
            made = _answer(record)
            key = made.key
            if key not in known:
                new.append(key)
                known[key] = made
            elif known[key].nll is None and made.nll is not None:
                known[key] = replace(known[key], nll=made.nll)
                record = {"nll_of": list(key), "nll": made.nll}
            else:
                continue
            if journal and ranks.speaks:
                journal.append(record)
    return new


def _graded(problem: Problem, key: tuple, generation: Generation) -> Answer:
    verdict = grade(problem, generation.text)
    seconds = generation.time_to_first_token
    if generation.tokens_per_second:
        seconds += generation.tokens / generation.tokens_per_second
    return Answer(
        *key, generation.text, generation.token_ids, generation.steps, generation.finish_reason,
        verdict.correct, verdict.found, verdict.by_reference, verdict.by_math_verify,
        round(seconds, 3),
    )  # fmt: skip


def _regraded(problem: Problem, kept: Answer) -> Answer:
    """Grade a kept answer again: the grader may have been another one (the extra ``eval``)."""
    verdict = grade(problem, kept.text)
    return replace(
        kept, correct=verdict.correct, found=verdict.found, by_reference=verdict.by_reference,
        by_math_verify=verdict.by_math_verify,
    )  # fmt: skip


def _read(journal: Journal) -> dict[tuple, Answer]:
    """Return the journal's answers by (problem, content, steering)."""
    answers: dict[tuple, Answer] = {}
    for number, record in enumerate(journal.records, 2):
        try:
            if "nll_of" in record:
                key = tuple(record["nll_of"])
                if key in answers:
                    answers[key] = replace(answers[key], nll=float(record["nll"]))
            else:
                made = _answer(record)
                answers[made.key] = made
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{journal.path}: line {number} is no answer ({error!r}): damaged. Remove the line, "
                "or move the file away and start again."
            ) from error
    return answers


def _answer(record: dict) -> Answer:
    return Answer(**(record | {"token_ids": tuple(record["token_ids"])}))


def _content(problem: Problem) -> str:
    text = json.dumps([problem.prompt, problem.answer, problem.rule], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def by_steering(answers: Iterable[Answer]) -> dict[str, dict[str, Answer]]:
    """Return ``{steering fingerprint: {problem id: answer}}``."""
    table: dict[str, dict[str, Answer]] = {}
    for one in answers:
        table.setdefault(one.steering, {})[one.problem] = one
    return table
