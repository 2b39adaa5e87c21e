import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_densesteer.errors import InputError
from mlx_densesteer.model import likelihood, steered_likelihood
from mlx_densesteer.model.block import make_cache
from mlx_densesteer.model.likelihood import nll
from mlx_densesteer.model.likelihood import log_likelihoods
from mlx_densesteer.steering.steering import Steering


def naive(model, context, continuation, steering=None):
    """One sequence at a time, all of its logits."""
    tokens = mx.array([[*context, *continuation]])
    cache = make_cache(model, steering, prompt_length=len(context))
    logits = model(tokens, cache=cache)[0, len(context) - 1 : -1].astype(mx.float32)
    logp = nn.log_softmax(logits, axis=-1)
    total = sum(logp[t, token].item() for t, token in enumerate(continuation))
    return total, mx.argmax(logits, axis=-1).tolist() == list(continuation)


def requests(seed=0, count=12):
    """Contexts of 1 to 9 tokens, some shared, and continuations of 1 to 7."""
    rng = np.random.default_rng(seed)
    contexts = [rng.integers(0, 128, size).tolist() for size in (1, 2, 9, 5, 1)]
    return (
        [contexts[i] for i in rng.integers(0, len(contexts), count)],
        [rng.integers(0, 128, size).tolist() for size in rng.integers(1, 8, count)],
    )


def scores(model, contexts, continuations, **options):
    found = {i: (s, g) for i, s, g in log_likelihoods(model, contexts, continuations, **options)}
    return [found[i] for i in range(len(contexts))]


@pytest.mark.parametrize("positions", [None, "all", "prompt", "generated"])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_batches_equal_one_at_a_time(tiny, make_vector, positions, rows):
    steering = positions and Steering(make_vector(), 1.5, layers=(1, 2), positions=positions)
    contexts, continuations = requests()
    found = scores(tiny, contexts, continuations, steering=steering, rows=rows)
    for context, continuation, (score, _) in zip(contexts, continuations, found, strict=True):
        expected, _ = naive(tiny, context, continuation, steering)
        assert score == pytest.approx(expected, abs=2e-5)


def test_the_steering_and_its_positions_matter(tiny, make_vector):
    contexts, continuations = requests()
    found = [scores(tiny, contexts, continuations)]
    for positions in ("all", "prompt", "generated"):
        steering = Steering(make_vector(), 1.5, layers=(1,), positions=positions)
        found.append(scores(tiny, contexts, continuations, steering=steering))
    sums = [sum(score for score, _ in row) for row in found]
    assert min(abs(a - b) for i, a in enumerate(sums) for b in sums[:i]) > 0.1
    zero = Steering(make_vector(), 0.0)
    assert scores(tiny, contexts, continuations, steering=zero) == found[0]


def test_small_slices_change_nothing(tiny, make_vector, monkeypatch):
    steering = Steering(make_vector(), 1.0, layers=(2,), positions="generated")
    contexts, continuations = requests(1)
    whole = scores(tiny, contexts, continuations, steering=steering, rows=4)
    monkeypatch.setattr(steered_likelihood, "BATCH_TOKENS", 8)  # two tokens a row
    monkeypatch.setattr(likelihood, "LOGITS", 3 * 128)
    sliced = scores(tiny, contexts, continuations, steering=steering, rows=4)
    assert [g for _, g in sliced] == [g for _, g in whole]
    assert [s for s, _ in sliced] == pytest.approx([s for s, _ in whole], abs=2e-5)


def test_greedy_is_what_greedy_decoding_writes(tiny, make_vector):
    steering = Steering(make_vector(), 1.5, layers=(1,))
    context, written = [5, 6, 7], []
    for _ in range(6):
        cache = make_cache(tiny, steering, prompt_length=3)
        logits = tiny(mx.array([context + written]), cache=cache)
        written.append(mx.argmax(logits[0, -1]).item())
    changed = [[*written[:t], (written[t] + 1) % 128, *written[t + 1 :]] for t in range(6)]
    contexts = [context] * 8
    continuations = [written, *changed, written[:2]]
    found = scores(tiny, contexts, continuations, steering=steering, rows=3)
    assert [g for _, g in found] == [True] + [False] * 6 + [True]
    assert naive(tiny, context, written, steering)[1]


def test_unsteered_it_is_the_nll(tiny):
    contexts, continuations = requests(2)
    found = scores(tiny, contexts, continuations)
    means = [-score / len(c) for (score, _), c in zip(found, continuations, strict=True)]
    assert means == pytest.approx(nll(tiny, contexts, continuations), abs=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_as_large_as_qwens_is_summed_up_without_bias(tiny, tied):
    from mlx_lm.models.qwen2 import Model, ModelArgs

    size = {"vocab_size": 151936, "hidden_size": 32, "num_hidden_layers": 1,
            "tie_word_embeddings": tied}  # fmt: skip
    model = Model(ModelArgs(**{**vars(tiny.args), **size}))
    head = model.model.embed_tokens if tied else model.lm_head
    head.weight = mx.array(np.random.default_rng(0).normal(size=(151936, 32)) * 0.45, mx.float32)
    tokens = np.random.default_rng(1).integers(0, 151936, 40).tolist()
    ((_, found, _),) = log_likelihoods(model, [tokens[:1]], [tokens[1:]])
    logits = np.array(model(mx.array([tokens]))[0, :-1], np.float64)
    assert 2 < logits.std() < 3  # as peaked as a real model's
    scores = logits[range(39), tokens[1:]] - np.log(np.exp(logits).sum(axis=-1))
    assert found == pytest.approx(scores.sum(), abs=39 * 1e-5)


def test_a_shared_context_is_computed_once(tiny, monkeypatch):
    widths = []
    call = type(tiny.model).__call__

    def counted(self, tokens, *args, **options):
        widths.append(tokens.size)
        return call(self, tokens, *args, **options)

    monkeypatch.setattr(type(tiny.model), "__call__", counted)
    scores(tiny, [list(range(40))] * 4, [[1], [2], [3], [4, 5]], rows=1)
    assert sum(widths) == 39 + 1 + 1 + 1 + 2


def test_an_empty_continuation_is_certain(tiny):
    assert scores(tiny, [[1, 2], [1, 2]], [[], [3]])[0] == (0.0, True)


def test_what_cannot_be_scored(tiny):
    with pytest.raises(InputError, match="context 1 is empty"):
        list(log_likelihoods(tiny, [[1], []], [[1], [2]]))
    with pytest.raises(InputError, match="1 contexts for 2 continuations"):
        list(log_likelihoods(tiny, [[1]], [[1], [2]]))
