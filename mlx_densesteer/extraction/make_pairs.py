"""Contrastive pairs from a model's own solutions: solve, rewrite, verify, write.

Two journals beside the output hold the work: every answer, every rewrite and its NLL, as they
come. What they hold is not done again, whatever killed the run before. The files of pairs and
of rejections are a function of the journals and are written at the end.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import InputError
from ..evaluation.answers import Answer, answer, journal_header
from ..evaluation.journal import Journal
from ..evaluation.tasks import Problem
from ..generation.batch import ROWS
from ..model.likelihood import nll
from ..model.model import inspect
from ..model.prompt import encode_prompt
from .pair_files import Case, Files, Summary, summarise, write
from .rewriting import Draft, Rewrite, Rewriter
from .verification import NLL_MARGIN, Response, is_unlikely, most_tokens, verify

FORMAT = "mlx-densesteer rewrites 1"  # of the second journal


@dataclass(frozen=True)
class Progress:
    """How far a run is: counts of problems, and tokens generated so far.

    ``rewritten`` counts what this run asked for, ``checked`` earlier rewrites as well.
    """

    problems: int
    solved: int = 0
    correct: int = 0
    rewritten: int = 0
    checked: int = 0
    accepted: int = 0
    tokens: int = 0


def make_pairs(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    problems: Sequence[Problem],
    rewriter: Rewriter,
    out: str | Path,
    *,
    count: int | None = None,
    nll_margin: float = NLL_MARGIN,
    system: str | None = None,
    max_tokens: int = 2048,
    rows: int = ROWS,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Summary:
    """Write contrastive pairs to ``out``, rejections beside it; return what came of it.

    The model solves the problems, unsteered and greedily. Each solution that is correct and not
    cut off is rewritten, and the two make a pair if ``verify`` finds no fault. Problems are
    taken in order; with ``count``, until there are so many pairs. Started again with the same
    ``out``, a run goes on where it was.

    Raises:
        InputError: no problems, a margin that is no number, ``out`` or its journals belong to
            something else, or the rewriter gave up.
        DiskError: ``out`` cannot be written, or another process is writing it.
    """
    if not problems:
        raise InputError("no problems to solve; expected at least one.")
    if np.isnan(nll_margin):
        raise InputError("an NLL margin of nan; expected nats per token, such as 0.5.")
    files = Files(Path(out))
    files.check()
    header = journal_header(model, tokenizer, max_tokens, system)
    work_header = {**header, "format": FORMAT}
    with Journal(files.solved, header) as solved, Journal(files.rewrites, work_header) as rewrites:
        run = _Run(model, tokenizer, rewriter, solved, rewrites, system, nll_margin)
        run.state = Progress(len(problems))
        cases: list[Case] = []
        answers: list[Answer] = []
        for wave in _waves(problems, count, rows, cases):
            answers += run.solve(wave, max_tokens=max_tokens, rows=rows, progress=progress)
            cases += run.rewrite(wave, answers[-len(wave) :], progress)
    cases, taken = _first(cases, count, problems[: len(answers)])
    write(files, cases, inspect(model, tokenizer.name_or_path), system)
    return summarise(cases, answers[:taken])


def _waves(
    problems: Sequence[Problem], count: int | None, rows: int, cases: list[Case]
) -> Iterator[Sequence[Problem]]:
    """Yield problems until ``cases`` holds ``count`` accepted pairs; all at once without one."""
    if count is None:
        yield problems
        return
    begin = 0
    while begin < len(problems):
        accepted = sum(not case.reasons for case in cases)
        if accepted >= count:
            return
        rate = (accepted + 1) / (begin + 2)  # a half where nothing is known yet
        size = max(rows, min(4 * rows, round((count - accepted) / rate)))
        yield problems[begin : begin + size]
        begin += size


def _first(
    cases: list[Case], count: int | None, problems: Sequence[Problem]
) -> tuple[list[Case], int]:
    """Cut the cases after the last pair that is wanted, and say how many problems that took.

    So the files do not depend on how the problems were cut into waves.
    """
    accepted = [i for i, case in enumerate(cases) if not case.reasons]
    if count is None or len(accepted) < count:
        return cases, len(problems)
    kept = cases[: accepted[count - 1] + 1]
    return kept, [problem.id for problem in problems].index(kept[-1].problem.id) + 1


class _Run:
    """One run: the model, the rewriter and the journals."""

    def __init__(self, model, tokenizer, rewriter: Rewriter, solved: Journal, rewrites: Journal,
                 system: str | None, nll_margin: float):  # fmt: skip
        self.model, self.tokenizer, self.rewriter = model, tokenizer, rewriter
        self.solved, self.rewrites = solved, rewrites
        self.system, self.margin = system, nll_margin
        self.state = Progress(0)
        self._losses = {r["nll_of"]: r["nll"] for r in rewrites.records if "nll_of" in r}
        self._widest = max(map(len, tokenizer.get_vocab()))  # characters of one token

    def solve(
        self, problems: Sequence[Problem], *, max_tokens: int, rows: int,
        progress: Callable[[Progress], None],
    ) -> list[Answer]:  # fmt: skip
        before = self.state

        def tell(answers: list[Answer], tokens: int) -> None:
            self.state = replace(
                before, solved=before.solved + len(answers), tokens=before.tokens + tokens,
                correct=before.correct + sum(map(_is_usable, answers)),
            )  # fmt: skip
            progress(self.state)

        answers = answer(
            self.model, self.tokenizer, problems, [None], self.solved, system=self.system,
            max_tokens=max_tokens, rows=rows, with_nll=False, progress=tell,
        )  # fmt: skip
        tell(answers, self.state.tokens - before.tokens)  # all may have been there already
        return answers

    def rewrite(
        self, problems: Sequence[Problem], answers: Sequence[Answer],
        progress: Callable[[Progress], None],
    ) -> list[Case]:  # fmt: skip
        """Return a case for each usable answer, in order."""
        todo = [
            (p, a.text.strip()) for p, a in zip(problems, answers, strict=True) if _is_usable(a)
        ]
        made = self._made()
        keys = [_digest(problem.prompt, text, self.rewriter.name) for problem, text in todo]
        missing = [
            i for i, (_, text) in enumerate(todo)
            if keys[i] not in made and self._response(text).steps > 1
        ]  # fmt: skip
        drafts = [
            Draft(todo[i][0].id, todo[i][0].question, todo[i][1], self._response(todo[i][1]).tokens)
            for i in missing
        ]
        for index, rewrite in self.rewriter.rewrite(drafts):
            i = missing[index]
            if rewrite is not None:  # kept at once; the NLL, which takes a while, comes later
                made[keys[i]] = rewrite
                self.rewrites.append({
                    "problem": todo[i][0].id, "key": keys[i], "rewriter": self.rewriter.name,
                    "text": rewrite.text, "truncated": rewrite.truncated,
                })  # fmt: skip
            self.state = replace(self.state, rewritten=self.state.rewritten + 1)
            progress(self.state)
        return [
            self._case(problem, text, made.get(key), progress)
            for (problem, text), key in zip(todo, keys, strict=True)
        ]

    def _made(self) -> dict[str, Rewrite]:
        return {
            record["key"]: Rewrite(record["text"], record["truncated"])
            for record in self.rewrites.records if "key" in record
        }  # fmt: skip

    def _case(
        self, problem: Problem, text: str, rewrite: Rewrite | None,
        progress: Callable[[Progress], None],
    ) -> Case:  # fmt: skip
        prompt = encode_prompt(self.tokenizer, problem.prompt, system=self.system)
        original, made = self._response(text), None
        room = self.model.args.max_position_embeddings - len(prompt)
        longest = max(0, min(most_tokens(original.tokens), room))
        if rewrite is not None:
            # more characters than so many tokens can have are not read, whatever they are
            kept = rewrite.text.strip()[: longest * self._widest + 1]
            made = self._response(kept, rewrite.truncated)
        reasons = verify(problem, original, made, longest=longest)
        if made is not None and not reasons:
            losses = self._likelihoods(problem, prompt, original.text, made.text)
            original, made = replace(original, nll=losses[0]), replace(made, nll=losses[1])
            reasons = ("unlikely",) if is_unlikely(*losses, self.margin) else ()
        self.state = replace(
            self.state, checked=self.state.checked + 1,
            accepted=self.state.accepted + (not reasons),
        )  # fmt: skip
        progress(self.state)
        return Case(problem, original, made, self.rewriter.name, reasons)

    def _response(self, text: str, truncated: bool = False) -> Response:
        return Response(text, len(self._encode(text)), truncated=truncated)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _likelihoods(self, problem: Problem, prompt: list[int], *texts: str) -> list[float]:
        """Return both NLLs, from the journal if they are there.

        Always these two rows together: another batch would round otherwise, and a run that
        was cut off has to write the very bytes of one that was not.
        """
        key = _digest(problem.prompt, *texts)  # whoever wrote them
        if key in self._losses:
            return self._losses[key]
        values = nll(self.model, [prompt] * 2, [self._encode(text) for text in texts])
        values = [round(value, 5) for value in values]
        if np.isfinite(values).all():
            self._losses[key] = values
            self.rewrites.append({"nll_of": key, "nll": values})
        return values


def _is_usable(one: Answer) -> bool:
    return one.correct and not one.truncated and bool(one.text.strip())


def _digest(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
