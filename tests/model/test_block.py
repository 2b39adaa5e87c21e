import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import at_every_layer, every_third_ends_a_step, streams
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import (
    KVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.models.qwen2 import TransformerBlock

from mlx_densesteer.cli.doctor import largest_error, tiny_model
from mlx_densesteer.errors import ModelError, SteeringError, VectorMismatchError
from mlx_densesteer.model.block import (
    SteeredBlock,
    make_cache,
    patch,
    unpatch,
)
from mlx_densesteer.model.cache import (
    SteeredBatchKVCache,
    SteeredKVCache,
    SteeredQuantizedKVCache,
)
from mlx_densesteer.model.machine import rounds_to_tf32
from mlx_densesteer.steering.steering import Steering


@pytest.fixture
def tiny(tiny):
    return every_third_ends_a_step(tiny)


PROMPT = [5, 17, 99, 3, 42, 8, 77, 21, 60, 11, 34, 2]


def equal(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and bool(mx.array_equal(a, b))


def close(a: mx.array, b: mx.array, tolerance=2e-5) -> bool:
    return a.shape == b.shape and float(mx.abs(a - b).max()) < tolerance


def logits_of(model, h):
    return model.model.embed_tokens.as_linear(model.model.norm(h))


def expected_logits(model, tokens, steering, within=lambda position: True):
    deltas = {layer: steering.delta(layer) for layer in steering.layers}
    return logits_of(model, streams(model, tokens, deltas, within)[-1])


def greedy(model, prompt, count, cache, **options):
    steps = generate_step(mx.array(prompt), model, max_tokens=count, prompt_cache=cache, **options)
    return [int(token) for token, _ in steps]


def test_a_patched_model_is_the_stock_model_bit_for_bit(tiny):
    tokens = mx.array([PROMPT])
    before = tiny(tokens)
    parameters = dict(tree_flatten(tiny.parameters()))
    patch(tiny)
    assert all(isinstance(block, SteeredBlock) for block in tiny.model.layers)
    assert equal(tiny(tokens), before)
    assert equal(tiny(tokens, make_prompt_cache(tiny)), tiny(tokens, make_cache(tiny)))
    after = dict(tree_flatten(tiny.parameters()))
    assert after.keys() == parameters.keys()
    assert all(after[k] is parameters[k] for k in after)


def test_patching_twice_is_patching_once_and_undo_is_exact(tiny):
    before = tiny(mx.array([PROMPT]))
    unpatch(patch(patch(tiny)))
    assert all(type(block) is TransformerBlock for block in tiny.model.layers)
    assert equal(tiny(mx.array([PROMPT])), before)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_strength_zero_is_bit_identical(tiny, make_vector, dtype):
    tiny.set_dtype(dtype)
    stock = tiny(mx.array([PROMPT]), make_prompt_cache(tiny))
    cache = make_cache(tiny, at_every_layer(make_vector(), 0.0))
    assert all(c.shift is None for c in cache)
    assert equal(tiny(mx.array([PROMPT]), cache), stock)


@pytest.mark.parametrize("layers", [(0,), (2,), (3,), (0, 2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("strength", [1.0, -2.5])
def test_the_output_is_the_stream_plus_lambda_v(tiny, make_vector, layers, strength):
    steering = Steering(make_vector(), strength, layers=layers)
    expected = expected_logits(tiny, PROMPT, steering)
    steered = tiny(mx.array([PROMPT]), make_cache(tiny, steering))
    assert close(steered, expected)
    assert not close(steered, tiny(mx.array([PROMPT])), tolerance=0.01)


def test_layers_below_are_untouched(tiny, make_vector):
    """Keys and values of the layers up to the steered one are those of the stock model."""
    stock, steered = make_prompt_cache(tiny), make_cache(tiny, Steering(make_vector(), 1.0, (1,)))
    tiny(mx.array([PROMPT]), stock)
    tiny(mx.array([PROMPT]), steered)
    same = [
        equal(a.keys, b.keys) and equal(a.values, b.values)
        for a, b in zip(stock, steered, strict=True)
    ]
    assert same == [True, True, False, False]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_the_stream_keeps_its_dtype(tiny, make_vector, dtype):
    tiny.set_dtype(dtype)
    cache = make_cache(tiny, at_every_layer(make_vector()))
    assert tiny(mx.array([PROMPT]), cache).dtype == dtype
    assert all(c.keys.dtype == dtype and c.values.dtype == dtype for c in cache)


WITHIN = {
    "all": lambda p: True,
    "prompt": lambda p: p < len(PROMPT),
    "generated": lambda p: p >= len(PROMPT) - 1,
    "steps": lambda p: p == len(PROMPT) + 1,  # 51; the prompt's multiples of three are not steered
}


@pytest.mark.parametrize("positions", WITHIN)
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 7], [11, 1], [4, 4, 4], [1, 10, 1]])
def test_positions_are_exact_across_prefill_chunks_and_decoding(
    tiny, make_vector, positions, chunks
):
    steering = Steering(make_vector(), 2.0, layers=(1, 2), positions=positions)
    sequence = [*PROMPT, 50, 51, 52, 53]
    expected = expected_logits(tiny, sequence, steering, WITHIN[positions])
    cache = make_cache(tiny, steering, prompt=PROMPT)
    pieces, at = [], 0
    for length in [*chunks, 1, 1, 1, 1]:
        pieces.append(tiny(mx.array([sequence[at : at + length]]), cache))
        at += length
    assert close(mx.concatenate(pieces, axis=1), expected)


def test_a_chunk_that_crosses_the_boundary(tiny, make_vector):
    """As in speculative decoding: the last prompt token comes with drafted ones."""
    sequence = [*PROMPT, 50, 51, 52]
    for positions, within in WITHIN.items():
        steering = Steering(make_vector(), 2.0, layers=(1,), positions=positions)
        cache = make_cache(tiny, steering, prompt=PROMPT)
        first = tiny(mx.array([sequence[:6]]), cache)
        rest = tiny(mx.array([sequence[6:]]), cache)
        expected = expected_logits(tiny, sequence, steering, within)
        assert close(mx.concatenate([first, rest], axis=1), expected), positions


def test_the_last_prompt_token_is_in_both_halves(tiny, make_vector):
    """Steering "prompt" and "generated" each move the logits that choose the first token."""
    stock = tiny(mx.array([PROMPT]))[:, -1]
    for positions in ("prompt", "generated"):
        steering = Steering(make_vector(), 2.0, layers=(3,), positions=positions)
        cache = make_cache(tiny, steering, prompt=PROMPT)
        assert not close(tiny(mx.array([PROMPT]), cache)[:, -1], stock, tolerance=0.01)


def test_trimming_keeps_positions_right(tiny, make_vector):
    steering = Steering(make_vector(), 2.0, layers=(1,), positions="generated")
    sequence = [*PROMPT, 50, 51, 52]
    cache = make_cache(tiny, steering, prompt=PROMPT)
    tiny(mx.array([[*PROMPT, 90, 91, 92, 93]]), cache)
    trim_prompt_cache(cache, 8)
    rest = tiny(mx.array([sequence[8:]]), cache)
    assert close(rest, expected_logits(tiny, sequence, steering, WITHIN["generated"])[:, 8:])


def test_mlx_lm_generates_with_our_cache(tiny, make_vector):
    steering = Steering(make_vector(), 3.0, layers=(1, 2))
    found = greedy(tiny, PROMPT, 12, make_cache(tiny, steering), prefill_step_size=5)
    sequence = list(PROMPT)
    for _ in range(12):
        sequence.append(int(expected_logits(tiny, sequence, steering)[0, -1].argmax()))
    assert found == sequence[len(PROMPT) :]
    assert found != greedy(tiny, PROMPT, 12, make_cache(tiny))


def settings_for_batch(make_vector):
    """Rows of every kind: (prompt, steering)."""
    rng = np.random.default_rng(1)
    rows = []
    for number, length in enumerate([1, 30, 7, 2, 16, 9, 23, 4]):
        prompt = [int(t) for t in rng.integers(0, 128, length)]
        steering = None
        if number % 4:
            steering = Steering(
                make_vector(seed=number), [0, 2.0, -3.0, 4.0][number % 4],
                layers=[(1,), (0, 2), (3,)][number % 3],
                positions=["all", "generated", "steps", "prompt"][number // 2],
            )  # fmt: skip
        rows.append((prompt, steering))
    return rows


@pytest.mark.parametrize("late", [False, True], ids=["together", "late arrivals"])
@pytest.mark.parametrize("limit", [2, 3, 8])
def test_every_row_of_a_batch_equals_its_solo_run(tiny, make_vector, limit, late):
    rows = settings_for_batch(make_vector)
    caches = [make_cache(tiny, s, prompt=p) for p, s in rows]
    lengths = [9 + 2 * i for i in range(len(rows))]  # rows leave at different times
    solo = [
        greedy(tiny, p, n, make_cache(tiny, s, prompt=p))
        for (p, s), n in zip(rows, lengths, strict=True)
    ]
    batch = BatchGenerator(
        tiny, completion_batch_size=limit, prefill_batch_size=min(limit, 3), prefill_step_size=4
    )
    first = 3 if late else len(rows)
    prompts = [p for p, _ in rows]
    uids = batch.insert(prompts[:first], max_tokens=lengths[:first], caches=caches[:first])
    found: dict[int, list[int]] = {uid: [] for uid in uids}
    ended, step = 0, 0
    while ended < len(rows):
        step += 1
        if late and step in (3, 6):
            part = slice(3, 5) if step == 3 else slice(5, None)
            more = batch.insert(prompts[part], max_tokens=lengths[part], caches=caches[part])
            uids += more
            found |= {uid: [] for uid in more}
        for row in batch.next_generated():
            found[row.uid].append(row.token)
            ended += row.finish_reason is not None
        assert step < 500
    batch.close()
    assert [found[uid] for uid in uids] == solo
    assert len({tuple(s) for s in solo}) > len(solo) // 2, "the rows are too alike to tell apart"


def test_a_row_taken_out_of_a_batch_keeps_its_steering(tiny, make_vector):
    rows = settings_for_batch(make_vector)[:4]
    merged = [
        SteeredKVCache.merge(layer)
        for layer in zip(*(make_cache(tiny, s, prompt=p) for p, s in rows), strict=True)
    ]
    assert all(type(c) is SteeredBatchKVCache for c in merged)
    width = 5
    tokens = mx.array([[(7 * r + c) % 128 for c in range(width)] for r in range(4)])
    tiny(tokens, merged)
    following = mx.array([[99]])
    expected = {}
    for row in (1, 2):
        prompt, steering = rows[row]
        alone = make_cache(tiny, steering, prompt=prompt)
        tiny(tokens[row : row + 1], alone)
        expected[row] = tiny(following, alone)
        taken = [c.extract(row) for c in merged]
        assert all(type(c) is SteeredKVCache for c in taken)
        assert close(tiny(following, taken), expected[row])
    copied = copy.deepcopy(merged)
    for c in copied:
        c.filter([2, 1])
    both = tiny(mx.concatenate([following] * 2), copied)
    assert close(both, mx.concatenate([expected[2], expected[1]]))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("steered_first", [False, True])
def test_rows_with_mlx_lms_default_cache_do_not_cost_others_their_steering(
    tiny, make_vector, steered_first, late
):
    steering = Steering(make_vector(), 3.0, layers=(1,))
    stock = greedy(tiny, PROMPT, 8, make_prompt_cache(tiny))
    steered = greedy(patch(tiny), PROMPT, 8, make_cache(tiny, steering))
    assert stock != steered
    batch = BatchGenerator(tiny, max_tokens=8)
    found: dict[int, list[int]] = {}
    uids = []
    for number in (0, 1):
        own = [make_cache(tiny, steering)] if (number == 0) == steered_first else None
        uids += batch.insert([PROMPT], caches=own)  # None: what mlx-lm makes for the model
        for _ in range(3 if late else 0):
            for row in batch.next_generated():
                found.setdefault(row.uid, []).append(row.token)
    for _ in range(20):
        for row in batch.next_generated():
            found.setdefault(row.uid, []).append(row.token)
    expected = [steered, stock] if steered_first else [stock, steered]
    assert [found[uid] for uid in uids] == expected


def test_stock_caches_may_follow_ours(tiny, make_vector):
    stock = make_prompt_cache(tiny)
    assert all(type(c) is KVCache for c in stock)
    ours = make_cache(tiny, Steering(make_vector(), 1.0, (1,)))
    merged = [a.merge([a, b]) for a, b in zip(ours, stock, strict=True)]
    both = tiny(mx.array([PROMPT, PROMPT]), merged)
    assert not close(both[:1], both[1:], tolerance=0.01)
    assert close(both[1:], tiny(mx.array([PROMPT])))


def test_patching_changes_what_mlx_lm_makes_and_undo_gives_it_back(tiny):
    assert all(type(c) is SteeredKVCache for c in make_prompt_cache(patch(tiny)))
    assert len(make_prompt_cache(tiny)) == 4
    assert all(type(c) is KVCache for c in make_prompt_cache(unpatch(unpatch(tiny))))


def test_the_model_is_freed_with_its_last_reference(tiny):
    import gc
    import weakref

    gc.disable()
    try:
        model = patch(tiny_model())
        alive = weakref.ref(model)
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_a_saved_prompt_cache_never_comes_back_without_its_steering(tiny, make_vector, tmp_path):
    file = str(tmp_path / "cache.safetensors")
    cache = make_cache(tiny, at_every_layer(make_vector()))
    tiny(mx.array([PROMPT]), cache)
    save_prompt_cache(file, cache)
    with pytest.raises(KeyError, match="SteeredKVCache"):
        load_prompt_cache(file)
    stock = make_prompt_cache(unpatch(tiny))
    tiny(mx.array([PROMPT]), stock)
    save_prompt_cache(file, stock)
    assert close(tiny(mx.array([[3]]), load_prompt_cache(file)), tiny(mx.array([[3]]), stock))


def test_works_after_quantisation_and_undo_gives_the_stock_quantised_model(make_vector):
    model = tiny_model()
    nn.quantize(model, group_size=32, bits=4)
    stock = model(mx.array([PROMPT]))
    steering = Steering(make_vector(), 2.0, layers=(1, 2))
    expected = expected_logits(model, PROMPT, steering)
    assert close(model(mx.array([PROMPT]), make_cache(model, steering)), expected)
    assert equal(unpatch(model)(mx.array([PROMPT])), stock)


def test_quantising_a_patched_model_is_quantising_the_model():
    patched, stock = patch(tiny_model()), tiny_model()
    for model in (patched, stock):
        nn.quantize(model, group_size=32, bits=4)
    assert type(patched.model.layers[0].mlp.down_proj) is nn.QuantizedLinear
    assert equal(patched(mx.array([PROMPT])), stock(mx.array([PROMPT])))


def test_works_with_lora_adapters(tiny, make_vector):
    from mlx_lm.tuner.utils import linear_to_lora_layers

    patch(tiny)
    config = {"rank": 4, "scale": 10.0, "dropout": 0.0}
    linear_to_lora_layers(tiny, 4, config)
    for _, module in tiny.named_modules():
        if "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape) * 0.1
    assert any("lora_b" in name for name, _ in tree_flatten(tiny.trainable_parameters()))
    stock = unpatch(tiny)(mx.array([PROMPT]))
    steering = Steering(make_vector(), 2.0, layers=(1, 2))
    expected = expected_logits(tiny, PROMPT, steering)
    steered = tiny(mx.array([PROMPT]), make_cache(tiny, steering))
    assert close(steered, expected)
    assert equal(tiny(mx.array([PROMPT]), make_cache(tiny)), stock)


def test_gradients_pass_through_a_patched_block(tiny):
    def loss(model, tokens):
        return model(tokens).square().mean()

    tokens = mx.array([PROMPT])
    stock = nn.value_and_grad(tiny, loss)(tiny, tokens)
    patched = nn.value_and_grad(patch(tiny), loss)(tiny, tokens)
    assert equal(stock[0], patched[0])
    pairs = zip(tree_flatten(stock[1]), tree_flatten(patched[1]), strict=True)
    assert all(a[0] == b[0] and equal(a[1], b[1]) for a, b in pairs)


def test_quantised_kv_cache_carries_the_steering(make_vector):
    model = tiny_model(hidden=256)  # heads of 64: what KV quantisation needs
    steering = Steering(make_vector(hidden=256), 2.0, layers=(1,), positions="generated")
    cache = make_cache(model, steering, prompt=PROMPT)
    found = greedy(model, PROMPT, 6, cache, kv_bits=8, quantized_kv_start=0)
    assert all(type(c) is SteeredQuantizedKVCache for c in cache)
    assert cache[1].shift is not None and cache[0].shift is None
    exact = greedy(model, PROMPT, 6, make_cache(model, steering, prompt=PROMPT))
    assert found[:3] == exact[:3]  # 8 bits are close, not equal
    assert found != greedy(model, PROMPT, 6, make_cache(model), kv_bits=8, quantized_kv_start=0)


def test_two_steerings_side_by_side_do_not_meet(tiny, make_vector):
    settings = [Steering(make_vector(), s, layers=(1,)) for s in (2.0, -2.0)]
    alone = [tiny(mx.array([PROMPT]), make_cache(tiny, s)) for s in settings]
    caches = [make_cache(tiny, s) for s in settings]
    parts = [[], []]
    for token in PROMPT:  # interleaved, token by token
        for cache, part in zip(caches, parts, strict=True):
            part.append(tiny(mx.array([[token]]), cache))
    assert all(close(mx.concatenate(p, axis=1), a) for p, a in zip(parts, alone, strict=True))


def test_an_exception_leaves_nothing_behind(tiny, make_vector):
    before = tiny(mx.array([PROMPT]))
    cache = make_cache(tiny, at_every_layer(make_vector()))
    with pytest.raises(ValueError):
        tiny(mx.array([[1, 2], [3, 4]])[:, :, None], cache)
    assert equal(tiny(mx.array([PROMPT])), before)
    attention = tiny.model.layers[0].self_attn
    rope, attention.rope = attention.rope, lambda *a, **k: 1 / 0
    with pytest.raises(ZeroDivisionError):
        tiny(mx.array([PROMPT]), cache)
    attention.rope = rope
    with pytest.raises(SteeringError, match="a block that does not steer"):
        unpatch(tiny)(mx.array([PROMPT]), cache)


def test_a_steered_cache_never_passes_unnoticed_through_stock_blocks(tiny, make_vector):
    cache = make_cache(tiny, at_every_layer(make_vector()))
    unpatch(tiny)
    with pytest.raises(SteeringError, match="a block that does not steer"):
        tiny(mx.array([PROMPT]), cache)


def test_what_is_no_model_is_refused():
    with pytest.raises(ModelError, match="has no model.layers"):
        patch(nn.Linear(2, 2))


def test_a_vector_of_another_width_is_refused(tiny, make_vector):
    with pytest.raises(VectorMismatchError, match="width 32, but .* hidden size 64"):
        make_cache(tiny, at_every_layer(make_vector(hidden=32)))
    with pytest.raises(VectorMismatchError, match=r"holds layer 5, but .* layers 0\.\.3"):
        make_cache(tiny, at_every_layer(make_vector([5], layer_count=6)))


def test_positions_without_a_prompt_length_are_refused(tiny, make_vector):
    with pytest.raises(
        SteeringError, match="positions 'generated' need the prompt, found None tokens"
    ):
        make_cache(tiny, at_every_layer(make_vector(), positions="generated"))


def test_an_overflow_of_the_streams_dtype_is_refused(tiny, make_vector):
    tiny.set_dtype(mx.float16)
    with pytest.raises(SteeringError, match=r"overflows the\s+model's .*float16"):
        make_cache(tiny, at_every_layer(make_vector(), 7e4))


def test_no_additional_primitive(tiny, make_vector):
    """The steered add replaces the residual add: the graphs have the same number of nodes."""

    def primitives(steering):
        import io

        model, cache = tiny, make_cache(tiny, steering)
        model(mx.array([PROMPT]), cache)
        mx.eval([c.state for c in cache])
        graph = io.StringIO()
        mx.export_to_dot(graph, model(mx.array([[3]]), cache))
        return graph.getvalue().count("shape=rectangle")

    stock = primitives(None)
    assert stock > 50
    assert primitives(at_every_layer(make_vector(), 2.0)) == stock


def test_largest_error_of_the_self_check_is_small():
    assert largest_error() < (4e-3 if rounds_to_tf32() else 1e-5)
