"""Answering, evaluation and the grid: on a tiny model, and their resuming."""

import contextlib
import json
from dataclasses import replace

import pytest

import mlx_densesteer as ds
from mlx_densesteer.errors import InputError, ModelError, VectorMismatchError
from mlx_densesteer.evaluation.answers import answer, by_steering, journal_header
from mlx_densesteer.evaluation.journal import Journal
from mlx_densesteer.evaluation.recommendation import Recommendation
from mlx_densesteer.evaluation.scoring import evaluate
from mlx_densesteer.evaluation.sweep import settings_of, sweep, table, with_recommendation
from mlx_densesteer.evaluation.tasks import Problem
from mlx_densesteer.model.likelihood import nll
from mlx_densesteer.model.prompt import encode_prompt

PROBLEMS = [
    Problem(f"p-{i}", text, text, gold, "number")
    for i, (text, gold) in enumerate(
        [("What is 1 + 1?", "2"), ("And 30 / 5?", "6"), ("7 * 8 is", "56"), ("Say 4.", "4")]
    )
]
TOKENS = 12


@pytest.fixture(scope="module")
def model(hf_folder, tmp_path_factory):
    folder = ds.convert(hf_folder, tmp_path_factory.mktemp("m") / "t", bits=None, dtype="float32")
    return ds.load(folder)


@pytest.fixture
def vector(make_vector):
    return make_vector(size=0.5)


def keep(model, path):
    return Journal(path, journal_header(model, TOKENS))


class Norms:
    """A model of which only the norms of the residual stream are known."""

    def __init__(self, norms):
        self._norms = norms

    def norms(self, vector, layers):
        return {layer: self._norms[layer] for layer in layers}


NORMS = Norms(dict.fromkeys(range(4), 10.0))


def test_every_cell_of_the_grid_equals_the_same_setting_run_alone(model, vector):
    settings = settings_of(model, vector, [0, 2], [-2, 0, "1", "25%"])
    assert len(settings) == 1 + 2 * 3  # strength 0 once
    answers = answer(model, PROBLEMS, [s.steering for s in settings], max_tokens=TOKENS)
    groups = by_steering(answers)
    assert len(answers) == len(PROBLEMS) * len(settings)
    for setting in settings:
        for problem in PROBLEMS:
            alone = ds.generate(model, problem.prompt, steering=setting.steering, max_tokens=TOKENS)
            cell = groups[setting.fingerprint][problem.id]
            assert (cell.text, cell.token_ids) == (alone.text, alone.token_ids)
            assert (cell.steps, cell.finish_reason) == (alone.steps, alone.finish_reason)
    assert len({one.token_ids for one in answers if one.problem == "p-0"}) > 3


def test_the_likelihood_is_that_of_the_unsteered_model(model, vector):
    steering = ds.Steering(vector, 4.0, (2,))
    answers = answer(model, PROBLEMS, [None, steering], max_tokens=TOKENS)
    prompts = [encode_prompt(model.tokenizer, p.prompt) for p in PROBLEMS for _ in range(2)]
    expected = nll(model.network, prompts, [one.token_ids for one in answers])
    assert [one.nll for one in answers] == pytest.approx(expected, abs=1e-5)


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 7, 15])
def test_an_interrupted_run_goes_on_and_ends_the_same(model, vector, tmp_path, after):
    steerings = [None, ds.Steering(vector, 2.0, (1,)), ds.Steering(vector, -2.0, (3,))]
    options = {"max_tokens": TOKENS, "rows": 4}
    whole = answer(model, PROBLEMS, steerings, **options)
    calls = 0

    def stop(answers, tokens):
        nonlocal calls
        calls += 1
        if calls == after:
            raise Stop

    path = tmp_path / "a.jsonl"
    with keep(model, path) as journal, contextlib.suppress(Stop):
        answer(model, PROBLEMS, steerings, journal, progress=stop, **options)
    before = path.read_text().splitlines()
    with keep(model, path) as journal:
        kept = len(journal.records)
        again = answer(model, PROBLEMS, steerings, journal, **options)
    lines = path.read_text().splitlines()
    assert lines[: len(before)] == before
    assert kept > 0 and len(lines) == 1 + 2 * len(whole)  # nothing was done twice
    strip = [(a.problem, a.steering, a.token_ids, a.correct) for a in again]
    assert strip == [(a.problem, a.steering, a.token_ids, a.correct) for a in whole]
    assert [a.nll for a in again] == pytest.approx([a.nll for a in whole], abs=1e-5)


def test_one_journal_grows_over_runs_and_notices_changed_problems(model, vector, tmp_path):
    path, changed = tmp_path / "a.jsonl", [Problem(**(vars(PROBLEMS[0]) | {"answer": "3"}))]
    generated = []

    def run(problems, steering):
        with keep(model, path) as journal:
            before = len(journal.records)
            scores, _ = evaluate(
                model, problems, steering=steering, journal=journal,
                max_tokens=TOKENS, with_nll=False,
            )  # fmt: skip
            generated.append(len(journal.records) - before)
        return scores

    assert list(run(PROBLEMS, None)) == ["unsteered"]
    steered = run(PROBLEMS, ds.Steering(vector, 2.0, (1,)))
    run(PROBLEMS, ds.Steering(vector, 2.0, (1,)))
    run(changed, None)
    assert generated == [4, 4, 0, 1]
    assert steered["steered"].against_unsteered.problems == 4
    with pytest.raises(InputError, match='has {"max_tokens": 12}, this one {"max_tokens": 5}'):
        Journal(path, journal_header(model, 5))


def test_strength_zero_is_the_unsteered_model_and_needs_no_comparison(model, vector):
    scores, answers = evaluate(
        *model, PROBLEMS, steering=ds.Steering(vector, 0.0, (1,)), max_tokens=TOKENS, with_nll=False
    )
    assert list(scores) == ["unsteered"]
    assert {one.steering for one in answers} == {"unsteered"}
    assert list(evaluate(
        model, PROBLEMS, steering=ds.Steering(vector, 1.0, (1,)), unsteered=False, max_tokens=TOKENS
    )[0]) == ["steered"]  # fmt: skip


def test_doses_are_signed_fractions_of_the_residual_norm_and_mix_with_strengths(vector):
    norms, sizes = {1: 10.0, 2: 40.0}, vector.norms()
    settings = settings_of(Norms(norms), vector, [1, 2], ["-10%", 0, "30%", "0%"])
    assert [s.dose for s in settings] == [0, -0.1, 0.3, -0.1, 0.3]  # exact
    assert [s.layers for s in settings] == [(), (1,), (1,), (2,), (2,)]
    for setting in settings[1:]:
        added = setting.strength * sizes[setting.layers[0]]
        assert added == pytest.approx(setting.dose * norms[setting.layers[0]])
    mixed = settings_of(Norms(norms), vector, [1], [-2, "20%", 2, "2.0"])
    assert [s.strength for s in mixed[1:]] == sorted([-2, 2, 0.2 * 10 / sizes[1]])
    assert mixed[1].dose == pytest.approx(-2 * sizes[1] / 10)
    with pytest.raises(InputError, match="strength 'x%'"):
        settings_of(Norms(norms), vector, [1], ["x%"])
    with pytest.raises(VectorMismatchError, match="no vector for layer 9"):
        settings_of(Norms(norms), vector, [9], ["10%"])


def test_layers_that_are_steered_together_are_one_setting(model, vector):
    settings = settings_of(NORMS, vector, [3, (2, 0), [0, 2, 2]], ["20%", -1.5])
    assert [s.layers for s in settings] == [(), (0, 2), (0, 2), (3,), (3,)]
    joint = settings[1:3]
    assert joint[1].dose == 0.2 and joint[1].steering.layers == (0, 2)
    sizes = vector.norms()
    assert joint[0].dose == pytest.approx(-1.5 * (sizes[0] + sizes[2]) / 10)
    result = sweep(model, PROBLEMS[:1], settings, max_tokens=2, with_nll=False)
    rows = [row.describe() for row in result.rows]
    assert [row["layers"] for row in rows] == [None, [0, 2], [0, 2], [3], [3]]


def test_the_setting_of_a_trained_vector_outlives_a_sweep_that_recommends_nothing(model, vector):
    result = sweep(model, PROBLEMS[:1], settings_of(NORMS, vector, [1], [1.0]), max_tokens=2)
    for older, kept in [
        ({"layers": [1], "strength": 1.0, "reason": "trained"}, True),
        ({"layers": [1], "strength": 1.0, "reason": "tokens"}, False),
    ]:
        before = ds.SteeringVector(vector.layers, replace(vector.meta, recommended=older))
        after = with_recommendation(before, result, task={}, positions="all")
        assert after.meta.recommended == (older if kept else None)


def test_a_sweep_has_rows_a_recommendation_and_stores_both(model, vector, tmp_path):
    settings = settings_of(NORMS, vector, [1, 2], [3.0, -3.0])
    seen = []

    def watch(answers, tokens):
        seen.append(len(table(settings, answers)))

    result = sweep(model, PROBLEMS, settings, max_tokens=TOKENS, progress=watch)
    assert [row.setting.strength for row in result.rows] == [0, -3, 3, -3, 3]
    assert seen[-1] == 5
    assert result.recommendation.layers == ()  # four problems support nothing
    rows = [row.describe() for row in result.rows]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert rows[0]["p"] is None and all(row["p"] == 1 for row in rows[1:])
    stored = with_recommendation(vector, result, task={"task": "tiny"}, positions="all")
    again = ds.SteeringVector.load(stored.save(tmp_path / "v.npz"))
    assert again.meta.recommended is None
    assert [row["strength"] for row in again.meta.tested] == [0, -3, 3, -3, 3]
    best = Recommendation((2,), 3.0, 0.25, "tokens", "shorter")
    stored = with_recommendation(
        vector, replace(result, recommendation=best), task={"task": "tiny"}, positions="prompt"
    )
    kept = ds.SteeringVector.load(stored.save(tmp_path / "v.npz"))
    assert {"layers": [2], "strength": 3.0, "dose": 0.25, "positions": "prompt"}.items() <= (
        kept.meta.recommended.items()
    )
    asked = ds.resolve(model, kept)
    assert (asked.layers, asked.strength, asked.positions) == ((2,), 3.0, "prompt")
    with pytest.raises(InputError, match="nothing to sweep"):
        sweep(model, PROBLEMS, settings_of(NORMS, vector, [1], [0]))


def test_damaged_records_and_margins_that_mean_nothing_are_refused(model, vector, tmp_path):
    path = tmp_path / "a.jsonl"
    with keep(model, path) as journal:
        journal.append({"problem": "p-0"})
        with pytest.raises(InputError, match=r"a\.jsonl: line 2 is no answer"):
            answer(model, PROBLEMS, [None], journal, max_tokens=TOKENS)
    path.unlink()
    with keep(model, path) as journal:
        answer(model, PROBLEMS[:1], [None], journal, max_tokens=TOKENS)
    size = model.network.args.vocab_size
    header, record, loss = path.read_text().splitlines()
    for changes in (
        {"token_ids": [size]}, {"token_ids": [-5, -5]}, {"token_ids": [1.0]}, {"token_ids": {"0": 1}},
        {"text": 5}, {"steps": "3"}, {"correct": 1}, {"steps": True}, {"nll": [1]}, {"new": 1},
    ):  # fmt: skip
        path.write_text(f"{header}\n{json.dumps(json.loads(record) | changes)}\n{loss}\n")
        with keep(model, path) as journal, pytest.raises(InputError, match="line 2 is no answer"):
            answer(model, PROBLEMS, [None], journal, max_tokens=TOKENS)
    for broken in ({"nll": "x"}, {"nll": None}, {"nll_of": "key"}):
        path.write_text(f"{header}\n{record}\n{json.dumps(json.loads(loss) | broken)}\n")
        with keep(model, path) as journal, pytest.raises(InputError, match="line 3 is no answer"):
            answer(model, PROBLEMS, [None], journal, max_tokens=TOKENS)
    for margin in (0, 1, float("nan")):
        with pytest.raises(InputError, match="margin"):
            sweep(model, PROBLEMS, settings_of(NORMS, vector, [1], [1.0]), margin=margin)


def test_a_likelihood_that_overflows_is_told_and_the_answers_are_kept(model, tmp_path, monkeypatch):
    from mlx_densesteer.evaluation import answers as answering

    path = tmp_path / "a.jsonl"
    monkeypatch.setattr(answering, "nll", lambda network, prompts, responses: [float("nan")] * 4)
    with keep(model, path) as journal, pytest.raises(ModelError, match="overflows its dtype"):
        answer(model, PROBLEMS, [None], journal, max_tokens=TOKENS)
    with keep(model, path) as journal:
        assert len(journal.records) == 4
        again = answer(model, PROBLEMS, [None], journal, max_tokens=TOKENS, with_nll=False)
    assert len(again) == 4
