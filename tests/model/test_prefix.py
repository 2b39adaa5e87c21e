import dataclasses

import mlx.core as mx
import pytest
from helpers import at_every_layer, every_third_ends_a_step

import mlx_densesteer as ds
from mlx_densesteer.errors import VectorMismatchError
from mlx_densesteer.model.prefix import (
    STEP,
    Chunk,
    Prefix,
    Work,
    common_beginning,
    pieces,
)
from mlx_densesteer.steering.places import EVERYWHERE, NOWHERE, Span, span_in_chunk

CHUNKS = [Chunk((1, 2, 3, 4)), Chunk((5, 6, 7), answer=True), Chunk((8, 9))]


def same(a: Prefix, b: Prefix) -> bool:
    """Whether two prefixes hold the same keys and values, bit for bit."""
    assert (a.length, a.chunks) == (b.length, b.chunks)
    return all(
        mx.array_equal(getattr(x, name)[..., : a.length, :], getattr(y, name)[..., : b.length, :])
        for x, y in zip(a.caches, b.caches, strict=True)
        for name in ("keys", "values")
    )


def filled(model, steering, chunks=CHUNKS, **options) -> Prefix:
    prefix = Prefix(model, **options)
    prefix.fill(chunks, steering)
    return prefix


@pytest.fixture
def steering(make_vector):
    return ds.Steering(make_vector(size=2.0), 1.0, layers=(1,))


def test_the_caches_are_those_of_mlx_lm(tiny, steering):
    prefix = filled(tiny, steering, [Chunk((1, 2, 3, 4))])
    cache = ds.make_cache(tiny, steering)
    tiny(mx.array([[1, 2, 3, 4]]), cache=cache)
    for ours, theirs in zip(prefix.caches, cache, strict=True):
        assert mx.array_equal(ours.keys[..., :4, :], theirs.keys[..., :4, :])
        assert mx.array_equal(ours.values[..., :4, :], theirs.values[..., :4, :])


@pytest.mark.parametrize(
    ("layers", "computed"),
    [((1,), (9 * 2, 9)), ((2,), (9 * 2, 9)), ((3,), (9 * 2, 9)), ((0,), (9 * 4, 0))],
)
def test_what_another_layer_costs(tiny, steering, make_vector, layers, computed):
    """Kept behind block 1: from there on only blocks 2 and 3; below, everything."""
    prefix = filled(tiny, steering, keep_bytes=2**20)
    other = ds.Steering(steering.vector, -1.0, layers)
    assert prefix.fill(CHUNKS, other) == Work(*computed)
    assert same(prefix, filled(tiny, other))


def test_strength_zero_keeps_the_stream_for_the_dial(tiny, steering, make_vector):
    zero = ds.Steering(steering.vector, 0.0, (2,))
    prefix = filled(tiny, zero, keep_bytes=2**20)
    assert prefix.residual_bytes == 9 * 64 * 4
    assert prefix.fill(CHUNKS, ds.Steering(steering.vector, 1.0, (2,))) == Work(9, 9)
    assert prefix.fill(CHUNKS, zero) == Work(9, 9)
    assert same(prefix, filled(tiny, None))


def test_nothing_changed_costs_nothing(tiny, steering):
    prefix = filled(tiny, steering)
    assert prefix.fill(CHUNKS, steering) == Work(0, 0)
    twice = ds.Steering(steering.vector, 1.0, layers=(1,))
    assert prefix.fill(CHUNKS, twice) == Work(0, 0)
    assert prefix.fill(CHUNKS[:2], steering) == Work(0, 0)
    assert prefix.length == 7


def test_tokens_decoded_since_are_cut_off(tiny, steering):
    prefix = filled(tiny, steering)
    tiny(mx.array([[3, 4, 5]]), cache=prefix.caches)
    prefix.fill(CHUNKS, steering)
    assert same(prefix, filled(tiny, steering))


def test_a_prompt_of_one_token_is_answered_under_the_steering_in_force(tiny, steering):
    """It leaves nothing to read, so that no chunk brings the new steering along."""
    prefix = Prefix(tiny)
    for one in (steering, None, ds.Steering(steering.vector, 1.0, (2,))):
        prefix.fill([], one)
        assert mx.array_equal(
            tiny(mx.array([[5]]), cache=prefix.caches),
            tiny(mx.array([[5]]), cache=ds.make_cache(tiny, one)),
        )


def test_a_stream_kept_in_part_is_used_in_part(tiny, steering):
    room = 7 * 64 * 4  # of the first two chunks
    prefix = filled(tiny, steering, keep_bytes=room)
    assert prefix.residual_bytes == room
    other = ds.Steering(steering.vector, 3.0, (1,))
    assert prefix.fill(CHUNKS, other) == Work(7 * 2 + 2 * 4, 7)
    assert same(prefix, filled(tiny, other))


def test_a_fork_leaves_its_origin_alone(tiny, steering):
    prefix = filled(tiny, steering, keep_bytes=2**20)
    twin = prefix.fork()
    assert twin.fill(CHUNKS[:1], ds.Steering(steering.vector, 5.0, (1,))).resteered == 4
    tiny(mx.array([[3, 4, 5]]), cache=twin.caches)
    assert prefix.fill(CHUNKS, steering) == Work(0, 0)
    assert same(prefix, filled(tiny, steering))
    third = prefix.fork()
    tiny(mx.array([[3]]), cache=prefix.caches)
    tiny(mx.array([[7]]), cache=third.caches)
    third.fill(CHUNKS, steering)
    assert same(third, filled(tiny, steering))


def test_what_does_not_fit_changes_nothing(tiny, steering, make_vector):
    prefix = filled(tiny, steering)
    with pytest.raises(VectorMismatchError):
        prefix.fill(CHUNKS, at_every_layer(make_vector(hidden=32)))
    assert prefix.fill(CHUNKS, steering) == Work(0, 0)


def test_an_interruption_empties_it(tiny, steering, monkeypatch):
    prefix = filled(tiny, steering)
    with monkeypatch.context() as patching:
        patching.setattr("mlx_densesteer.model.prefix.clear_buffers", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prefix.fill([*CHUNKS, Chunk((3,))], steering)
    assert prefix.length == 0
    prefix.fill(CHUNKS, steering)
    assert same(prefix, filled(tiny, steering))


def _interrupt(*_):
    raise KeyboardInterrupt


def test_a_long_chunk_is_read_in_pieces(tiny, steering):
    long = Chunk(tuple(i % 100 for i in range(STEP + 5)))
    assert [len(piece) for piece in pieces(long.tokens)] == [STEP, 5]
    prefix = filled(tiny, steering, [long], keep_bytes=2**24)
    other = ds.Steering(steering.vector, -2.0, (1,))
    assert prefix.fill([long], other).resteered == STEP + 5
    assert same(prefix, filled(tiny, other, [long]))


def test_bfloat16_is_right_bit_for_bit_too(tiny, steering):
    tiny.set_dtype(mx.bfloat16)
    prefix = filled(tiny, steering, keep_bytes=2**20)
    assert prefix.residual_bytes == 9 * 64 * 2
    other = ds.Steering(steering.vector, -2.0, (1,))
    prefix.fill(CHUNKS, other)
    assert same(prefix, filled(tiny, other, keep_bytes=2**20))
    assert prefix.caches[3].keys.dtype == mx.bfloat16


def test_in_bfloat16_neither_the_kept_stream_nor_the_past_changes_a_bit(tiny, make_vector):
    tiny.set_dtype(mx.bfloat16)
    vector = make_vector((1, 2, 3), size=2.0)
    wanted = ds.Steering(vector, 1.0, (3,))
    expected = filled(tiny, wanted)
    for before in (None, ds.Steering(vector, 2.0, (1, 3)), ds.Steering(vector, 2.0, (3,))):
        for keep_bytes in (0, 2**20):
            prefix = filled(tiny, before, keep_bytes=keep_bytes)
            prefix.fill(CHUNKS, wanted)
            assert same(prefix, expected)
            logits = [tiny(mx.array([[5]]), cache=p.fork().caches) for p in (prefix, expected)]
            assert mx.array_equal(*logits)


def test_the_beginning_of_an_answer_leaves_its_start_where_it_was(tiny, steering):
    """Steered at the prompt only: what is read of an answer is not its question."""
    at_prompt = dataclasses.replace(steering, positions="prompt")
    cache = ds.make_cache(tiny, at_prompt, prompt=range(3))
    prefix = Prefix(tiny)
    prefix.fill([Chunk((1, 2)), Chunk((3, 4, 5), answer=True)], at_prompt, answering=True)
    tiny(mx.array([[1, 2, 3, 4, 5]]), cache=cache)
    got, expected = (tiny(mx.array([[6]]), cache=c) for c in (prefix.caches, cache))
    assert mx.allclose(got, expected, atol=1e-4)
    question = Prefix(tiny)
    question.fill([Chunk((1, 2)), Chunk((3, 4, 5), answer=True)], at_prompt)
    assert not mx.allclose(tiny(mx.array([[6]]), cache=question.caches), expected, atol=1e-4)


@pytest.mark.parametrize("layers", [(1,), (3,), (1, 2)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_tokens_that_end_a_step_are_told_apart_bit_for_bit(tiny, make_vector, layers, dtype):
    """Of the answer (5, 6, 7) token 6; read anew, from the kept stream, and by mlx-lm's own loop."""
    every_third_ends_a_step(tiny)
    tiny.set_dtype(dtype)
    at_steps = ds.Steering(make_vector(size=2.0), 1.0, layers, "steps")
    expected = filled(tiny, at_steps)
    generated = dataclasses.replace(at_steps, positions="generated")
    assert not same(expected, filled(tiny, generated)) or layers == (3,)
    for before in (None, generated, dataclasses.replace(at_steps, strength=-3.0)):
        prefix = filled(tiny, before, keep_bytes=2**20)
        prefix.fill(CHUNKS, at_steps)
        assert same(prefix, expected)
    begun = [CHUNKS[0], Chunk((4, *CHUNKS[1].tokens), answer=True)]
    prefix = Prefix(tiny)
    prefix.fill(begun, at_steps, answering=True)
    cache = ds.make_cache(tiny, at_steps, prompt=range(5))
    for chunk in begun:
        tiny(mx.array([chunk.tokens]), cache=cache)
    for ours, theirs in zip(prefix.caches, cache, strict=True):
        assert mx.array_equal(ours.keys[..., :8, :], theirs.keys[..., :8, :])
        assert ours.noted is None and theirs.noted is None


def test_spans_and_common_beginnings():
    assert span_in_chunk("all", False, 3) == span_in_chunk("all", True, 3) == EVERYWHERE
    assert span_in_chunk("generated", True, 3) == EVERYWHERE
    assert span_in_chunk("generated", False, 3) == NOWHERE
    assert span_in_chunk("prompt", False, 3) == EVERYWHERE
    assert span_in_chunk("prompt", True, 3) == Span(0, 4)
    assert span_in_chunk("steps", True, 3) == Span(mark="steps")
    assert span_in_chunk("steps", False, 3) == NOWHERE
    assert span_in_chunk("first:2", True, 3) == Span(0, 5)
    assert span_in_chunk("first:2", False, 3) == NOWHERE
    assert common_beginning(CHUNKS, CHUNKS[:2]) == 2
    assert common_beginning(CHUNKS, [Chunk((1, 2, 3, 4), answer=True)]) == 0


@pytest.mark.parametrize(("kept", "cleared"), [(2**20, 0), (2**30, 3)])
def test_only_large_buffers_are_freed_between_chunks(tiny, steering, monkeypatch, kept, cleared):
    calls = []
    monkeypatch.setattr(mx, "get_cache_memory", lambda: kept)
    monkeypatch.setattr(mx, "clear_cache", lambda: calls.append(1))
    filled(tiny, steering)
    assert len(calls) == cleared
