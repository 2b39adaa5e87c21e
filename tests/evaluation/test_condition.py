"""Conditions and baselines: what a problem is asked as, and what is compared."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

import mlx_densesteer as ds
from mlx_densesteer.errors import ContextError, InputError
from mlx_densesteer.evaluation.answers import Answer, answer, journal_header, prompt_tokens
from mlx_densesteer.evaluation.condition import (
    Baseline,
    Condition,
    check_apart,
    random_like,
)
from mlx_densesteer.evaluation.journal import Journal
from mlx_densesteer.evaluation.scoring import evaluate
from mlx_densesteer.evaluation.solutions import Solution, read_solutions
from mlx_densesteer.evaluation.tasks import Problem
from mlx_densesteer.generation.answer import split_steps
from mlx_densesteer.model.likelihood import nll
from mlx_densesteer.model.prompt import encode_prompt, encode_text

PROBLEMS = [
    Problem(f"p-{i}", text, text, gold, "number")
    for i, (text, gold) in enumerate([("What is 1 + 1?", "2"), ("And 30 / 5?", "6")])
]
EXAMPLES = (Solution("Two and 2?", "2 + 2 = 4.\n\n#### 4"), Solution("3 * 3?", "#### 9"))
TOKENS = 12


@pytest.fixture(scope="module")
def model(hf_folder, tmp_path_factory):
    folder = ds.convert(hf_folder, tmp_path_factory.mktemp("m") / "t", bits=None, dtype="float32")
    return ds.load(folder)


@pytest.fixture
def steering(make_vector):
    return ds.Steering(make_vector(size=0.5), 2.0, (1, 2), "generated")


def test_a_condition_that_only_steers_has_the_fingerprint_of_its_steering(steering):
    assert Condition.of(None).fingerprint == Condition("unsteered").fingerprint == "unsteered"
    assert Condition.of(steering).fingerprint == steering.fingerprint
    assert Condition("x", replace(steering, strength=0)).fingerprint == "unsteered"


def test_everything_but_the_name_is_in_the_fingerprint(steering):
    sampling = ds.Sampling(temp=0.7, seed=1)
    made = [
        Condition(),
        Condition(steering=steering),
        Condition(instruction="Be brief."),
        Condition(suffix="Be brief."),
        Condition(prefix="Be brief."),
        Condition(prefix="Be brief.", steering=steering),
        Condition(examples=EXAMPLES),
        Condition(examples=EXAMPLES[:1]),
        Condition(sampling=sampling),
        Condition(sampling=sampling, number=1),
        Condition(sampling=replace(sampling, seed=2)),
        Condition(sampling=replace(sampling, top_p=0.9)),
    ]
    assert len({one.fingerprint for one in made}) == len(made)
    assert (
        len({replace(one, name="x").fingerprint for one in made} - {m.fingerprint for m in made})
        == 0
    )


@pytest.mark.parametrize("system", [None, "You solve."])
def test_a_problem_is_asked_as_the_condition_says(model, system):
    problem, tokenizer = PROBLEMS[0], model.tokenizer
    plain = prompt_tokens(model, problem, Condition(), system)
    assert plain == encode_prompt(tokenizer, problem.prompt, system=system)
    whole = Condition(instruction="Be brief.", examples=EXAMPLES, suffix="Use 9.", prefix="So")
    first = "You solve.\n\nBe brief." if system else "Be brief."
    turns = [("system", first)]
    for one in EXAMPLES:
        turns += [("user", one.prompt), ("assistant", one.response)]
    turns.append(("user", "What is 1 + 1?\n\nUse 9."))
    text = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns)
    found = prompt_tokens(model, problem, whole, system)
    assert found == tokenizer.encode(f"{text}<|im_start|>assistant\n")


def test_a_prefix_is_part_of_the_response(model, tmp_path):
    condition = Condition("prefix", prefix="a 7.\n\nb")
    prefix = encode_text(model.tokenizer, condition.prefix)
    with Journal(tmp_path / "a.jsonl", journal_header(model, TOKENS)) as journal:
        answers = answer(model, PROBLEMS, [None, condition], journal, max_tokens=TOKENS)
        assert answer(model, PROBLEMS, [condition], journal, max_tokens=TOKENS) == answers[1::2]
    for problem, one in zip(PROBLEMS, answers[1::2], strict=True):
        prompt = encode_prompt(model.tokenizer, problem.prompt)
        alone = ds.generate(model, [*prompt, *prefix], max_tokens=TOKENS - len(prefix))
        assert one.text == condition.prefix + alone.text
        assert one.token_ids == (*prefix, *alone.token_ids)
        assert (
            one.tokens == TOKENS and one.truncated and one.steps == len(split_steps(one.text)) >= 2
        )
        assert [one.nll] == pytest.approx(nll(model.network, [prompt], [one.token_ids]), abs=1e-5)
    with pytest.raises(InputError, match="has 7 tokens, and a response at most 7"):
        answer(model, PROBLEMS, [condition], max_tokens=7)


def test_the_likelihood_is_given_the_conditions_own_prompt(model):
    condition = Condition(examples=EXAMPLES, instruction="Be brief.")
    answers = answer(model, PROBLEMS, [condition], max_tokens=TOKENS)
    prompts = [prompt_tokens(model, problem, condition) for problem in PROBLEMS]
    expected = nll(model.network, prompts, [one.token_ids for one in answers])
    assert [one.nll for one in answers] == pytest.approx(expected, abs=1e-5)
    for prompt, one in zip(prompts, answers, strict=True):
        assert one.token_ids == ds.generate(model, prompt, max_tokens=TOKENS).token_ids


def test_a_long_instruction_is_refused_with_the_problems_name(model):
    with pytest.raises(ContextError, match="the prompt of p-0 has more than 512 tokens"):
        answer(model, PROBLEMS, [Condition(instruction="very " * 2000)], max_tokens=TOKENS)


def test_a_sample_does_not_depend_on_the_other_rows_and_numbers_differ(model):
    sampling = ds.Sampling(temp=1.0, seed=3)
    conditions = [Condition(sampling=sampling, number=number) for number in range(3)]
    together = answer(model, PROBLEMS, conditions, max_tokens=TOKENS, with_nll=False)
    alone = [
        answer(model, [problem], [one], max_tokens=TOKENS, with_nll=False)[0]
        for problem in PROBLEMS
        for one in conditions
    ]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert len({one.token_ids for one in together}) == 6
    with pytest.raises(InputError, match="a sampling without a seed"):
        Condition(sampling=ds.Sampling(temp=1.0))


def test_a_journal_without_computing_times_is_read(model, tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path, journal_header(model, TOKENS)) as journal:
        answers = answer(model, PROBLEMS, [None], journal, max_tokens=TOKENS)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(one.compute_seconds > 0 for one in answers)
    for record in records:
        record.pop("compute_seconds", None)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    with Journal(path, journal_header(model, TOKENS)) as journal:
        scores, again = evaluate(model, PROBLEMS, journal=journal, max_tokens=TOKENS)
    assert again == [replace(one, compute_seconds=None) for one in answers]
    assert scores["unsteered"].seconds_per_correct is None


# specs


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        ("instruction:Be brief: now.", {"instruction": "Be brief: now."}),
        ("prefix: So", {"prefix": " So"}),
        ("few-shot:1", {"examples": EXAMPLES[:1]}),
        ("budget:50", {"suffix": "Use at most 50 tokens."}),
    ],
)
def test_a_spec_is_a_condition_of_its_name(spec, changes):
    found = Baseline.parse(spec).condition(None, EXAMPLES)
    assert found == Condition(name=spec, **changes)
    assert found.describe()["fingerprint"] == found.fingerprint


@pytest.mark.parametrize(
    "spec",
    ["", "brief", "instruction", "instruction:", "prefix: \n", "few-shot", "few-shot:0", "few-shot:-1",
     "few-shot:two", "budget:0", "budget:1.5", "budget:9999999999", "random:", "random:x", "Random", "random:-1"],
)  # fmt: skip
def test_a_bad_spec_is_refused_with_the_known_ones(spec):
    with pytest.raises(InputError, match="expected instruction:TEXT, prefix:TEXT, few-shot:N"):
        Baseline.parse(spec)


def test_a_random_direction_has_the_norm_and_the_place_of_the_steering(steering):
    found = [
        Baseline.parse(spec).condition(steering).steering
        for spec in ("random", "random:0", "random:1")
    ]
    assert found[0].fingerprint == found[1].fingerprint != found[2].fingerprint
    assert (found[0].strength, found[0].layers, found[0].positions) == (2.0, (1, 2), "generated")
    theirs, drawn = steering.vector, random_like(steering.vector)
    assert drawn.norms() == pytest.approx(theirs.norms(), rel=1e-6)
    for layer, direction in drawn.layers.items():
        for other in (
            theirs.layers[layer],
            drawn.layers[(layer + 1) % 4],
            random_like(theirs, 1).layers[layer],
        ):
            cosine = direction @ other / np.linalg.norm(direction) / np.linalg.norm(other)
            assert abs(cosine) < 0.5
    for none in (None, replace(steering, strength=0.0)):
        with pytest.raises(InputError, match="needs a steering"):
            Baseline.parse("random").condition(none)


def test_examples_of_pairs_and_of_solutions(tmp_path):
    file = tmp_path / "e.jsonl"
    lines = [
        {"prompt": "a?", "positive": "b", "negative": "c"},
        {"prompt": "d?", "response": "e"},
        {"question": "g?", "answer": "4/2=<<4/2=2>>2\n#### 2"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    examples = read_solutions(file)
    assert examples == [
        Solution("a?", "b"),
        Solution("d?", "e"),
        Solution("g?", "4/2=2\n#### 2"),
    ]
    with pytest.raises(InputError, match="few-shot:4: there are 3 examples"):
        Baseline.parse("few-shot:4").condition(None, examples)
    check_apart(examples, PROBLEMS)
    with pytest.raises(InputError, match="example 2 is p-1, which is among the problems"):
        check_apart([examples[0], Solution("And 30 / 5? ", "6")], PROBLEMS)
    for bad in (
        {"prompt": "a?"},
        {"prompt": " ", "positive": "b"},
        {"prompt": "a?", "response": 4},
    ):
        file.write_text(json.dumps(bad))
        with pytest.raises(InputError, match="line 1: "):
            read_solutions(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_solutions(tmp_path / "none.jsonl")


# what is compared


def made_answerer(table):
    """Return an ``answer`` that gives hand-made answers: ``table`` has (correct, tokens, seconds) by name."""

    def give(model, problems, conditions, **options):
        return [
            Answer(
                problem=problem.id, content="", steering=one.fingerprint, text="", token_ids=(1,) * tokens,
                steps=1, finish_reason="stop", found=None, correct=correct, by_reference=correct,
                by_math_verify=None, seconds=9.0, compute_seconds=seconds,
            )
            for i, problem in enumerate(problems)
            for one in conditions
            for correct, tokens, seconds in [table[one.name][i]]
        ]  # fmt: skip

    return give


def test_baselines_are_compared_with_unsteered_and_with_steered(model, steering):
    problems = [replace(PROBLEMS[0], id=f"q-{i}") for i in range(4)]
    table = {
        "unsteered": [(True, 10, 2.0), (False, 20, 4.0), (True, 30, 6.0), (False, 40, 8.0)],
        "steered": [(True, 5, 1.0), (True, 15, 3.0), (True, 25, 5.0), (False, 35, 7.0)],
        "budget:5": [(False, 4, 1.0), (False, 14, 1.0), (False, 24, 1.0), (False, 34, 1.0)],
    }
    scores, answers = evaluate(
        model, problems, steering=steering, baselines=[Baseline.parse("budget:5").condition(None)],
        answer=made_answerer(table),
    )  # fmt: skip
    assert list(scores) == ["unsteered", "steered", "budget:5"] and len(answers) == 12
    assert scores["unsteered"].seconds_per_correct.value == pytest.approx(20 / 2)
    assert scores["steered"].seconds_per_correct.value == pytest.approx(16 / 3)
    low, high = (
        scores["steered"].seconds_per_correct.low,
        scores["steered"].seconds_per_correct.high,
    )
    assert 0 < low < 16 / 3 < high and low * high == pytest.approx((16 / 3) ** 2)
    assert scores["budget:5"].seconds_per_correct is None  # nothing is right
    compared = scores["budget:5"].against_unsteered
    assert (compared.better, compared.worse, compared.accuracy.value) == (0, 2, -0.5)
    assert compared.tokens.value == -6
    compared = scores["budget:5"].against_steered
    assert (compared.better, compared.worse, compared.tokens.value) == (0, 3, -1)
    assert scores["steered"].against_unsteered.tokens.value == -5
    assert scores["steered"].against_steered is scores["unsteered"].against_steered is None
    json.dumps([asdict(one) for one in scores.values()], allow_nan=False)


def test_the_unsteered_answers_may_be_left_out(model, steering):
    table = {name: [(True, 3, 1.0)] * 2 for name in ("unsteered", "steered", "prefix:a")}
    options = {"answer": made_answerer(table), "unsteered": False}
    baseline = Baseline.parse("prefix:a").condition(None)
    scores, _ = evaluate(model, PROBLEMS, steering=steering, baselines=[baseline], **options)
    assert list(scores) == ["steered", "prefix:a"] and scores["prefix:a"].against_steered
    assert list(evaluate(model, PROBLEMS, baselines=[baseline], **options)[0]) == ["prefix:a"]
    assert list(evaluate(model, PROBLEMS, **options)[0]) == ["unsteered"]


def test_one_condition_twice_is_refused(model, steering):
    for specs in (["random", "random:0"], ["prefix:a", "prefix:a"]):
        baselines = [Baseline.parse(spec).condition(steering) for spec in specs]
        with pytest.raises(InputError, match="have one name, or are the same"):
            evaluate(model, PROBLEMS, steering=steering, baselines=baselines)
    with pytest.raises(InputError, match="is not valid UTF-8"):
        Condition(prefix="\udc80")
