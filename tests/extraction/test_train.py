"""Training a vector: gradients, losses, resuming, what it keeps."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers import every_third_ends_a_step
from mlx.utils import tree_flatten

from mlx_densesteer.errors import InputError, ModelError
from mlx_densesteer.evaluation.solutions import Solution, read_solutions
from mlx_densesteer.evaluation.tasks import load_task
from mlx_densesteer.extraction import train as training
from mlx_densesteer.extraction.pairs import Pair, read_pairs
from mlx_densesteer.extraction.train import Recipe, train
from mlx_densesteer.model.block import make_cache
from mlx_densesteer.model.gradient import fixed, response_log_likelihood
from mlx_densesteer.model.likelihood import log_likelihoods
from mlx_densesteer.steering.steering import Steering
from mlx_densesteer.steering.vector import SteeringVector

PROMPT, RESPONSE = [5, 7, 11, 2], [9, 3, 8, 1, 30]


@pytest.fixture
def patched(tiny):
    make_cache(tiny)  # patches the blocks
    return every_third_ends_a_step(tiny)


def deltas_of(steering):
    return {layer: mx.array(steering.delta(layer)) for layer in steering.layers}


@pytest.mark.parametrize("positions", ["all", "generated", "first:2", "prompt", "steps"])
@pytest.mark.parametrize("layers", [(0,), (1, 3)])
def test_it_is_the_likelihood_of_the_steered_model(patched, make_vector, positions, layers):
    steering = Steering(make_vector(), 0.3, layers, positions)
    ((_, expected, _),) = log_likelihoods(patched, [PROMPT], [RESPONSE], steering=steering)
    for recompute in (False, True):
        found = response_log_likelihood(
            patched, PROMPT, RESPONSE, deltas_of(steering), positions=positions, recompute=recompute
        )
        assert abs(found.item() - expected) < 1e-4
    known = fixed(patched, PROMPT, RESPONSE, layers[0], positions)
    assert known.start == (0 if positions in ("all", "prompt") else len(PROMPT) - 1)
    kept = response_log_likelihood(
        patched, PROMPT, RESPONSE, deltas_of(steering), positions=positions, known=known
    )
    assert abs(kept.item() - expected) < 1e-4


@pytest.mark.parametrize("positions", ["all", "generated", "first:2", "prompt", "steps"])
def test_the_gradient_is_that_of_finite_differences(patched, make_vector, positions):
    vector = make_vector(layers=(1, 3), size=0.3)
    at = {k: mx.array(v) for k, v in vector.layers.items()}

    def score(deltas):
        return response_log_likelihood(
            patched, PROMPT, RESPONSE, deltas, positions=positions, recompute=True
        )

    gradient = mx.grad(score)(at)
    rng = np.random.default_rng(1)
    for layer in at:
        way = mx.array(rng.normal(size=at[layer].shape).astype(np.float32))
        way /= mx.linalg.norm(way)
        moved = [score(at | {layer: at[layer] + t * way}).item() for t in (0.05, -0.05)]
        slope = (moved[0] - moved[1]) / 0.1
        assert slope == pytest.approx((gradient[layer] * way).sum().item(), rel=0.03, abs=2e-3)


def test_quantised_weights_have_a_gradient_for_the_vector(patched, make_vector):
    import mlx.nn as nn

    nn.quantize(patched, group_size=32, bits=4)
    at = {k: mx.array(v) for k, v in make_vector(layers=(1,), size=0.3).layers.items()}
    gradient = mx.grad(lambda d: response_log_likelihood(patched, PROMPT, RESPONSE, d))(at)
    assert 0 < mx.linalg.norm(gradient[1]).item() < 1e6


@pytest.fixture(scope="module")
def pairs():
    """Dense and sparse answers to the demo's calibration problems."""
    problems = load_task("demo", split="train", limit=12)
    return [
        Pair(
            p.prompt,
            f"So it is {p.answer}.\n\n#### {p.answer}",
            f"First.\n\nThen.\n\nSo.\n\n#### {p.answer}",
        )
        for p in problems
    ]


RECIPE = Recipe(layers=(4,), positions="all", epochs=3, batch_tokens=60, rate=0.02, max_dose=None)
BIPO = replace(RECIPE, loss="bipo")


def test_the_weights_stay_as_they_are_and_the_good_become_likelier(demo_model, pairs):
    before = [(k, v.sum().item()) for k, v in tree_flatten(demo_model.network.parameters())]
    solutions = [Solution(pair.prompt, pair.positive) for pair in pairs]
    done = train(demo_model, solutions, RECIPE)
    assert [(k, v.sum().item()) for k, v in tree_flatten(demo_model.network.parameters())] == before
    assert done.held_out[done.step] < 0.9 * done.held_out[0]
    assert done.ended == "done"
    assert list(done.vector.layers) == [4]
    # the held-out loss is the likelihood under the vector at strength 1
    steering = Steering(done.vector, 1.0, (4,))
    examples, _ = training._encode(demo_model, solutions, RECIPE)
    order = np.random.default_rng(RECIPE.seed).permutation(len(examples))
    (held,) = [examples[i] for i in order[:1]]
    ((_, score, _),) = log_likelihoods(
        demo_model.network, [held.prompt], [held.good], steering=steering
    )
    assert -score / len(held.good) == pytest.approx(done.held_out[done.step], abs=2e-3)


def test_a_response_ends_with_the_end_of_turn(demo_model, pairs):
    examples, _ = training._encode(demo_model, pairs, RECIPE)
    assert {example.good[-1] for example in examples} == {demo_model.tokenizer.eos_token_id}


def test_preferences_go_both_ways(demo_model, pairs):
    done = train(demo_model, pairs, replace(BIPO, epochs=4, batch_tokens=120))
    assert done.held_out[0] == pytest.approx(np.log(2), abs=1e-5)  # nothing is preferred yet
    assert done.held_out[done.step] < 0.9 * np.log(2)
    examples, _ = training._encode(demo_model, pairs, BIPO)

    def preference(strength):
        steering = Steering(done.vector, strength, (4,))
        sides = []
        for side in ("good", "bad"):
            found = log_likelihoods(
                demo_model.network,
                [e.prompt for e in examples],
                [getattr(e, side) for e in examples],
                steering=steering,
            )
            sides.append(sum(score for _, score, _ in found))
        return sides[0] - sides[1]

    assert preference(-1.0) < preference(0.0) < preference(1.0)


@pytest.mark.parametrize("loss", ["sft", "bipo"])
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(demo_model, pairs, tmp_path, loss):
    recipe = replace(RECIPE, loss=loss, layers=(3, 4), epochs=2)
    whole = train(demo_model, pairs, recipe)
    state = tmp_path / "state"

    for stop in (2, 3, 5):

        def interrupt(progress, stop=stop):
            if progress.step == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(demo_model, pairs, recipe, state=state, progress=interrupt)
        assert state.exists()
    with pytest.raises(InputError, match="another training"):
        train(demo_model, pairs[1:], recipe, state=state)
    done = train(demo_model, pairs, recipe, state=state)
    assert done.vector.sha256() == whole.vector.sha256()
    assert (done.losses, done.held_out) == (whole.losses, whole.held_out)
    # all is done: the state brings the vector again, for a caller who could not save it
    steps = []
    again = train(demo_model, pairs, recipe, state=state, progress=steps.append)
    assert again.vector.sha256() == whole.vector.sha256() and not steps


@pytest.mark.parametrize(
    "damage", [lambda d: d[:50], lambda d: b"", lambda d: d[:-4], lambda d: b"{" + d[1:]]
)
def test_a_damaged_state_is_refused(demo_model, pairs, tmp_path, damage):
    state = tmp_path / "state"

    def interrupt(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(demo_model, pairs, RECIPE, state=state, progress=interrupt)
    state.write_bytes(damage(state.read_bytes()))
    with pytest.raises(InputError, match="another training, or is damaged"):
        train(demo_model, pairs, RECIPE, state=state)


def test_vectors_are_no_longer_than_they_may_be(demo_model, pairs):
    recipe = replace(RECIPE, layers=(3, 4))
    free, short = (
        train(demo_model, pairs, replace(recipe, max_dose=most)) for most in (None, 0.03)
    )
    for layer, norm in demo_model.norms(free.vector, (3, 4)).items():
        assert free.vector.norms()[layer] / norm > 0.04
        assert short.vector.norms()[layer] / norm == pytest.approx(0.03, rel=1e-3)
    best = min(short.held_out.values())
    assert min(free.held_out.values()) < best < short.held_out[0]
    assert short.vector.describe()["training"]["max_dose"] == 0.03


def test_it_stops_where_the_held_out_loss_no_longer_falls(demo_model, pairs):
    done = train(demo_model, pairs, replace(RECIPE, epochs=30, rate=0.3))
    assert done.ended == "no better"
    assert done.step < done.steps
    assert done.held_out[done.step] == min(done.held_out.values())


def test_a_loss_that_is_not_finite_keeps_the_last_good_vector(demo_model, pairs, monkeypatch):
    real = training.response_log_likelihood
    calls = []

    def broken(*given, **options):
        calls.append(1)
        return real(*given, **options) * (1 if len(calls) < 20 else float("nan"))

    monkeypatch.setattr(training, "response_log_likelihood", broken)
    done = train(demo_model, pairs, RECIPE)
    assert done.ended == "not finite"
    assert all(np.isfinite(array).all() for array in done.vector.layers.values())
    calls += [1] * 20
    with pytest.raises(ModelError, match="not finite from the first step"):
        train(demo_model, pairs, RECIPE)


def test_no_memory_names_the_example_and_what_to_lower(demo_model, pairs, monkeypatch):
    def full(*given, **options):
        raise RuntimeError("[malloc] Unable to allocate 1 bytes.")

    monkeypatch.setattr(training, "response_log_likelihood", full)
    with pytest.raises(
        ModelError, match=r"not enough memory for example \d+ of \d+ tokens .*max_length"
    ):
        train(demo_model, pairs, RECIPE)


@pytest.mark.parametrize(
    ("data", "recipe", "message"),
    [
        ([], RECIPE, "no data"),
        ([Solution("a", "b")], BIPO, "needs pairs"),
        ([Solution("a", "b")], Recipe(), "layers none"),
        ([Solution("a", "b")], Recipe(layers=(6,)), "layers 6"),
        ([Solution("a", "b<|im_end|>c")], RECIPE, "end-of-turn token inside"),
        ([Solution("a", " ")], RECIPE, "empty response"),
        ([Pair("a", "b", "b")], BIPO, "none of the 1 examples"),
        ([Solution("a", "b " * 2000)], RECIPE, "none of the 1 examples"),
    ],
)
def test_data_that_cannot_be_trained_on(demo_model, data, recipe, message):
    with pytest.raises(InputError, match=message):
        train(demo_model, data, recipe)


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": "x"},
        {"epochs": 0},
        {"rate": 0},
        {"max_dose": 0.0},
        {"max_dose": float("nan")},
        {"rate": float("nan")},
        {"batch_tokens": 0},
    ],
)
def test_a_recipe_that_means_nothing(wrong):
    with pytest.raises(InputError, match="expected"):
        Recipe(layers=(1,), **wrong)


def test_the_file_says_how_it_was_made_and_is_used_so(demo_model, pairs, tmp_path):
    from mlx_densesteer.steering.request import resolve

    done = train(demo_model, pairs, Recipe(layers=(2, 4), positions="generated", batch_tokens=200))
    loaded = SteeringVector.load(done.vector.save(tmp_path / "trained.npz"))
    assert loaded.meta.method == "trained: sft"
    assert loaded.describe()["training"]["steps"] == done.step
    steering = resolve(demo_model, loaded)
    assert (steering.layers, steering.strength, steering.positions) == ((2, 4), 1.0, "generated")


def test_solutions_are_read_from_pairs_and_from_gsm8k(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [
        {"prompt": "a", "response": "b", "system": "c"},
        {"prompt": "a", "positive": "b", "negative": "c"},
        {"question": "a", "answer": "48/2 = <<48/2=24>>24\n#### 24"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert read_solutions(path) == [
        Solution("a", "b", "c"),
        Solution("a", "b"),
        Solution("a", "48/2 = 24\n#### 24"),
    ]
    path.write_text('{"prompt": "a", "response": ""}')
    with pytest.raises(InputError, match="response is empty"):
        read_solutions(path)
    with pytest.raises(InputError, match="line 1: expected a field"):
        read_pairs(path)
