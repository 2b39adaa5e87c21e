"""Problems over several ranks: each answers its share into its own journal and tells the others.

Every rank has the whole model. A run can be continued with another number of ranks.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Unpack

import mlx_lm

from .._version import __version__
from ..evaluation.answers import (
    Answer,
    Answerer,
    AnswerOptions,
    Under,
    answer,
    keys_of,
    read_answers,
)
from ..evaluation.journal import Journal
from ..evaluation.tasks import Problem
from ..model.model import Model
from .ranks import Ranks


@contextlib.contextmanager
def journal_over_ranks(
    path: str | Path, header: dict[str, object], ranks: Ranks
) -> Iterator[Journal]:
    """Open the journal of a run, on each of its ranks.

    Rank 0 writes ``path``, rank r ``path.rankr`` beside it, which is removed when all ranks are
    done. The next run takes over what a killed run left in such files on rank 0's machine.

    Raises:
        DistributedError: the ranks have different models or settings.
        InputError, DiskError: as ``Journal``.
    """
    path = Path(path)
    ranks.same(header, "models or settings")
    if ranks.rank:
        ranks.wait()
        own = path.with_name(f"{path.name}.rank{ranks.rank}")
        with Journal(own, header) as journal:
            yield journal
            ranks.wait()
        own.unlink(missing_ok=True)
        return
    with Journal(path, header) as journal:
        _take_over(journal, header)
        ranks.wait()
        yield journal
        ranks.wait()


def answer_over_ranks(ranks: Ranks) -> Answerer:
    """Return a function with which each of n ranks answers every n-th problem.

        evaluate(model, problems, journal=journal, answer=answer_over_ranks(ranks))

    Every rank has to call it with the same arguments and its own journal (``journal_over_ranks``),
    and gets all answers; rank 0's journal keeps them. For a single process it is ``answer``.

    Raises:
        DistributedError: the ranks have different problems, conditions, options or versions.
    """
    return answer if ranks.size == 1 else partial(_answer, ranks)


def _answer(
    ranks: Ranks,
    model: Model,
    problems: Sequence[Problem],
    conditions: Sequence[Under],
    **options: Unpack[AnswerOptions],
) -> list[Answer]:
    journal, progress = options["journal"], options.get("progress", lambda answers, tokens: None)
    ranks.same(_digest(problems, conditions, options), "problems, vectors, settings or versions")
    _exchange(ranks, journal)
    with_nll, vocabulary = options.get("with_nll", True), model.vocabulary
    done, todo = _split(problems, conditions, journal, with_nll, vocabulary)
    known = answer(model, done, conditions, **options | {"progress": lambda answers, tokens: None})
    mine = options | {
        "progress": lambda answers, tokens: progress([*known, *answers], tokens),
    }
    answer(model, ranks.mine(todo), conditions, **mine)
    _exchange(ranks, journal)
    return answer(model, problems, conditions, **options)  # from the journal: it has them all


def _split(
    problems: Sequence[Problem],
    conditions: Sequence[Under],
    journal: Journal,
    with_nll: bool,
    vocabulary: int,
) -> tuple[list[Problem], list[Problem]]:
    """Return the problems whose answers the journal holds in full, and the other problems."""
    known = read_answers(journal, vocabulary)

    def is_done(problem: Problem) -> bool:
        found = [known.get(key) for key in keys_of([problem], conditions)]
        return all(one and not (with_nll and one.lacks_nll) for one in found)

    done = {problem.id for problem in problems if is_done(problem)}
    return [p for p in problems if p.id in done], [p for p in problems if p.id not in done]


def _exchange(ranks: Ranks, journal: Journal) -> None:
    """Give every rank the records of all; rank 0 writes them, the others keep them in memory."""
    for part in ranks.gather(journal.records):
        for record in _new(journal, part):
            if ranks.speaks:
                journal.append(record)
            else:
                journal.records.append(record)


def _take_over(journal: Journal, header: dict[str, object]) -> None:
    """Add the records of other ranks' files beside a journal, and remove these files."""
    name = re.compile(re.escape(journal.path.name) + r"\.rank\d+")
    for part in sorted(journal.path.absolute().parent.iterdir()):
        if not name.fullmatch(part.name):
            continue
        with Journal(part, header) as left:
            for record in _new(journal, left.records):
                journal.append(record)
        part.unlink()


def _new(journal: Journal, records: Iterable[dict]) -> list[dict]:
    """Return the records that the journal lacks; an answer that two ranks gave counts once."""
    known = {_identity(record) for record in journal.records}
    return [record for record in records if _identity(record) not in known]


def _identity(record: dict) -> str:
    return json.dumps([record.get(name) for name in ("nll_of", "problem", "content", "steering")])


def _digest(
    problems: Sequence[Problem], conditions: Sequence[Under], options: AnswerOptions
) -> str:
    told = {key: value for key, value in options.items() if key not in ("journal", "progress")}
    versions = [__version__, mlx_lm.__version__]
    document = json.dumps([keys_of(problems, conditions), told, versions], sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()[:16]
