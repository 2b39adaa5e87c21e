"""Contrastive pairs from a model's own samples: draw, grade, take the shortest and the longest correct one.

A journal beside the output keeps every sample as it comes, so a killed run repeats nothing and a
later one with more samples goes on. The other files are written from it at the end.

Source: rejection sampling as in STaR (arXiv 2203.14465); the choice by length is this project's.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import InputError
from ..evaluation.answers import Answer, OnAnswers, answer, journal_header
from ..evaluation.journal import Journal
from ..evaluation.tasks import Problem
from ..generation.batch import ROWS
from ..generation.sampling import Sampling
from ..model.model import Model, takes_model
from ..model.prompt import encode_answer
from .make_pairs import (
    PAIR_FORMAT,
    SAMPLING,
    Files,
    described,
    draws,
    figures,
    means,
    up_to_count,
    waves,
    write_records,
)
from .verification import Response

SOLUTION_FORMAT = "mlx-densesteer solution 1"
SAMPLES = 8
LEAST = 10  # per cent of its tokens by which the longest sample exceeds the shortest

# in the order of the checks
REASONS = {
    "no correct sample": "no sample is correct and whole",
    "one correct sample": "all correct samples have one text: there is nothing to compare it with",
    "too alike": f"the longest correct sample has less than {LEAST} % more tokens than the shortest",
}


@dataclass(frozen=True)
class Sample:
    """A correct sample, and its number among the problem's samples."""

    number: int
    response: Response


@dataclass(frozen=True)
class SampleCase:
    """A problem, its shortest and its longest correct sample, and why they make no pair; none if they do.

    ``correct`` counts the correct samples. ``negative`` is ``None`` if they all have one text.
    """

    problem: Problem
    correct: int
    positive: Sample | None
    negative: Sample | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class SampleSummary:
    """What a run made.

    ``correct`` and ``truncated`` count samples, ``solved`` problems with a correct one. ``rejected``
    counts problems by reason. ``before`` (the longest) and ``after`` (the shortest) are means over the
    accepted pairs: ``steps``, ``tokens``, ``density`` in tokens per step; ``nll`` is not computed.
    """

    problems: int
    samples: int
    correct: int
    truncated: int
    solved: int
    accepted: int
    rejected: dict[str, int]
    before: dict[str, float | None]
    after: dict[str, float | None]


@takes_model
def sample_pairs(
    model: Model,
    problems: Sequence[Problem],
    out: str | Path,
    *,
    samples: int = SAMPLES,
    sampling: Sampling = SAMPLING,
    count: int | None = None,
    system: str | None = None,
    max_tokens: int = 2048,
    rows: int = ROWS,
    progress: OnAnswers = lambda answers, tokens: None,
) -> SampleSummary:
    """Write pairs of a model's own samples to ``out``, rejections and solutions beside it.

    The model answers each problem ``samples`` times, unsteered. Of the samples that are correct and
    not cut off, the one with the fewest tokens is the positive side, the one with the most the negative
    side; ``choose`` says when they make a pair. Problems are taken in order; with ``count``, until
    there are so many pairs. A run that is started again with the same ``out`` goes on where it was, also
    with more samples.

    Args:
        sampling: its seed, the problem and the sample's number seed each sample.
        progress: gets all samples so far, and the tokens generated in this run.

    Raises:
        InputError: no problems, fewer than 2 samples, a sampling that is greedy or without a seed, or
            ``out`` or its journal belong to something else.
        DiskError: ``out`` cannot be written, or another process is writing it.
    """
    if not problems:
        raise InputError("no problems to solve; expected at least one.")
    conditions = draws(samples, sampling)
    files = Files(Path(out))
    files.check(files.samples)
    cases: list[SampleCase] = []
    answers: list[Answer] = []
    before = generated = 0

    def tell(found: list[Answer], tokens: int) -> None:
        nonlocal generated
        generated = before + tokens
        progress([*answers, *found], generated)

    with Journal(files.samples, journal_header(model, max_tokens, system)) as journal:
        for wave in waves(problems, count, rows, cases):
            before = generated
            found = answer(
                model,
                wave,
                conditions,
                journal,
                system=system,
                max_tokens=max_tokens,
                rows=rows,
                with_nll=False,
                progress=tell,
            )
            answers += found
            for number, problem in enumerate(wave):
                drawn = found[number * samples : (number + 1) * samples]
                cases.append(
                    choose(problem, [_sample(model, i, one) for i, one in enumerate(drawn)])
                )
    cases, taken = up_to_count(cases, count, problems[: len(cases)])
    answers = answers[: taken * samples]
    told = _Told(model, system, samples, sampling)
    accepted = [case for case in cases if not case.reasons]
    rejected = [case for case in cases if case.reasons]
    solved = [case for case in cases if case.positive]
    write_records(files.pairs, map(told.pair, accepted))
    write_records(files.rejected, map(told.pair, rejected))
    write_records(files.solutions, map(told.solution, solved))
    return SampleSummary(
        problems=taken,
        samples=len(answers),
        correct=sum(case.correct for case in cases),
        truncated=sum(one.truncated for one in answers),
        solved=len(solved),
        accepted=len(accepted),
        rejected=dict(Counter(case.reasons[0] for case in rejected)),
        before=means([case.negative.response for case in accepted if case.negative]),
        after=means([case.positive.response for case in accepted if case.positive]),
    )


def choose(problem: Problem, samples: Sequence[Sample | None]) -> SampleCase:
    """Return the case of a problem; ``samples`` has ``None`` for each that is wrong or cut off.

    The shortest sample has the fewest tokens, then the fewest steps; the longest the most tokens, then
    the most steps; the earlier one if these are equal.
    """
    correct = [sample for sample in samples if sample is not None]
    if not correct:
        return SampleCase(problem, 0, None, None, ("no correct sample",))
    shortest = min(correct, key=lambda one: (one.response.tokens, one.response.steps))
    longest = max(correct, key=lambda one: (one.response.tokens, one.response.steps))
    if len({one.response.text for one in correct}) == 1:
        return SampleCase(problem, len(correct), shortest, None, ("one correct sample",))
    few, many = shortest.response.tokens, longest.response.tokens
    reasons = ("too alike",) if 100 * (many - few) < LEAST * few else ()
    return SampleCase(problem, len(correct), shortest, longest, reasons)


def _sample(model: Model, number: int, one: Answer) -> Sample | None:
    text = one.text.strip()
    if not one.correct or one.truncated or not text:
        return None
    return Sample(number, Response(text, len(encode_answer(model.tokenizer, text))))


@dataclass(frozen=True)
class _Told:
    """What the lines of a run have in common; see docs/pairs.md."""

    model: Model
    system: str | None
    samples: int
    sampling: Sampling

    def pair(self, case: SampleCase) -> dict[str, object]:
        sides = {"positive": case.positive, "negative": case.negative}
        record = {
            "format": PAIR_FORMAT,
            **self._problem(case.problem),
            **{side: one and one.response.text for side, one in sides.items()},
            "figures": {side: one and figures(one.response) for side, one in sides.items()},
            "rewriter": None,
            "sampling": {
                "samples": self.samples,
                "correct": case.correct,
                **asdict(self.sampling),
                **{side: one and one.number for side, one in sides.items()},
            },
            "model": described(self.model.info),
        }
        return record | ({"reasons": list(case.reasons)} if case.reasons else {})

    def solution(self, case: SampleCase) -> dict[str, object]:
        assert case.positive is not None
        return {
            "format": SOLUTION_FORMAT,
            **self._problem(case.problem),
            "response": case.positive.response.text,
            "figures": figures(case.positive.response),
            "sampling": {"samples": self.samples, "correct": case.correct, **asdict(self.sampling)},
            "model": described(self.model.info),
        }

    def _problem(self, problem: Problem) -> dict[str, object]:
        return {
            "id": problem.id,
            "prompt": problem.prompt,
            "system": self.system,
            "answer": problem.answer,
        }
