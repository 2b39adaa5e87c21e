import mlx.core as mx
import numpy as np
import pytest
from helpers import every_third_ends_a_step
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_densesteer.model.block import SteeredBlock, make_cache
from mlx_densesteer.model.cache import Passed
from mlx_densesteer.server.prompt_cache import FIRST, LARGE, SMALL, PromptCache, cut
from mlx_densesteer.steering.steering import Steering

OPEN = 1


@pytest.fixture
def tiny(tiny):
    return every_third_ends_a_step(tiny)


def read(cache, tokens, steering):
    reading = cache.read(tokens, steering, {OPEN})
    while not reading.done:
        reading.advance()
    return reading


def next_logits(model, reading, tokens):
    return np.array(model(mx.array([tokens[-1:]]), reading.caches())[0, -1])


@given(st.lists(st.integers(0, 2 * LARGE), min_size=1, max_size=6), st.integers(1, 1500))
@settings(max_examples=200, deadline=None)
def test_prompts_that_begin_alike_have_the_same_first_chunks(messages, length):
    tokens = [token for size in messages for token in [OPEN, *[2] * size]]
    chunks, shorter = cut(tokens, {OPEN}), cut(tokens[:length], {OPEN})
    assert [t for c in chunks for t in c.tokens] == tokens[:-1]
    assert shorter[:-1] == chunks[: max(0, len(shorter) - 1)]
    for chunk in chunks[:-1]:
        assert (FIRST if chunk is chunks[0] else SMALL) <= len(chunk.tokens) <= LARGE
    assert not chunks or len(chunks[-1].tokens) < LARGE + SMALL


def test_a_short_system_message_is_a_chunk_of_its_own_and_a_lone_question_is_not():
    system, question, answer = [OPEN, *[2] * 20], [OPEN, *[3] * 40], [OPEN, 4, 5]
    assert [len(c.tokens) for c in cut([*system, *question, *answer], {OPEN})] == [21, 43]
    assert [len(c.tokens) for c in cut([*question, *answer], {OPEN})] == [43]
    assert [len(c.tokens) for c in cut([OPEN, 2, *question, *answer], {OPEN})] == [45]


def prompts(rng):
    """Return prompts of several messages, many with the same beginning."""
    heads = [[OPEN, *rng.integers(2, 128, 70)], [OPEN, *rng.integers(2, 128, 90)]]
    for _ in range(24):
        tokens = list(heads[rng.integers(2)])
        for _ in range(rng.integers(0, 3)):
            tokens += [OPEN, *np.random.default_rng(rng.integers(3)).integers(2, 128, 66)]
        yield [int(t) for t in [*tokens, OPEN, *rng.integers(2, 128, rng.integers(1, 5))]]


@pytest.mark.parametrize("usual", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_what_comes_from_the_cache_is_what_reading_anew_gives(tiny, make_vector, usual, exact):
    """Bit for bit if it is exact."""
    rng = np.random.default_rng(0)
    vector = make_vector()
    usual = Steering(vector, 1.0, (1,)) if usual else None
    cache = PromptCache(tiny, max_bytes=2**22, usual=usual, exact=exact)
    spared = 0
    for tokens in prompts(rng):
        strength, layers = float(rng.choice([0, 0.5, 2])), [(1,), (2,), (1, 3)][rng.integers(3)]
        positions = ["all", "prompt", "generated", "steps"][rng.integers(4)]
        steering = Steering(vector, strength, layers, positions) if rng.integers(4) else None
        reading = read(cache, tokens, steering)
        fresh = read(PromptCache(tiny, max_bytes=0, exact=exact), tokens, steering)
        assert fresh.cached_tokens == 0
        spared += reading.cached_tokens
        difference = np.abs(next_logits(tiny, reading, tokens) - next_logits(tiny, fresh, tokens))
        assert difference.max() <= (0 if exact else 1e-5)
        plain = make_cache(tiny, steering, prompt=tokens)
        expected = np.array(tiny(mx.array([tokens]), plain)[0, -1])
        assert np.abs(next_logits(tiny, reading, tokens) - expected).max() < 1e-4
    assert spared > 500


def test_another_strength_computes_only_the_layers_above(tiny, make_vector, monkeypatch):
    tokens = [OPEN, *range(2, 110)]
    cache, vector = PromptCache(tiny, max_bytes=2**22), make_vector()
    read(cache, tokens, Steering(vector, 1.0, (2,)))
    stock, computed = SteeredBlock.__call__, []
    numbers = {id(block): layer for layer, block in enumerate(tiny.model.layers)}

    def counting(self, x, mask=None, cache=None):
        if not isinstance(cache, Passed):
            computed.append(numbers[id(self)])
        return stock(self, x, mask, cache)

    monkeypatch.setattr(SteeredBlock, "__call__", counting)
    read(cache, tokens, Steering(vector, 2.0, (2,)))
    assert set(computed) == {3}
    computed.clear()
    read(cache, tokens, Steering(vector, 1.0, (2,)))
    assert not computed
    read(cache, tokens, Steering(vector, 1.0, (1,)))
    assert set(computed) == {0, 1, 2, 3}


def test_memory_is_bounded_and_the_oldest_goes(tiny):
    one = read(PromptCache(tiny, max_bytes=2**30), [OPEN, *range(2, 102)], None)
    cache = PromptCache(tiny, max_bytes=3 * one._prefix.nbytes + 10, exact=True)
    for start in range(2, 12):
        read(cache, [OPEN, *range(start, start + 100)], None)
        assert cache.nbytes <= 3 * one._prefix.nbytes + 10
    assert len(cache) == 3
    assert read(cache, [OPEN, *range(11, 111)], None).cached_tokens > 0
    assert read(cache, [OPEN, *range(2, 102)], None).cached_tokens == 0


def test_a_prompt_that_does_not_fit_pushes_out_no_other(tiny):
    one = read(PromptCache(tiny, max_bytes=2**30), [OPEN, *range(2, 102)], None)
    cache = PromptCache(tiny, max_bytes=2 * one._prefix.nbytes)
    read(cache, [OPEN, *range(2, 102)], None)
    read(cache, [OPEN, *[9] * 900], None)
    assert read(cache, [OPEN, *range(2, 102)], None).cached_tokens > 0


def test_a_longer_conversation_replaces_its_beginning(tiny):
    cache = PromptCache(tiny, max_bytes=2**30)
    tokens = [OPEN, *[5] * 70, OPEN, *[6] * 70, OPEN]
    for length in (75, 145):
        read(cache, tokens[:length], None)
    read(cache, tokens, None)
    assert len(cache) <= 2


def test_one_token_is_a_prompt_too(tiny):
    reading = read(PromptCache(tiny, max_bytes=2**20), [7], None)
    expected = np.array(tiny(mx.array([[7]]))[0, -1])
    assert np.abs(next_logits(tiny, reading, [7]) - expected).max() < 1e-5
