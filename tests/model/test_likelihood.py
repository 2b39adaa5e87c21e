import functools
import gc

import mlx.core as mx
import numpy as np
import pytest
from helpers import every_third_ends_a_step
from mlx_lm.models.qwen2 import Model as Network
from mlx_lm.models.qwen2 import ModelArgs

from mlx_densesteer.errors import InputError
from mlx_densesteer.model import likelihood
from mlx_densesteer.model.block import make_cache, patch
from mlx_densesteer.model.likelihood import log_likelihoods, nll
from mlx_densesteer.steering.steering import Steering


@pytest.fixture
def tiny(tiny):
    return every_third_ends_a_step(tiny)


PROMPTS = [[1, 2, 3], [9] * 17, [1, 2, 3], [5], [7, 7, 8], [1, 2, 3], [9] * 17, [5]]
RESPONSES = [[4, 5], [6], [8] * 21, [3, 1, 4, 1, 5, 9, 2, 6], [2], [4, 5], [5, 4, 3, 2], [5, 5, 5]]


def naive(network, context, continuation, steering=None):
    """The definition: one sequence, all of its logits, float64. Returns log p, and whether it is greedy."""
    cache = make_cache(network, steering, prompt=context)
    logits = network(mx.array([[*context, *continuation]]), cache)[0].astype(mx.float32)
    chosen = np.array(logits, np.float64)[len(context) - 1 : -1]
    largest = chosen.max(axis=-1)
    normaliser = largest + np.log(np.exp(chosen - largest[:, None]).sum(axis=-1))
    scores = chosen[np.arange(len(continuation)), continuation] - normaliser
    return float(scores.sum()), chosen.argmax(axis=-1).tolist() == list(continuation)


def expected(network, prompts=PROMPTS, responses=RESPONSES):
    return [-naive(network, p, r)[0] / len(r) for p, r in zip(prompts, responses, strict=True)]


def requests(seed=0, count=12):
    """Contexts of 1 to 9 tokens, some shared, and continuations of 1 to 7."""
    rng = np.random.default_rng(seed)
    contexts = [rng.integers(0, 128, size).tolist() for size in (1, 2, 9, 5, 1)]
    return (
        [contexts[i] for i in rng.integers(0, len(contexts), count)],
        [rng.integers(0, 128, size).tolist() for size in rng.integers(1, 8, count)],
    )


def scores(network, contexts, continuations, **options):
    found = {i: (s, g) for i, s, g in log_likelihoods(network, contexts, continuations, **options)}
    return [found[i] for i in range(len(contexts))]


@pytest.fixture
def shapes(tiny, monkeypatch):
    """The shapes ``(rows, tokens)`` of what goes through the blocks."""
    seen, kind = [], type(patch(tiny).model)
    stock = kind.__call__

    @functools.wraps(stock)
    def spy(self, tokens, *args, **options):
        seen.append(tokens.shape)
        return stock(self, tokens, *args, **options)

    monkeypatch.setattr(kind, "__call__", spy)
    return seen


def test_the_nll_is_its_definition_for_shared_prompts_and_mixed_lengths(tiny):
    assert nll(tiny, PROMPTS, RESPONSES) == pytest.approx(expected(tiny), abs=2e-5)


@pytest.mark.parametrize("tokens", [1, 8, 24])
def test_parts_of_any_size_agree(tiny, monkeypatch, tokens):
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", tokens)
    monkeypatch.setattr(likelihood, "PADDING", tokens)
    monkeypatch.setattr(likelihood, "LOGITS", 3 * 128)
    assert nll(tiny, PROMPTS, RESPONSES) == pytest.approx(expected(tiny), abs=2e-5)


def test_the_nll_of_a_patched_network_is_unsteered(tiny):
    before = nll(tiny, PROMPTS, RESPONSES)
    assert nll(patch(tiny), PROMPTS, RESPONSES) == before


def test_bfloat16_weights_give_a_float32_log_softmax(tiny):
    tiny.set_dtype(mx.bfloat16)
    found = nll(tiny, PROMPTS, RESPONSES)
    assert found == pytest.approx(expected(tiny), abs=0.05)
    assert any(value != float(mx.array(value).astype(mx.bfloat16)) for value in found)


def test_a_prompt_is_computed_once_for_all_its_responses(tiny, shapes):
    nll(tiny, [[1, 2, 3]] * 6, [[4, 5, 6]] * 6)
    assert shapes == [(1, 2), (6, 3)]


def test_responses_of_like_length_are_read_together(tiny, shapes):
    """A long one beside fifteen short ones would be fifteen times as many tokens of padding."""
    prompts = [[number] for number in range(16)]
    nll(tiny, prompts, [[2] * 400, *[[3] * 20] * 15])
    assert shapes == [(15, 20), (1, 400)]


def test_memory_does_not_grow_with_the_number_of_responses(tiny):
    def peak(count):
        prompts = [[1 + i % 7] * 40 for i in range(count)]
        responses = [[i % 100] * 60 for i in range(count)]
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()  # earlier tests' arrays
        nll(tiny, prompts, responses)
        return mx.get_peak_memory() - before

    # the least of three: a busy machine now and then frees memory later
    assert min(peak(200) for _ in range(3)) < 1.1 * min(peak(50) for _ in range(3))


def test_what_has_no_nll(tiny):
    assert nll(tiny, [], []) == []
    for prompts, responses, message in [
        ([[1]], [], "1 contexts for 0 continuations"),
        ([[1], []], [[1], [2]], "context 1 is empty"),
        ([[1]], [[]], "response 0 is empty"),
    ]:
        with pytest.raises(InputError, match=message):
            nll(tiny, prompts, responses)


@pytest.mark.parametrize("positions", [None, "all", "prompt", "generated", "steps"])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_batches_equal_one_at_a_time(tiny, make_vector, positions, rows):
    steering = positions and Steering(make_vector(), 1.5, (1, 2), positions)
    contexts, continuations = requests()
    found = scores(tiny, contexts, continuations, steering=steering, rows=rows)
    for context, continuation, (score, _) in zip(contexts, continuations, found, strict=True):
        assert score == pytest.approx(naive(tiny, context, continuation, steering)[0], abs=2e-5)


def test_the_steering_and_its_positions_matter(tiny, make_vector):
    contexts, continuations = requests()
    found = [scores(tiny, contexts, continuations)]
    for positions in ("all", "prompt", "generated", "steps"):
        steering = Steering(make_vector(), 1.5, (1,), positions)
        found.append(scores(tiny, contexts, continuations, steering=steering))
    sums = [sum(score for score, _ in row) for row in found]
    assert min(abs(a - b) for i, a in enumerate(sums) for b in sums[:i]) > 0.1
    zero = Steering(make_vector(), 0.0, (1,))
    assert scores(tiny, contexts, continuations, steering=zero) == found[0]


def test_small_slices_change_nothing(tiny, make_vector, monkeypatch):
    steering = Steering(make_vector(), 1.0, (2,), "generated")
    contexts, continuations = requests(1)
    whole = scores(tiny, contexts, continuations, steering=steering, rows=4)
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", 8)  # two tokens a row
    monkeypatch.setattr(likelihood, "LOGITS", 3 * 128)
    sliced = scores(tiny, contexts, continuations, steering=steering, rows=4)
    assert [g for _, g in sliced] == [g for _, g in whole]
    assert [s for s, _ in sliced] == pytest.approx([s for s, _ in whole], abs=2e-5)


def test_greedy_is_what_greedy_decoding_writes(tiny, make_vector):
    steering = Steering(make_vector(), 1.5, (1,))
    context, written = [5, 6, 7], []
    for _ in range(6):
        cache = make_cache(tiny, steering, prompt=range(3))
        logits = tiny(mx.array([context + written]), cache=cache)
        written.append(mx.argmax(logits[0, -1]).item())
    changed = [[*written[:t], (written[t] + 1) % 128, *written[t + 1 :]] for t in range(6)]
    contexts = [context] * 8
    continuations = [written, *changed, written[:2]]
    found = scores(tiny, contexts, continuations, steering=steering, rows=3)
    assert [g for _, g in found] == [True] + [False] * 6 + [True]
    assert naive(tiny, context, written, steering)[1]


def test_a_shared_context_is_computed_once(tiny, shapes):
    scores(tiny, [list(range(40))] * 4, [[1], [2], [3], [4, 5]], rows=1)
    assert sum(rows * tokens for rows, tokens in shapes) == 39 + 1 + 1 + 1 + 2


def test_an_empty_continuation_is_certain(tiny):
    assert scores(tiny, [[1, 2], [1, 2]], [[], [3]])[0] == (0.0, True)


def test_what_cannot_be_scored(tiny):
    with pytest.raises(InputError, match="context 1 is empty"):
        list(log_likelihoods(tiny, [[1], []], [[1], [2]]))
    with pytest.raises(InputError, match="1 contexts for 2 continuations"):
        list(log_likelihoods(tiny, [[1]], [[1], [2]]))


def network_like(network, **changes):
    return Network(ModelArgs(**{**vars(network.args), **changes}))


def test_an_untied_head_is_used(tiny):
    network = network_like(tiny, tie_word_embeddings=False)
    mx.eval(network.parameters())
    assert nll(network, PROMPTS, RESPONSES) == pytest.approx(expected(network), abs=2e-5)


@pytest.mark.parametrize("vocabulary", [100, 128, 151936, 151937])
def test_a_large_vocabulary_is_summed_up_exactly(vocabulary):
    logits = np.random.default_rng(0).normal(scale=2.5, size=(4, vocabulary)).astype(np.float32)
    wanted = np.log(np.exp(logits.astype(np.float64)).sum(axis=-1))
    found = likelihood.log_sum_exp(mx.array(logits))
    np.testing.assert_allclose(np.array(found), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_as_large_as_qwens_is_summed_up_without_bias(tiny, tied):
    network = network_like(
        tiny, vocab_size=151936, hidden_size=32, num_hidden_layers=1, tie_word_embeddings=tied
    )
    head = network.model.embed_tokens if tied else network.lm_head
    head.weight = mx.array(np.random.default_rng(0).normal(size=(151936, 32)) * 0.45, mx.float32)
    tokens = np.random.default_rng(1).integers(0, 151936, 40).tolist()
    ((_, found, _),) = log_likelihoods(network, [tokens[:1]], [tokens[1:]])
    logits = np.array(network(mx.array([tokens]))[0, :-1], np.float64)
    assert 2 < logits.std() < 3  # as peaked as a real model's
    wanted = logits[range(39), tokens[1:]] - np.log(np.exp(logits).sum(axis=-1))
    assert found == pytest.approx(wanted.sum(), abs=39 * 1e-5)


@pytest.mark.checkpoint
def test_the_real_model_agrees_with_its_own_logits(real_model):
    network, tokenizer = real_model
    prompts = [tokenizer.encode("Two and two make")] * 2
    responses = [tokenizer.encode(text) for text in (" four.", " a large green elephant today")]
    found = nll(network, prompts, responses)
    assert found == pytest.approx(expected(network, prompts, responses), abs=1e-4)
    assert found[0] < found[1]
