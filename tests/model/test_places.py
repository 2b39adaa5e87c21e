"""Positions that depend on tokens, and thinking budgets: against a slow reference.

Chunks, batches, drafts, sessions, the prompt cache and likelihoods have them among the positions of their own
tests.
"""

import itertools
from random import Random

import mlx.core as mx
import pytest
from helpers import CALL, THOUGHT, every_third_ends_a_step, streams
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.qwen2 import Qwen2Model

import mlx_densesteer as ds
from mlx_densesteer.cli.doctor import tiny_model
from mlx_densesteer.demo.problems import calibration, draw_solution, held_out
from mlx_densesteer.errors import ModelError, SteeringError
from mlx_densesteer.generation.answer import split_steps
from mlx_densesteer.model.block import SteeredStack, make_cache, patch, unpatch
from mlx_densesteer.model.cache import SteeredKVCache
from mlx_densesteer.model.marks import BLANK_LINE, Marks, marks_of
from mlx_densesteer.model.prompt import encode_prompt, encode_text
from mlx_densesteer.steering.steering import Steering, ThinkBudget


@pytest.fixture
def tiny(tiny):
    return every_third_ends_a_step(tiny)


def strengths(network, tokens, steering, prompt_length) -> list[float]:
    """The strength at each token, worked out token by token from the words of ``Steering``."""
    ends, (opens, _) = network.model.marks.step_ends, THOUGHT
    budget = steering.budget or ThinkBudget(10**6, 0.0)
    found, inside, thought, over, call = [], False, 0, False, False
    for position, token in enumerate(tokens):
        generated = position >= prompt_length - 1
        if token in CALL and generated:
            call = token == CALL[0] and not steering.calls
        if token in THOUGHT and not over:
            opened = inside
            inside = token == opens
            thought = thought if opened and inside else 0
            over = opened and not inside and position >= prompt_length  # an answer has one thought
        if position == prompt_length - 1 and not over and inside:
            thought = 0  # an earlier part of the thought was not generated
        where = {
            "all": True, "prompt": position < prompt_length, "generated": generated,
            "steps": generated and ends[token], "think": generated and inside,
            "answer": generated and not inside,
        }  # fmt: skip
        steered = where.get(steering.positions)
        if steered is None:
            steered = 0 <= position - prompt_length + 1 < int(steering.positions.partition(":")[2])
        late = generated and inside and thought >= budget.tokens
        found.append(budget.strength if late else steering.strength * bool(steered and not call))
        thought += inside and generated
    return found


def by_hand(network, tokens, steering, prompt_length):
    """Logits with the vector added at every token by its own strength, no cache."""
    at = strengths(network, tokens, steering, prompt_length)
    h = streams(network, tokens, steering.vector.select(steering.layers).layers, lambda p: at[p])[
        -1
    ]
    return network.model.embed_tokens.as_linear(network.model.norm(h))


NETWORK = every_third_ends_a_step(tiny_model(layers=4, hidden=64, vocabulary=128))
# marks, tokens that end a step, and others
TOKENS = st.lists(
    st.sampled_from([*THOUGHT, *CALL, *THOUGHT, *CALL, 3, 6, 20, 50, 100]), min_size=1, max_size=12
)
WHERE = st.sampled_from(
    ["steps", "think", "answer", "first:1", "first:3", "all", "prompt", "generated"]
)
BUDGET = st.none() | st.builds(ThinkBudget, st.integers(1, 4), st.sampled_from([-1.0, 0.0, 4.0]))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    prompt=TOKENS, answer=TOKENS, cuts=st.sets(st.integers(1, 23)), layer=st.integers(0, 3),
    seed=st.integers(0, 3), where=WHERE, strength=st.sampled_from([2.0, 0.0]), budget=BUDGET,
    back=st.sampled_from([(), (7, 11, 7), (11, 7), CALL, CALL[1:], (*CALL, 7)]), calls=st.booleans(),
)  # fmt: skip
def test_any_chunks_steer_at_these_tokens_only(
    make_vector, prompt, answer, cuts, layer, seed, where, strength, budget, back, calls
):
    """Also after tokens were taken back, as a draft's are: here marks, which must leave no trace."""
    tokens = [*prompt, *answer]
    steering = Steering(make_vector(seed=seed), strength, (layer,), where, budget, calls)
    cache = make_cache(NETWORK, steering, prompt=prompt)
    ends = [0, *sorted(cut for cut in cuts if cut < len(tokens)), len(tokens)]
    parts = []
    for a, b in itertools.pairwise(ends):
        parts.append(NETWORK(mx.array([tokens[a:b]]), cache))
        if back and b >= len(prompt):
            NETWORK(mx.array([back]), cache)
            for one in cache:
                one.trim(len(back))
    expected = by_hand(NETWORK, tokens, steering, len(prompt))
    assert float(mx.abs(mx.concatenate(parts, axis=1) - expected).max()) < 5e-5


def test_where_no_token_ends_a_step_nothing_changes_and_strength_zero_is_stock(tiny, make_vector):
    prompt, answer = [3, 6, 9, 1], [4, 5, 7]
    stock = unpatch(tiny)(mx.array([[*prompt, *answer]]), make_prompt_cache(tiny))
    at_steps = Steering(make_vector(), 5.0, (1, 2), "steps")
    for steering in (at_steps, Steering(at_steps.vector, 0.0, (1, 2), "steps")):
        cache = make_cache(tiny, steering, prompt=prompt)
        assert mx.array_equal(tiny(mx.array([[*prompt, *answer]]), cache), stock)


def test_a_mixed_batch_is_its_rows(tiny, make_vector):
    """Rows with and without a condition on tokens; the last prompt token may end a step too."""
    vector = make_vector()
    rows = [
        None,
        *(Steering(vector, 2.0, (1, 3), where) for where in ("steps", "all", "generated")),
        Steering(vector, 2.0, (1,), "think"),
        Steering(vector, 2.0, (1, 3), "answer"),
        Steering(vector, 2.0, (1, 3), calls=False),
        Steering(vector, 0.0, (3,), budget=ThinkBudget(1, 3.0), calls=False),
    ]
    prompts = [[5, 6], [7, 8, 9], [3, 3, 1], [2, 6, 4], [7, 2], [5, 5, 7], [1, 8], [1, 2, 3]]
    tokens = [[*p, 12, 13, 50, 11, 52][:7] for p in prompts]
    tokens[-1][3] = 7
    assert tokens[-2][3] == CALL[1]
    tokens[-2][4] = CALL[0]
    alone = [
        tiny(mx.array([row]), make_cache(tiny, s, prompt=p))
        for row, p, s in zip(tokens, prompts, rows, strict=True)
    ]
    caches = [make_cache(tiny, s, prompt=p) for p, s in zip(prompts, rows, strict=True)]
    merged = [SteeredKVCache.merge(layer) for layer in zip(*caches, strict=True)]
    found = tiny(mx.array(tokens), merged)
    assert float(mx.abs(found - mx.concatenate(alone)).max()) < 2e-5
    for row in range(1, len(rows)):
        expected = by_hand(tiny, tokens[row], rows[row], len(prompts[row]))
        assert float(mx.abs(found[row : row + 1] - expected).max()) < 2e-5
    # rows come and go, and each one's thought stays where it is
    more = [[7, 9], [11, 8], [4, 5], [6, 7], [11, 3], [9, 9], [60, 13], [60, 61]]
    for cache in merged:
        cache.filter([7, 4, 6, 2])
        cache.extend(cache.take([1]))
    order = [7, 4, 6, 2, 4]
    found = tiny(mx.array([more[row] for row in order]), merged)
    for place, row in enumerate(order):
        expected = by_hand(tiny, [*tokens[row], *more[row]], rows[row], len(prompts[row]))[:, 7:]
        assert float(mx.abs(found[place] - expected[0]).max()) < 2e-5
    own = [cache.extract(1) for cache in merged]
    expected = by_hand(tiny, [*tokens[4], *more[4], 11, 5], rows[4], 2)[:, 9:]
    assert float(mx.abs(tiny(mx.array([[11, 5]]), own) - expected).max()) < 2e-5
    for cache in merged:  # without the rows whose tokens matter, nothing asks for them
        cache.filter([3])
    assert not any(cache.shift and cache.shift.needs_tokens for cache in merged)


def test_quantised_keys_and_values(make_vector):
    network = every_third_ends_a_step(tiny_model(hidden=256))
    steering = Steering(make_vector(hidden=256), 3.0, (1,), "steps")
    options = {"kv_bits": 8, "quantized_kv_start": 0, "max_tokens": 8}

    def said(how, **more):
        cache = make_cache(network, how, prompt=range(3))
        steps = generate_step(mx.array([1, 2, 3]), network, prompt_cache=cache, **options | more)
        return [int(token) for token, _ in steps]

    assert said(steering)[:3] == said(steering, kv_bits=None)[:3]
    assert said(steering) != said(None)


def test_the_class_around_the_blocks_comes_and_goes(tiny):
    assert isinstance(patch(tiny).model, SteeredStack)
    assert type(unpatch(tiny).model) is Qwen2Model
    assert type(patch(patch(tiny)).model) is type(tiny.model)
    assert not any("marks" in name for name in tiny.parameters()["model"])


def test_blocks_that_were_not_told_the_tokens_refuse(tiny, make_vector):
    cache = make_cache(tiny, Steering(make_vector(), 1.0, (0,), "steps"), prompt=range(1))
    with pytest.raises(SteeringError, match="need the token ids"):
        tiny.model.layers[0](mx.zeros((1, 2, 64)), None, cache[0])
    tiny(mx.array([[1, 2]]), cache)
    with pytest.raises(SteeringError, match="need the token ids"):
        tiny.model.layers[0](mx.zeros((1, 2, 64)), None, cache[0])


def test_without_a_tokenizer_or_with_one_that_splits_blank_lines(hf_folder, make_vector):
    steering = Steering(make_vector(), 1.0, (1,), "steps")
    network = tiny_model(layers=4, hidden=64, vocabulary=128)
    with pytest.raises(SteeringError, match="need the tokenizer"):
        make_cache(network, steering, prompt=range(3))
    model = ds.load(hf_folder)
    for refused in (
        lambda: make_cache(model, steering, prompt=range(3)),
        lambda: ds.stream(model, "hello", steering=steering),
        lambda: ds.Session(model, steering),
        lambda: next(iter(ds.generate_batch(model, ["hello"], steering=steering))),
    ):
        with pytest.raises(ModelError, match="writes a blank line as several tokens"):
            refused()


def check_text(tokenizer, marks, text) -> int:
    """Each blank line within a text is the end of one token that ends a step; return how many."""
    tokens = encode_text(tokenizer, text)
    ends = marks.ending_steps(tokens)
    pieces = [tokenizer.decode([t]) for t, end in zip(tokens, ends, strict=True) if end]
    assert all(BLANK_LINE.search(piece) and piece.endswith("\n") for piece in pieces)
    assert len(pieces) == len(split_steps(text)) - 1
    return len(pieces)


def test_the_demos_tokens_end_its_steps(demo_model):
    marks = marks_of(demo_model.network)
    assert marks is patch(demo_model.network, demo_model.tokenizer).model.marks
    solutions = [draw_solution(problem, Random(problem.id)) for problem in calibration(40)]
    assert sum(check_text(demo_model.tokenizer, marks, text) for text in solutions) > 50
    made = Marks(demo_model.tokenizer, 50)  # a network with fewer rows than the tokenizer
    with pytest.raises(ModelError):
        _ = made.step_ends


def test_the_demo_writes_what_the_slow_reference_writes(demo_model):
    """Greedy, every token from a pass over the whole sequence; and so do batch, session and draft."""
    steering = ds.resolve(demo_model, "demo", "60%", (3,), "steps")
    questions = [problem.question for problem in held_out(2)]
    alone = [ds.generate(demo_model, q, steering=steering, max_tokens=40) for q in questions]
    for question, found in zip(questions, alone, strict=True):
        prompt = encode_prompt(demo_model.tokenizer, question)
        tokens = [*prompt, *found.token_ids]
        logits = by_hand(demo_model.network, tokens, steering, len(prompt))[0, len(prompt) - 1 :]
        chosen = mx.argmax(logits, axis=-1).tolist()
        assert tuple(chosen[: len(found.token_ids)]) == found.token_ids
    assert any(
        ds.generate(demo_model, q, max_tokens=40).token_ids != one.token_ids
        for q, one in zip(questions, alone, strict=True)
    )
    together = dict(ds.generate_batch(demo_model, questions, steering=steering, max_tokens=40))
    assert [together[i].token_ids for i in range(2)] == [one.token_ids for one in alone]


@pytest.mark.checkpoint
def test_the_real_tokenizer_ends_every_blank_line_with_one_token(real_model):
    texts = ["So $x = 2$.\n\nNext:\n\n\\[ 3 \\]\n\n- a\n \n- b)\n\n\n```\nx\n\n\ty\n```\n\n**4**"]
    texts += [f"Ends in {end}\n\nNext" for end in "a1.!)}]$*`:;,|\"'%。é"]
    for text in texts:
        check_text(real_model.tokenizer, marks_of(real_model.network), text)
