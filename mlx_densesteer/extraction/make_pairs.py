"""Contrastive pairs from a model's own solutions: solve, rewrite, verify, write.

Two journals beside the output hold the work: every answer, every rewrite and its NLL, as they
come. What they hold is not done again, whatever killed the run before. The files of pairs and
of rejections are a function of the journals and are written at the end.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..evaluation.answers import Answer, answer, journal_header
from ..evaluation.journal import Journal
from ..evaluation.tasks import Problem
from ..files import atomic_file
from ..generation.batch import ROWS
from ..model.likelihood import nll
from ..model.model import Model, ModelInfo, takes_model
from ..model.prompt import encode_prompt
from .rewriting import Original, Rewrite, Rewriter
from .verification import NLL_MARGIN, Response, is_unlikely, most_tokens, new_numbers, verify

FORMAT = "mlx-densesteer rewrites 1"  # of the second journal


PAIR_FORMAT = "mlx-densesteer pair 1"


@dataclass(frozen=True)
class Case:
    """A problem that the target solved, and what became of its rewrite."""

    problem: Problem
    original: Response
    rewrite: Response | None
    rewriter: str
    reasons: tuple[str, ...]  # of the rejection; none: accepted


@dataclass(frozen=True)
class Summary:
    """What a run made. ``before`` and ``after`` are means over the accepted pairs.

    ``rejected`` counts under the first reason of each; ``steps``, ``tokens``, ``density`` in
    tokens per step and ``nll`` in nats per token.
    """

    problems: int
    wrong: int
    truncated: int
    accepted: int
    rejected: dict[str, int]
    before: dict[str, float | None]
    after: dict[str, float | None]

    def describe(self) -> dict[str, object]:
        """Return plain values for JSON output."""
        return asdict(self)


@dataclass(frozen=True)
class Files:
    """Where a run keeps things: the pairs, the rejections, and the two journals."""

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

    def check(self) -> None:
        """Raise unless the pairs are missing or a run's own."""
        if self.pairs.exists() and not self.solved.exists():
            raise InputError(
                f"{self.pairs}: is there already, without the journal of a run that could go on "
                f"({self.solved.name}). Name another file, or move this one away."
            )


def _record(case: Case, info: ModelInfo, system: str | None) -> dict[str, object]:
    """Return a line of the pairs or of the rejections; docs/pairs.md describes it."""
    positive = case.rewrite.text if case.rewrite else None
    record: dict[str, object] = {
        "format": PAIR_FORMAT,
        "id": case.problem.id,
        "prompt": case.problem.prompt,
        "system": system,
        "answer": case.problem.answer,
        "positive": positive,
        "negative": case.original.text,
        "figures": {
            "positive": _figures(case.rewrite) if case.rewrite else None,
            "negative": _figures(case.original),
        },
        "rewriter": case.rewriter,
        "model": {
            "name": info.name, "fingerprint": info.fingerprint, "dtype": info.dtype,
            "quantization": info.quantization,
        },
    }  # fmt: skip
    if case.reasons:
        record["reasons"] = list(case.reasons)
        record["new_numbers"] = new_numbers(case.problem, case.original.text, positive or "")
    return record


def _figures(response: Response) -> dict[str, float | None]:
    rho = response.density
    loss = response.nll
    return {
        "tokens": response.tokens,
        "steps": response.steps,
        "density": None if rho is None else round(rho, 3),
        "nll": loss if loss is not None and isfinite(loss) else None,
    }


def _write_pairs(files: Files, cases: Sequence[Case], info: ModelInfo, system: str | None) -> None:
    """Write both files; each appears whole or not at all."""
    _write_records(files.pairs, [_record(case, info, system) for case in cases if not case.reasons])
    _write_records(files.rejected, [_record(case, info, system) for case in cases if case.reasons])


def _write_records(path: Path, records: Sequence[dict[str, object]]) -> None:
    with atomic_file(path) as file:
        for record in records:
            line = json.dumps(record, ensure_ascii=False, allow_nan=False)
            file.write(f"{line}\n".encode())


def _summarise(cases: Sequence[Case], answers: Sequence[Answer]) -> Summary:
    accepted = [case for case in cases if not case.reasons]
    return Summary(
        problems=len(answers),
        wrong=sum(not one.correct and not one.truncated for one in answers),
        truncated=sum(one.truncated for one in answers),
        accepted=len(accepted),
        rejected=dict(Counter(case.reasons[0] for case in cases if case.reasons)),
        before=_means([_figures(case.original) for case in accepted]),
        after=_means([_figures(case.rewrite) for case in accepted if case.rewrite]),
    )


def _means(rows: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    names = ("steps", "tokens", "density", "nll")
    found = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    return {n: round(sum(v) / len(v), 4) if v else None for n, v in found.items()}


@dataclass(frozen=True)
class PairsProgress:
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


@takes_model
def make_pairs(
    model: Model,
    problems: Sequence[Problem],
    rewriter: Rewriter,
    out: str | Path,
    *,
    count: int | None = None,
    nll_margin: float = NLL_MARGIN,
    system: str | None = None,
    max_tokens: int = 2048,
    rows: int = ROWS,
    progress: Callable[[PairsProgress], None] = lambda _: None,
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
    header = journal_header(model, max_tokens, system)
    work_header = {**header, "format": FORMAT}
    with Journal(files.solved, header) as solved, Journal(files.rewrites, work_header) as rewrites:
        run = _Run(model, rewriter, solved, rewrites, system, nll_margin)
        run.state = PairsProgress(len(problems))
        cases: list[Case] = []
        answers: list[Answer] = []
        for wave in _waves(problems, count, rows, cases):
            answers += run.solve(wave, max_tokens=max_tokens, rows=rows, progress=progress)
            cases += run.rewrite(wave, answers[-len(wave) :], progress)
    cases, taken = _first(cases, count, problems[: len(answers)])
    _write_pairs(files, cases, model.info, system)
    return _summarise(cases, answers[:taken])


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

    def __init__(
        self, model: Model, rewriter: Rewriter, solved: Journal, rewrites: Journal,
        system: str | None, nll_margin: float,
    ):  # fmt: skip
        self.model, self.tokenizer, self.rewriter = model, model.tokenizer, rewriter
        self.solved, self.rewrites = solved, rewrites
        self.system, self.margin = system, nll_margin
        self.state = PairsProgress(0)
        self._losses = {r["nll_of"]: r["nll"] for r in rewrites.records if "nll_of" in r}
        self._widest = max(map(len, model.tokenizer.get_vocab()))  # characters of one token

    def solve(
        self, problems: Sequence[Problem], *, max_tokens: int, rows: int,
        progress: Callable[[PairsProgress], None],
    ) -> list[Answer]:  # fmt: skip
        before = self.state

        def tell(answers: list[Answer], tokens: int) -> None:
            self.state = replace(
                before, solved=before.solved + len(answers), tokens=before.tokens + tokens,
                correct=before.correct + sum(map(_is_usable, answers)),
            )  # fmt: skip
            progress(self.state)

        answers = answer(
            self.model, problems, [None], self.solved, system=self.system,
            max_tokens=max_tokens, rows=rows, with_nll=False, progress=tell,
        )  # fmt: skip
        tell(answers, self.state.tokens - before.tokens)  # all may have been there already
        return answers

    def rewrite(
        self, problems: Sequence[Problem], answers: Sequence[Answer],
        progress: Callable[[PairsProgress], None],
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
        originals = [
            Original(
                todo[i][0].id, todo[i][0].question, todo[i][1], self._response(todo[i][1]).tokens
            )
            for i in missing
        ]
        for index, rewrite in self.rewriter.rewrite(originals):
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
        progress: Callable[[PairsProgress], None],
    ) -> Case:  # fmt: skip
        prompt = encode_prompt(self.tokenizer, problem.prompt, system=self.system)
        original, made = self._response(text), None
        longest = self.model.room(len(prompt), most_tokens(original.tokens))
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
        key = _digest(problem.prompt, *texts)
        if key in self._losses:
            return self._losses[key]
        values = nll(self.model.network, [prompt] * 2, [self._encode(text) for text in texts])
        values = [round(value, 5) for value in values]
        if np.isfinite(values).all():
            self._losses[key] = values
            self.rewrites.append({"nll_of": key, "nll": values})
        return values


def _is_usable(one: Answer) -> bool:
    return one.correct and not one.truncated and bool(one.text.strip())


def _digest(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
