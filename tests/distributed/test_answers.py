"""A rank's share of the problems, and what it takes from the others, without their processes."""

import pytest

from mlx_densesteer.distributed.answers import answer_over_ranks, journal_over_ranks
from mlx_densesteer.distributed.ranks import Ranks
from mlx_densesteer.errors import DistributedError
from mlx_densesteer.evaluation.answers import answer, journal_header
from mlx_densesteer.evaluation.condition import Condition
from mlx_densesteer.evaluation.scoring import evaluate
from mlx_densesteer.evaluation.tasks import load_task
from mlx_densesteer.generation.sampling import Sampling
from mlx_densesteer.steering.request import resolve

OPTIONS = {"max_tokens": 16}


class OneOfTwo(Ranks):
    """Rank 0 or 1 of two; what records the other one tells is known beforehand."""

    def __init__(self, rank, *replies):
        super().__init__()
        self.rank, self.size, self.replies = rank, 2, list(replies)
        self.told = []

    def gather(self, value):
        other = value
        if isinstance(value, list):
            self.told.append(list(value))
            other = self.replies.pop(0)
        return [value, other] if self.rank == 0 else [other, value]


@pytest.fixture(scope="module")
def run(demo_model, tmp_path_factory):
    """Problems, steerings, the answers of one process, and its records by problem."""
    problems = load_task("demo", limit=3)
    steerings = [None, resolve(demo_model, "demo")]
    path = tmp_path_factory.mktemp("alone") / "a.jsonl"
    with journal_over_ranks(path, journal_header(demo_model, 16), Ranks()) as journal:
        answers = answer(demo_model, problems, steerings, journal, **OPTIONS)
        records = {
            problem.id: [r for r in journal.records if problem.id in (r.get("problem"), *r.get("nll_of", ()))]
            for problem in problems
        }  # fmt: skip
    return problems, steerings, answers, records


def plain(answers):
    return [(a.key, a.text, a.correct, round(a.nll, 4)) for a in answers]


def split(model, run, ranks, path):
    problems, steerings, *_ = run
    seen = []
    with journal_over_ranks(path, journal_header(model, 16), ranks) as journal:
        found = answer_over_ranks(ranks)(
            model, problems, steerings, journal=journal,
            progress=lambda answers, tokens: seen.append((len(answers), tokens)), **OPTIONS,
        )  # fmt: skip
        return found, journal.records, seen


def test_each_rank_answers_its_share_and_rank_0_keeps_all(demo_model, run, tmp_path):
    problems, _, expected, records = run
    first, second, third = (records[problem.id] for problem in problems)
    zero = OneOfTwo(0, [], second)
    found, kept, seen = split(demo_model, run, zero, tmp_path / "a.jsonl")
    assert plain(found) == plain(expected)
    assert {r["problem"] for r in zero.told[-1] if "text" in r} == {problems[0].id, problems[2].id}
    assert len(kept) == 12 and max(count for count, _ in seen) == 6
    assert (tmp_path / "a.jsonl").read_text().count("\n") == 1 + 12

    one = OneOfTwo(1, [], [*first, *third])
    found, kept, seen = split(demo_model, run, one, tmp_path / "b.jsonl")
    assert plain(found) == plain(expected) and len(kept) == 12
    assert {r["problem"] for r in one.told[-1] if "text" in r} == {problems[1].id}
    assert list(tmp_path.iterdir()) == [tmp_path / "a.jsonl"]  # rank 1's file has gone


def test_a_run_goes_on_with_what_any_rank_has(demo_model, run, tmp_path):
    """All that another machine has kept, wanted by this run or not, since its file goes."""
    problems, steerings, expected, records = run
    everything = [record for part in records.values() for record in part]
    ranks = OneOfTwo(0, everything, [])
    part = problems[:1], steerings[:1], *run[2:]
    found, kept, seen = split(demo_model, part, ranks, tmp_path / "a.jsonl")
    assert plain(found) == plain(expected[:1]) and kept == everything
    assert all(not tokens for _, tokens in seen)

    # and what a killed run left beside the journal, with no other rank
    header, *lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "c.jsonl").write_text(header + "".join(lines[::2]))
    (tmp_path / "c.jsonl.rank1").write_text(header + "".join(lines[::4] + lines[1::2]))
    (tmp_path / "c.jsonl.rank1.mine").write_text("another file")
    with journal_over_ranks(
        tmp_path / "c.jsonl", journal_header(demo_model, 16), Ranks()
    ) as journal:
        scores, answers = evaluate(
            demo_model, problems, steering=steerings[1], journal=journal,
            answer=answer_over_ranks(Ranks()), **OPTIONS,
        )  # fmt: skip
    assert plain(answers) == plain(expected) and scores["steered"].problems == 3
    kept = (tmp_path / "c.jsonl").read_text().splitlines(keepends=True)
    assert sorted(kept) == sorted([header, *lines])
    assert sorted(p.name for p in tmp_path.glob("c*")) == ["c.jsonl", "c.jsonl.rank1.mine"]


def test_other_problems_on_another_rank_are_refused(demo_model, run, tmp_path):
    class Differs(OneOfTwo):
        def gather(self, value):
            return [value, "another"] if isinstance(value, str) else super().gather(value)

    with pytest.raises(DistributedError, match="the ranks have different problems, vectors"):
        split(demo_model, run, Differs(0), tmp_path / "a.jsonl")


def test_other_conditions_than_steerings_are_spread_too(demo_model, tmp_path):
    problems = load_task("demo", limit=2)
    conditions = [Condition(prefix="So"), Condition(sampling=Sampling(1.0, seed=2), number=1)]
    path = tmp_path / "alone.jsonl"
    with journal_over_ranks(path, journal_header(demo_model, 16), Ranks()) as journal:
        expected = answer(demo_model, problems, conditions, journal, **OPTIONS)
        theirs = [
            r for r in journal.records if problems[1].id in (r.get("problem"), *r.get("nll_of", ()))
        ]
    zero = OneOfTwo(0, [], theirs)
    found, kept, _ = split(demo_model, (problems, conditions), zero, tmp_path / "a.jsonl")
    assert plain(found) == plain(expected) and len(kept) == 8
    assert all(one.text.startswith("So") for one in found[::2])
