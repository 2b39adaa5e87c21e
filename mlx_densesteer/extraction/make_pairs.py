"""Contrastive pairs from a model's own solutions: solve, rewrite, verify, write.

Two journals beside the output keep every answer, every rewrite and its NLL as they come, so a
killed run repeats nothing. The files of pairs and of rejections are written from them at the end.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from ..errors import InputError
from ..evaluation.answers import Answer, answer, journal_header
from ..evaluation.condition import Condition
from ..evaluation.journal import Journal, not_a_record
from ..evaluation.tasks import Problem
from ..files import atomic_file, check_fields, file_to_replace
from ..generation.batch import ROWS
from ..generation.sampling import Sampling
from ..model.likelihood import nll
from ..model.model import Model, ModelInfo, takes_model
from ..model.prompt import encode_answer, encode_prompt
from .rewriting import Original, Rewrite, Rewriter
from .verification import (
    NLL_MARGIN,
    Response,
    is_unlikely,
    may_be_rewritten,
    most_tokens,
    new_numbers,
    verify,
)

SAMPLING = Sampling(temp=0.7, seed=0)
FORMAT = "mlx-densesteer rewrites 1"  # of the second journal
PAIR_FORMAT = "mlx-densesteer pair 1"
PER_PROBLEM = 2  # samples of a problem that are rewritten, at most: else the easy ones would rule


@dataclass(frozen=True)
class Case:
    """A solved problem, its rewrite, and the reasons of its rejection; none if accepted.

    ``sample`` is the solution's number among the problem's samples, ``None`` if it is greedy.
    """

    problem: Problem
    original: Response
    rewrite: Response | None
    reasons: tuple[str, ...]
    sample: int | None = None


class Judged(Protocol):
    """A problem, and why it makes no pair."""

    @property
    def problem(self) -> Problem: ...

    @property
    def reasons(self) -> tuple[str, ...]: ...


J = TypeVar("J", bound=Judged)


@dataclass(frozen=True)
class Summary:
    """What a run made.

    ``wrong`` and ``truncated`` count answers: of a problem there may be several samples.
    ``rejected`` counts each rejection under its first reason. ``before`` and ``after`` are means
    over the accepted pairs: ``steps``, ``tokens``, ``density`` in tokens per step, and ``nll`` in
    nats per token.
    """

    problems: int
    wrong: int
    truncated: int
    accepted: int
    rejected: dict[str, int]
    before: dict[str, float | None]
    after: dict[str, float | None]


@dataclass(frozen=True)
class Files:
    """The files of a run: the pairs, and beside them the rejections and the journals."""

    pairs: Path

    @property
    def rejected(self) -> Path:
        return self.pairs.with_name(f"{self.pairs.stem}.rejected{self.pairs.suffix}")

    @property
    def solved(self) -> Path:
        return self.pairs.with_name(f"{self.pairs.name}.solved.jsonl")

    @property
    def rewrites(self) -> Path:
        return self.pairs.with_name(f"{self.pairs.name}.rewrites.jsonl")

    @property
    def samples(self) -> Path:
        """The journal of ``sample_pairs``."""
        return self.pairs.with_name(f"{self.pairs.name}.samples.jsonl")

    @property
    def solutions(self) -> Path:
        """What ``sample_pairs`` writes of every solved problem."""
        return self.pairs.with_name(f"{self.pairs.stem}.solutions{self.pairs.suffix}")

    def check(self, journal: Path) -> None:
        """Raise unless a run with this journal may write ``pairs``.

        Raises:
            InputError: ``pairs`` exists, and the journal does not.
            DiskError: it cannot be written.
        """
        file_to_replace(self.pairs)
        if self.pairs.exists() and not journal.exists():
            raise InputError(
                f"{self.pairs}: is there already, without the journal of a run that could go on "
                f"({journal.name}). Name another file, or move this one away."
            )


@dataclass(frozen=True)
class PairsProgress:
    """How far a run is: counts of problems, and tokens generated so far.

    ``rewritten`` counts the rewrites of this run, ``checked`` those of earlier runs too. With samples,
    each of them counts as a problem.
    """

    problems: int
    solved: int = 0
    correct: int = 0
    rewritten: int = 0
    checked: int = 0
    accepted: int = 0
    tokens: int = 0


Progress = Callable[[PairsProgress], None]


@takes_model
def make_pairs(
    model: Model,
    problems: Sequence[Problem],
    rewriter: Rewriter,
    out: str | Path,
    *,
    count: int | None = None,
    nll_margin: float = NLL_MARGIN,
    samples: int | None = None,
    sampling: Sampling = SAMPLING,
    system: str | None = None,
    max_tokens: int = 2048,
    rows: int = ROWS,
    progress: Progress = lambda state: None,
) -> Summary:
    """Write contrastive pairs to ``out`` and rejections beside it; return a summary.

    The model solves the problems, unsteered. Each solution that is correct and not cut off is
    rewritten, and the two make a pair if ``verify`` finds no fault. Problems are taken in order; with
    ``count``, until there are so many pairs. A run that is started again with the same ``out`` goes on
    where it was.

    Args:
        samples: how often each problem is solved, as ``sampling`` draws; the first ``PER_PROBLEM`` solutions
            with different texts are rewritten. ``None`` is once, greedily.

    Raises:
        InputError: no problems, a margin that is no number, a sampling that is greedy or without a seed,
            ``out`` or its journals belong to something else, or the rewriter gave up.
        DiskError: ``out`` cannot be written, or another process is writing it.
    """
    if not problems:
        raise InputError("no problems to solve; expected at least one.")
    if np.isnan(nll_margin):
        raise InputError("an NLL margin of nan; expected nats per token, such as 0.5.")
    conditions = [None] if samples is None else draws(samples, sampling)
    files = Files(Path(out))
    journal = files.solved if samples is None else files.samples
    files.check(journal)
    header = journal_header(model, max_tokens, system)
    work_header = {**header, "format": FORMAT}
    cases: list[Case] = []
    answers: list[Answer] = []
    with Journal(journal, header) as solved, Journal(files.rewrites, work_header) as rewrites:
        run = _Run(
            model,
            rewriter,
            conditions,
            solved,
            rewrites,
            system,
            nll_margin,
            len(problems),
            progress,
        )
        for wave in waves(problems, count, rows, cases):
            found = run.solve(wave, max_tokens, rows)
            cases += run.rewrite(wave, found)
            answers += found
    each = len(conditions)
    cases, taken = up_to_count(cases, count, problems[: len(answers) // each])
    answers = answers[: taken * each]
    accepted = [case for case in cases if not case.reasons]
    rejected = [case for case in cases if case.reasons]
    for path, kept in ((files.pairs, accepted), (files.rejected, rejected)):
        write_records(
            path,
            (
                _record(case, rewriter.name, model.info, system, samples and sampling)
                for case in kept
            ),
        )
    return Summary(
        problems=taken,
        wrong=sum(not one.correct and not one.truncated for one in answers),
        truncated=sum(one.truncated for one in answers),
        accepted=len(accepted),
        rejected=dict(Counter(case.reasons[0] for case in rejected)),
        before=means([case.original for case in accepted]),
        after=means([case.rewrite for case in accepted if case.rewrite]),
    )


def draws(samples: int, sampling: Sampling) -> list[Condition]:
    """Return the conditions of a problem's samples.

    Raises:
        InputError: fewer than 2 samples, a sampling that is greedy or without a seed.
    """
    if samples < 2:
        raise InputError(f"{samples} samples of a problem: expected at least 2, to compare.")
    if not sampling.temp:
        raise InputError(
            "temperature 0: all samples would be the same; expected more, such as 0.7."
        )
    return [Condition(sampling=sampling, number=number) for number in range(samples)]


def write_records(path: Path, records: Iterable[dict[str, object]]) -> None:
    """Write a JSONL file, whole or not at all."""
    with atomic_file(path) as file:
        for record in records:
            file.write(f"{json.dumps(record, ensure_ascii=False, allow_nan=False)}\n".encode())


def waves(
    problems: Sequence[Problem], count: int | None, rows: int, cases: Sequence[Judged]
) -> Iterator[Sequence[Problem]]:
    """Yield problems until ``cases`` holds ``count`` pairs; all at once without ``count``."""
    if count is None:
        yield problems
        return
    begin = 0
    while begin < len(problems):
        accepted = sum(not case.reasons for case in cases)
        if accepted >= count:
            return
        rate = (accepted + 1) / (begin + 2)  # a half before the first wave
        size = max(rows, min(4 * rows, round((count - accepted) / rate)))
        yield problems[begin : begin + size]
        begin += size


def up_to_count(
    cases: list[J], count: int | None, problems: Sequence[Problem]
) -> tuple[list[J], int]:
    """Cut the cases after pair number ``count``; return them and how many problems that took.

    The files then do not depend on the size of the waves.
    """
    accepted = [i for i, case in enumerate(cases) if not case.reasons]
    if count is None or len(accepted) < count:
        return cases, len(problems)
    kept = cases[: accepted[count - 1] + 1]
    return kept, [problem.id for problem in problems].index(kept[-1].problem.id) + 1


def _record(
    case: Case, rewriter: str, info: ModelInfo, system: str | None, sampling: Sampling | None
) -> dict[str, object]:
    """Return a line of the pairs or of the rejections; see docs/pairs.md."""
    problem, original, rewrite = case.problem, case.original, case.rewrite
    record: dict[str, object] = {
        "format": PAIR_FORMAT,
        "id": problem.id,
        "prompt": problem.prompt,
        "system": system,
        "answer": problem.answer,
        "positive": rewrite.text if rewrite else None,
        "negative": original.text,
        "figures": {
            "positive": figures(rewrite) if rewrite else None,
            "negative": figures(original),
        },
        "rewriter": rewriter,
        "model": described(info),
    }
    if sampling:
        record["sampling"] = {**asdict(sampling), "negative": case.sample}
    if case.reasons:
        record["reasons"] = list(case.reasons)
        text = rewrite.text if rewrite else ""
        record["new_numbers"] = new_numbers(problem, original.text, text)
    return record


def described(info: ModelInfo) -> dict[str, object]:
    """Return what a line says of the target model."""
    return {
        "name": info.name,
        "fingerprint": info.fingerprint,
        "dtype": info.dtype,
        "quantization": info.quantization,
    }


def figures(response: Response) -> dict[str, float | None]:
    """Return tokens, steps, density and NLL as plain values."""
    rho, loss = response.density, response.nll
    return {
        "tokens": response.tokens,
        "steps": response.steps,
        "density": None if rho is None else round(rho, 3),
        "nll": loss if loss is not None and isfinite(loss) else None,
    }


def means(responses: Sequence[Response]) -> dict[str, float | None]:
    """Return the means of the figures, ``None`` where no response has one."""
    rows = [figures(response) for response in responses]
    names = ("steps", "tokens", "density", "nll")
    found = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    return {n: round(sum(v) / len(v), 4) if v else None for n, v in found.items()}


class _Run:
    """One run: the model, the rewriter, the journals, and how far it is."""

    def __init__(
        self,
        model: Model,
        rewriter: Rewriter,
        conditions: Sequence[Condition | None],
        solved: Journal,
        rewrites: Journal,
        system: str | None,
        nll_margin: float,
        problems: int,
        progress: Progress,
    ):
        self.model, self.rewriter, self.conditions = model, rewriter, conditions
        self.solved, self.rewrites = solved, rewrites
        self.system, self.margin = system, nll_margin
        self.state, self.progress = PairsProgress(problems * len(conditions)), progress
        self._made, self._losses = _read_rewrites(rewrites)
        self._widest = max(map(len, model.tokenizer.get_vocab()))  # characters of one token

    def solve(self, problems: Sequence[Problem], max_tokens: int, rows: int) -> list[Answer]:
        before = self.state

        def tell(answers: list[Answer], tokens: int) -> None:
            self._tell(
                solved=before.solved + len(answers),
                correct=before.correct + sum(map(_is_usable, answers)),
                tokens=before.tokens + tokens,
            )

        answers = answer(
            self.model,
            problems,
            self.conditions,
            self.solved,
            system=self.system,
            max_tokens=max_tokens,
            rows=rows,
            with_nll=False,
            progress=tell,
        )
        tell(answers, self.state.tokens - before.tokens)  # the journal may have had all of them
        return answers

    def rewrite(self, problems: Sequence[Problem], answers: Sequence[Answer]) -> list[Case]:
        """Return a case for each usable answer, in order: of a problem's samples the first few that differ."""
        sampled = self.conditions != [None]
        todo: list[tuple[Problem, Response]] = []
        numbers: list[int | None] = []
        each = len(self.conditions)
        for index, problem in enumerate(problems):
            texts: set[str] = set()
            for number, one in enumerate(answers[index * each : (index + 1) * each]):
                text = one.text.strip()
                if _is_usable(one) and text not in texts and len(texts) < PER_PROBLEM:
                    texts.add(text)
                    todo.append((problem, self._response(text)))
                    numbers.append(number if sampled else None)
        rewriter, made = self.rewriter, self._made
        keys = [_digest(p.prompt, original.text, rewriter.name) for p, original in todo]
        missing = [
            (key, problem, original)
            for key, (problem, original) in zip(keys, todo, strict=True)
            if key not in made and may_be_rewritten(original, shorter=rewriter.shorter)
        ]
        asked = [
            Original(problem.id, problem.question, original.text, original.tokens, problem.prompt)
            for _, problem, original in missing
        ]
        for index, rewrite in rewriter.rewrite(asked):
            if rewrite is not None:  # kept at once: its NLL takes a while
                key, problem, _ = missing[index]
                made[key] = rewrite
                self.rewrites.append(
                    {
                        "problem": problem.id,
                        "key": key,
                        "rewriter": rewriter.name,
                        "text": rewrite.text,
                        "truncated": rewrite.truncated,
                    }
                )
            self._tell(rewritten=self.state.rewritten + 1)
        return [
            replace(self._case(problem, original, made.get(key)), sample=number)
            for key, number, (problem, original) in zip(keys, numbers, todo, strict=True)
        ]

    def _case(self, problem: Problem, original: Response, rewrite: Rewrite | None) -> Case:
        prompt = encode_prompt(self.model.tokenizer, problem.prompt, system=self.system)
        longest = self.model.room(len(prompt), most_tokens(original.tokens))
        made = None
        if rewrite is not None:
            # `longest` tokens never have more characters: a longer text is not tokenised whole
            text = rewrite.text.strip()[: longest * self._widest + 1]
            made = self._response(text, rewrite.truncated)
        reasons = verify(problem, original, made, longest=longest, shorter=self.rewriter.shorter)
        if made is not None and not reasons:
            losses = self._likelihoods(problem, prompt, original.text, made.text)
            original, made = replace(original, nll=losses[0]), replace(made, nll=losses[1])
            reasons = ("unlikely",) if is_unlikely(*losses, self.margin) else ()
        self._tell(checked=self.state.checked + 1, accepted=self.state.accepted + (not reasons))
        return Case(problem, original, made, reasons)

    def _tell(self, **counts: int) -> None:
        self.state = replace(self.state, **counts)
        self.progress(self.state)

    def _response(self, text: str, truncated: bool = False) -> Response:
        return Response(text, len(self._encode(text)), truncated=truncated)

    def _encode(self, text: str) -> list[int]:
        return encode_answer(self.model.tokenizer, text)

    def _likelihoods(self, problem: Problem, prompt: list[int], *texts: str) -> list[float]:
        """Return both NLLs, from the journal if they are there.

        The two are always one batch: another batch rounds differently, and a run that was cut off
        must write the same bytes as one that was not.
        """
        key = _digest(problem.prompt, *texts)
        if key in self._losses:
            return self._losses[key]
        values = nll(self.model.network, [prompt] * 2, [self._encode(text) for text in texts])
        values = [round(value, 5) for value in values]
        if np.isfinite(values).all():
            self._losses[key] = values
            self.rewrites.append({"nll_of": key, "nll": values})
        return values


def _read_rewrites(journal: Journal) -> tuple[dict[str, Rewrite], dict[str, list[float]]]:
    """Return the rewrites that a journal holds by key, and the NLLs of both texts.

    Raises:
        InputError: a record is neither.
    """
    made: dict[str, Rewrite] = {}
    losses: dict[str, list[float]] = {}
    for number, record in enumerate(journal.records, 2):
        try:
            if "nll_of" in record:
                check_fields(record, nll_of=str, nll=list)
                before, after = map(float, record["nll"])
                losses[record["nll_of"]] = [before, after]
            else:
                check_fields(record, key=str, text=str, truncated=bool)
                made[record["key"]] = Rewrite(record["text"], record["truncated"])
        except (KeyError, TypeError, ValueError) as error:
            raise not_a_record(journal, number, "rewrite", error) from error
    return made, losses


def _is_usable(one: Answer) -> bool:
    return one.correct and not one.truncated and bool(one.text.strip())


def _digest(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
