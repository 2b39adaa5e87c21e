"""The files of a run that makes pairs: pairs, rejections, summary. No mlx."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..evaluation.tasks import Problem
from ..files import atomic_file
from .verification import Response, new_numbers

if TYPE_CHECKING:
    from ..evaluation.answers import Answer
    from ..model.model import ModelInfo

FORMAT = "mlx-densesteer pair 1"


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


def _record(case: Case, info: "ModelInfo", system: str | None) -> dict[str, object]:
    """Return a line of the pairs or of the rejections; docs/pairs.md describes it."""
    positive = case.rewrite.text if case.rewrite else None
    record: dict[str, object] = {
        "format": FORMAT,
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


def write(files: Files, cases: Sequence[Case], info: "ModelInfo", system: str | None) -> None:
    """Write both files; each appears whole or not at all."""
    _write(files.pairs, [_record(case, info, system) for case in cases if not case.reasons])
    _write(files.rejected, [_record(case, info, system) for case in cases if case.reasons])


def _write(path: Path, records: Sequence[dict[str, object]]) -> None:
    with atomic_file(path) as file:
        for record in records:
            line = json.dumps(record, ensure_ascii=False, allow_nan=False)
            file.write(f"{line}\n".encode())


def summarise(cases: Sequence[Case], answers: Sequence["Answer"]) -> Summary:
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
