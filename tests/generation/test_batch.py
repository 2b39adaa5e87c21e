import dataclasses
import itertools
import random
import time

import mlx.core as mx
import pytest
from helpers import at_every_layer, same_answer
from mlx_lm.generate import BatchGenerator

import mlx_densesteer as ds
from mlx_densesteer.demo import problems
from mlx_densesteer.errors import ContextError, InputError, SteeringError, VectorMismatchError
from mlx_densesteer.generation import batch as batch_module
from mlx_densesteer.generation.batch import PREFILL, Batch, generate_batch
from mlx_densesteer.generation.brake import Brake
from mlx_densesteer.model.block import SteeredBlock, make_cache
from mlx_densesteer.model.cache import token_bytes
from mlx_densesteer.model.prefix import Prefix
from mlx_densesteer.model.prompt import decode, encode_prompt

PROMPTS = [list(range(1, n + 2)) for n in (1, 9, 30, 4, 4, 17, 2, 12, 23)]


def rows_of(vector, positions="all"):
    """One steering for each prompt: none, zero, and several strengths and layers."""
    some = itertools.product((1.0, -2.0), ((0,), (2,), (0, 3)))
    steered = [ds.Steering(vector, s, layers, positions) for s, layers in some]
    return [None, at_every_layer(vector, 0.0), *steered, None]


@pytest.mark.parametrize("positions", ["all", "generated", "prompt", "steps"])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_every_row_equals_its_solo_run(model, make_vector, positions, rows):
    steering = rows_of(make_vector(), positions)
    limits = [5, 12, 1, 7, 9, 12, 3, 8, 11]
    found = dict(generate_batch(model, PROMPTS, steering=steering, max_tokens=limits, rows=rows))
    assert sorted(found) == list(range(len(PROMPTS)))
    texts = set()
    for index, (prompt, how, limit) in enumerate(zip(PROMPTS, steering, limits, strict=True)):
        alone = ds.generate(model, prompt, steering=how, max_tokens=limit)
        same_answer(model, prompt, found[index], alone)
        texts.add(alone.token_ids)
    assert len(texts) > 4  # the steerings do differ


def test_one_steering_for_all_rows_and_rows_in_the_order_in_which_they_end(model, make_vector):
    steering = at_every_layer(make_vector(), 3.0)
    limits = [9, 2, 5]
    results = list(generate_batch(model, PROMPTS[:3], steering=steering, max_tokens=limits))
    lengths = [one.tokens for _, one in results]
    assert lengths == sorted(lengths)
    assert all(one.steering is steering for _, one in results)
    assert all(one.time_to_first_token > 0 for _, one in results)


def test_a_stop_text_ends_one_row_and_not_its_neighbours(model):
    free = [one for _, one in sorted(generate_batch(model, PROMPTS[:3], max_tokens=8))]
    stop = free[0].text[2:4]
    found = dict(generate_batch(model, PROMPTS[:3], max_tokens=8, stop=[stop]))
    for index, before in enumerate(free):
        expected = ds.generate(model, PROMPTS[index], max_tokens=8, stop=[stop])
        assert found[index].text == expected.text
        assert found[index].finish_reason == expected.finish_reason
        if stop not in before.text:
            assert found[index].text == before.text
    assert found[0].finish_reason == "stop"
    assert found[0].text == free[0].text[: free[0].text.find(stop)]


def test_messages_go_through_the_chat_template(model):
    ((_, one),) = generate_batch(model, ["Hello"], system="Be brief.", max_tokens=4)
    alone = ds.generate(model, "Hello", system="Be brief.", max_tokens=4)
    assert (one.token_ids, one.prompt_tokens) == (alone.token_ids, alone.prompt_tokens)


def test_closing_early_ends_the_rows_that_run(model, monkeypatch):
    made, closed = [], []

    class Spy(BatchGenerator):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)  # alive, so that it is not closed by its own __del__

        def close(self):
            closed.append(self)
            super().close()

    monkeypatch.setattr("mlx_densesteer.generation.batch.BatchGenerator", Spy)
    rows = generate_batch(model, PROMPTS, max_tokens=[2] + [99] * 8, rows=9)
    index, one = next(rows)
    assert (index, one.tokens) == (0, 2)
    assert len(made) == 1 and not closed
    rows.close()
    assert closed == made
    list(generate_batch(model, PROMPTS[:2], max_tokens=3))
    assert len(made) == 2 and closed == made


def test_progress_is_told_in_tokens(model):
    told = []
    limits = [40, 10]
    list(generate_batch(model, PROMPTS[:2], max_tokens=limits, progress=told.append))
    assert told == [16 + 10, 32 + 10]


def test_no_prompts_give_nothing(model):
    assert list(generate_batch(model, [])) == []


def test_what_cannot_run_is_refused_before_anything_runs(model, make_vector):
    wide = make_vector(hidden=96)
    cases = [
        ({"steering": [None]}, InputError, "1 steerings for 2 prompts"),
        ({"steering": at_every_layer(wide)}, VectorMismatchError, "width 96"),
        ({"max_tokens": [1, 0]}, InputError, "max tokens 0"),
        ({"rows": 0}, InputError, "0 rows"),
        ({"sampling": [ds.Sampling()]}, InputError, "1 samplings for 2 prompts"),
        ({"stop": [""]}, InputError, "stop text is empty"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            generate_batch(model, PROMPTS[:2], **options)
    with pytest.raises(InputError, match="no tokens"):
        generate_batch(model, [[]])


def test_a_response_ends_where_the_context_does_and_no_prompt_may_fill_it(demo_model):
    context = demo_model.context
    assert context == 1024
    found = dict(generate_batch(demo_model, [[5] * (context - 3), [5] * 4], max_tokens=[30, 6]))
    assert (found[0].tokens, found[0].finish_reason, found[0].prompt_tokens) == (3, "length", 1021)
    for length in (context, 1100):
        message = f"prompt 1 has {length} tokens, and the model's context is 1024 with the response"
        with pytest.raises(ContextError, match=message):
            generate_batch(demo_model, [[5] * 4, [5] * length], max_tokens=4)


def test_a_row_ends_where_the_context_does_and_no_prompt_may_fill_it(model):
    """What filled caches hold counts too."""
    caches = make_cache(model)
    model.network(mx.array([[5] * 500]), cache=caches)
    with Batch(model) as batch:
        for prompt, cache in (([5] * 512, None), ([5] * 12, caches), ([5] * 1100, caches)):
            with pytest.raises(ContextError, match="and the model's context is 512"):
                batch.add(prompt, cache=cache)
        assert batch.running == 0
        rows = [batch.add([5] * 9, cache=caches, max_tokens=50), batch.add([5] * 510)]
        results = run(batch)
    found = [(results[row].prompt_tokens, results[row].tokens) for row in rows]
    assert found == [(509, 3), (510, 2)]
    assert all(results[row].finish_reason == "length" for row in rows)


def test_a_seed_makes_a_sampled_batch_repeatable(model):

    def run(seed):
        sampling = ds.Sampling(temp=1.0, seed=seed)
        batch = generate_batch(model, PROMPTS, max_tokens=12, sampling=sampling)
        return [one.token_ids for _, one in sorted(batch)]

    assert run(1) == run(1) != run(2)


def run(batch, results=None, pieces=None):
    """Step until no row runs; return the results by row."""
    results = {} if results is None else results
    while batch.running:
        for piece in batch.step():
            if pieces is not None:
                pieces.setdefault(piece.row, []).append(piece.text)
            if piece.result:
                assert piece.row not in results
                results[piece.row] = piece.result
    return results


def check_arrivals(model, jobs, rng, rows, cancelled=0.2):
    """Let ``jobs`` come and go at random times; each is its solo run, or the beginning of it."""
    waiting, numbers, results, pieces = list(jobs), {}, {}, {}
    gone = set()
    with Batch(model, rows=rows) as batch:
        while waiting or batch.running:
            while waiting and (rng.random() < 0.3 or not batch.running):
                job = waiting.pop()
                numbers[batch.add(**job)] = job
            for piece in batch.step():
                pieces.setdefault(piece.row, []).append(piece.text)
                if piece.result:
                    results[piece.row] = piece.result
                if waiting and rng.random() < 0.05:  # in the middle of the pieces of a step
                    job = waiting.pop()
                    numbers[batch.add(**job)] = job
            left = sorted(set(numbers) - set(results))
            if left and rng.random() < cancelled / 8:
                row = rng.choice(left)
                results[row] = batch.cancel(row)
                assert batch.cancel(row) is None
                gone.add(row)
    assert len(results) == len(jobs)
    distinct = set()
    for row, job in numbers.items():
        alone = ds.generate(model, **job)
        said = "".join(pieces.get(row, []))
        if row in gone:
            assert results[row].finish_reason == "interrupted"
            ids = results[row].token_ids
            until = dataclasses.replace(
                alone,
                token_ids=alone.token_ids[: len(ids)],
                text=results[row].text,
                finish_reason="interrupted",
            )
            same_answer(model, job["prompt"], results[row], until)
            assert results[row].text.startswith(said)
        else:
            same_answer(model, job["prompt"], results[row], alone)
            assert said == results[row].text
        distinct.add(alone.token_ids)
    return len(gone), len(distinct)


@pytest.mark.parametrize(
    ("seed", "rows"),
    [(0, 3), (1, 16), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((2, 5), (3, 1)))],
)
def test_rows_that_join_and_leave_at_random_times_equal_their_solo_runs(
    model, make_vector, monkeypatch, seed, rows
):
    monkeypatch.setattr(batch_module, "PREFILL_BESIDE", 16)
    rng = random.Random(seed)
    vectors = [make_vector(seed=n) for n in range(3)]
    jobs = []
    for _ in range(14):
        steering = rng.choice([None, True, True, True])
        if steering:
            layers = tuple(sorted(rng.sample(range(4), rng.randrange(1, 4))))
            positions = rng.choice(["all", "generated", "prompt", "steps"])
            strength = rng.choice([0.0, -2.0, 0.5, 1.0, 3.0])
            steering = ds.Steering(rng.choice(vectors), strength, layers, positions)
        jobs.append(
            {
                "prompt": rng.choices(range(1, 250), k=rng.choice([1, 2, 7, 30, 90, 200])),
                "steering": steering,
                "max_tokens": rng.randrange(1, 40),
                "stop": rng.choice([(), (), ("a", "b"), (" the", "e")]),
            }
        )
    gone, distinct = check_arrivals(model, jobs, rng, rows)
    assert distinct > 8
    assert gone or seed not in (0, 1)


def test_the_demo_rows_that_join_and_leave_equal_their_solo_runs(demo_model):
    vector, rng = ds.SteeringVector.load("demo"), random.Random(4)
    jobs = []
    for number, problem in enumerate(problems.held_out(12)):
        where = ("all", "generated", "prompt", "steps")[number % 4]
        layers = tuple(sorted(vector.layers)[:: 1 + number % 2])
        steering = ds.Steering(vector, (-6.0, 0.0, 4.0, 9.0)[number % 4], layers, where)
        prompt = encode_prompt(demo_model.tokenizer, problem.question)
        jobs.append({"prompt": prompt, "steering": steering, "max_tokens": 12 + 5 * number})
    _, distinct = check_arrivals(demo_model, jobs, rng, rows=6, cancelled=0.1)
    assert distinct > 8


def test_pieces_come_before_the_row_ends_and_nothing_of_a_stop_text(model):
    options = {"max_tokens": 30, "sampling": ds.Sampling(temp=1.0, seed=1)}  # greedy repeats

    def answered(stop):
        with Batch(model) as batch:
            row = batch.add(PROMPTS[2], stop=stop, **options)
            batch.add(PROMPTS[1], max_tokens=30)
            pieces = {}
            return run(batch, pieces=pieces)[row], pieces[row]

    free, _ = answered([])
    stop = free.text[12:15]
    result, pieces = answered([stop])
    assert len(pieces) > 3
    assert result.finish_reason == "stop"
    assert "".join(pieces) == result.text == free.text[: free.text.find(stop)]


@pytest.mark.parametrize("positions", ["all", "generated", "prompt", "steps"])
def test_a_row_goes_on_from_filled_caches_and_leaves_them_alone(model, make_vector, positions):
    steering = ds.Steering(make_vector(), 2.0, (1, 3), positions)
    prompt, cut = PROMPTS[2], 21
    alone = ds.generate(model, prompt, steering=steering, max_tokens=12)
    caches = make_cache(model, steering, prompt=prompt)
    model.network(mx.array([prompt[:cut]]), cache=caches)
    mx.eval([cache.state for cache in caches])
    before = [[mx.array(array) for array in cache.state] for cache in caches]
    with Batch(model) as batch:
        batch.add(PROMPTS[1], max_tokens=20)
        batch.step()
        row = batch.add(prompt[cut:], cache=caches, steering=steering, max_tokens=12)
        again = batch.add(prompt[cut:], cache=caches, steering=steering, max_tokens=12)
        results = run(batch)
    same_answer(model, prompt, results[row], alone)
    same_answer(model, prompt, results[again], alone)
    for cache, arrays in zip(caches, before, strict=True):
        assert cache.offset == cut
        assert all(mx.array_equal(a, b) for a, b in zip(cache.state, arrays, strict=True))


@pytest.mark.parametrize("cut", [20, 256])
def test_the_owner_of_the_caches_may_go_on_filling_them(model, make_vector, cut):
    prompt = [1 + (7 * n) % 250 for n in range(cut + 4)]  # 256: the cache's array is full
    options = {"steering": at_every_layer(make_vector(), 0.1), "max_tokens": 20}
    options["sampling"] = ds.Sampling(temp=1.0, seed=2)  # draws tell logits apart, greedy may not
    alone = ds.generate(model, prompt, **options)
    caches = make_cache(model, options["steering"])
    model.network(mx.array([prompt[:cut]]), cache=caches)
    with Batch(model) as batch:
        row = batch.add(prompt[cut:], cache=caches, **options)
        for cache in caches:
            cache.trim(9)
        model.network(mx.array([[5] * 30]), cache=caches)
        mx.eval([cache.state for cache in caches])
        same_answer(model, prompt, run(batch)[row], alone)


def test_caches_that_cannot_join_a_batch_are_refused(model, make_vector):
    caches = make_cache(model)
    model.network(mx.array([PROMPTS[2]]), cache=caches)
    uneven = make_cache(model)
    uneven[2] = caches[2]
    with Batch(model) as batch:
        for given, message in [
            (caches[:3], "3 caches of class SteeredKVCache: expected 4"),
            ([cache.to_quantized() for cache in make_cache(model)], "without kv_bits"),
            (uneven, r"hold \[0, 31\] tokens"),
            ([], "0 caches"),
        ]:
            with pytest.raises(SteeringError, match=message):
                batch.add([1, 2], cache=given)
        assert batch.running == 0
        row = batch.add([1, 2], cache=make_cache(model), max_tokens=3)  # empty ones are fine
        assert run(batch)[row].prompt_tokens == 2


def test_a_seeded_row_draws_as_it_does_alone_whoever_is_beside_it(model):
    kinds = [
        ds.Sampling(temp=1.0, seed=5), ds.Sampling(temp=0.7, top_p=0.8, seed=5), ds.Sampling(),
        ds.Sampling(temp=1.3, seed=6), ds.Sampling(temp=1.0), ds.Sampling(temp=1.0, seed=5),
    ]  # fmt: skip
    with Batch(model, rows=4) as batch:
        rows = []
        for kind in kinds:
            rows.append(batch.add(PROMPTS[1], sampling=kind, max_tokens=25))
            batch.step()
            batch.step()
        results = run(batch)
    for row, kind in zip(rows, kinds, strict=True):
        if kind.seed is not None or not kind.temp:
            alone = ds.generate(model, PROMPTS[1], sampling=kind, max_tokens=25)
            same_answer(model, PROMPTS[1], results[row], alone)
    assert results[rows[0]].token_ids == results[rows[5]].token_ids
    assert len({one.token_ids for one in results.values()}) == 5


def test_rows_that_draw_alike_share_one_sampler():
    greedy = ds.Sampling().row_sampler()
    assert ds.Sampling(top_p=0.5, seed=3).row_sampler() is greedy
    warm = ds.Sampling(temp=0.5).row_sampler()
    assert ds.Sampling(temp=0.5).row_sampler() is warm is not greedy
    seeded = ds.Sampling(temp=0.5, seed=1)
    assert seeded.row_sampler() is not seeded.row_sampler()


def test_equal_prompts_of_a_seeded_batch_draw_different_answers(model):
    sampling = ds.Sampling(temp=1.0, seed=3)
    found = generate_batch(model, [PROMPTS[1]] * 4, max_tokens=12, sampling=sampling)
    assert len({one.token_ids for _, one in found}) == 4


def test_a_row_with_a_sampling_of_its_own_draws_what_it_draws_alone(model):
    samplings = [ds.Sampling(temp=1.0, seed=seed) for seed in (3, 4, 3)] + [ds.Sampling()]
    prompts = [PROMPTS[1], PROMPTS[1], PROMPTS[1], PROMPTS[2]]
    found = dict(generate_batch(model, prompts, max_tokens=12, sampling=samplings, rows=3))
    for number, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        alone = ds.generate(model, prompt, max_tokens=12, sampling=sampling)
        assert found[number].token_ids == alone.token_ids
    assert found[0].token_ids == found[2].token_ids != found[1].token_ids


def test_the_time_of_the_steps_is_divided_among_their_rows(model):
    began = time.perf_counter()
    with Batch(model, rows=3) as batch:
        rows = [
            batch.add(prompt, max_tokens=12) for prompt in ([3] * 9, [4] * 400, [5] * 9, [6] * 9)
        ]
        results = run(batch)
    seconds = [results[row].compute_seconds for row in rows]
    assert min(seconds) > 0 and sum(seconds) <= time.perf_counter() - began
    assert seconds[1] == max(seconds)  # it read most


def test_a_step_charges_those_that_decode_with_what_decoding_takes(model):
    with Batch(model) as batch:
        a, b, c = (batch._rows[batch.add([5] * 9)] for _ in range(3))
        batch._charge(4.0, [], [(a, 6), (b, 2)])
        assert (a.seconds, b.seconds) == (3.0, 1.0)
        batch._charge(3.0, [a], [(b, 4)])  # decoding alone is not known yet: by tokens
        assert (a.seconds, b.seconds) == (4.0, 3.0)
        batch._charge(2.0, [a, b], [])
        assert (a.seconds, b.seconds) == (5.0, 4.0)
        batch._charge(6.0, [a, b], [(c, 8)])
        assert (a.seconds, b.seconds, c.seconds) == (6.0, 5.0, 4.0)
        batch._charge(5.0, [], [(c, 9)])
        assert (c.seconds, c.read) == (9.0, 9)


@pytest.mark.same_bits
@pytest.mark.parametrize("positions", ["all", "generated", "prompt"])
def test_a_common_beginning_is_read_once_and_changes_nothing(
    model, make_vector, monkeypatch, positions
):
    """Two steerings, each with prompts of other lengths after the beginning; and equal prompts.

    Where the steering leaves the prompt alone, the unsteered rows share their beginning with it.
    """
    steerings = [None, at_every_layer(make_vector(), 2.0, positions)]
    beginning = [3 + i % 50 for i in range(120)]
    prompts = [[*beginning, *PROMPTS[i]] for i in (1, 2, 3, 3)] * 2 + [PROMPTS[1]]
    how = [steerings[0]] * 4 + [steerings[1]] * 5
    drawn = [ds.Sampling(temp=0.5, seed=seed) for seed in range(9)]  # more than greedy tokens tell
    options = {"steering": how, "sampling": drawn, "max_tokens": 6, "rows": 3}
    read, stock = [], SteeredBlock.__call__

    def spy(self, x, *args, **options):
        read.append(x.shape[0] * x.shape[1])
        return stock(self, x, *args, **options)

    monkeypatch.setattr(SteeredBlock, "__call__", spy)
    found = dict(generate_batch(model, prompts, **options))
    together = sum(read)
    monkeypatch.setattr(batch_module, "SHARED_AT_ONCE", 0)
    apart = dict(generate_batch(model, prompts, **options))
    saved = (sum(read) - 2 * together) / 120  # 4 blocks; 3 of them again under the steering
    assert (
        saved > 8 * 4 - 4 if positions == "generated" else saved > 8 * 4 - 4 - 3
    )  # but for the padding
    assert set(found) == set(range(9))
    for number, one in apart.items():
        assert found[number].token_ids == one.token_ids
        assert found[number].prompt_tokens == one.prompt_tokens == len(prompts[number])
        assert found[number].compute_seconds > 0
    assert len({one.token_ids for one in apart.values()}) > 5


def test_one_prompt_under_many_steerings_is_read_once_below_the_lowest_layer(
    model, make_vector, monkeypatch
):
    """Of a sweep: 4 blocks for the first, then those above layer 2 only, whatever the strength."""
    vector, prompt = make_vector(), [3 + i % 50 for i in range(121)]
    how = [
        None,
        *(ds.Steering(vector, s, layers) for s in (1.0, -2.0, 4.0) for layers in ((2,), (3,))),
    ]
    options = {"steering": how, "max_tokens": 4}
    computed, fill = [], Prefix.fill

    def spy(self, *args, **options):
        computed.append(fill(self, *args, **options).block_tokens)

    monkeypatch.setattr(Prefix, "fill", spy)
    together = dict(generate_batch(model, [prompt] * 7, **options))
    assert sum(computed) == 120 * (4 + 6)  # all other fills are of no block
    monkeypatch.setattr(batch_module, "SHARED_AT_ONCE", 0)
    apart = dict(generate_batch(model, [prompt] * 7, **options))
    assert [together[i].token_ids for i in range(7)] == [apart[i].token_ids for i in range(7)]
    assert len({one.token_ids for one in apart.values()}) > 3


@pytest.fixture
def calls(model, monkeypatch):
    """The shapes ``(rows, tokens)`` of what the model was called with, as they come."""
    seen, kind = [], type(model.network)
    stock = kind.__call__

    def spy(self, inputs, *args, **options):
        seen.append(inputs.shape)
        return stock(self, inputs, *args, **options)

    monkeypatch.setattr(kind, "__call__", spy)
    return seen


def test_a_long_prompt_holds_the_others_up_by_one_part_a_step(model, calls, monkeypatch):
    monkeypatch.setattr(batch_module, "PREFILL_BESIDE", 32)
    with Batch(model) as batch:
        early = batch.add(PROMPTS[1], max_tokens=60)
        while not batch.tokens:
            batch.step()
        late = [batch.add([3] * 150, max_tokens=4), batch.add([4] * 100, max_tokens=4)]
        del calls[:]
        results = {}
        while batch.running:
            tokens, at = batch.tokens, len(calls)
            results |= {piece.row: piece.result for piece in batch.step() if piece.result}
            parts = [rows * length for rows, length in calls[at:] if length > 1]
            assert sum(parts) <= 32
            if batch.running and early not in results:
                assert batch.tokens > tokens  # the first row is never passed over
    assert max(length for _, length in calls) > 1
    assert results[early].tokens == 60
    for row, token, length in zip(late, (3, 4), (150, 100), strict=True):
        prompt = [token] * length
        same_answer(model, prompt, results[row], ds.generate(model, prompt, max_tokens=4))


def test_a_prompt_that_nobody_waits_for_is_read_at_once(model, calls):
    with Batch(model) as batch:
        batch.add([3] * 400, max_tokens=2)
        assert batch.step() == []
        assert calls == [(1, 399)]
    assert PREFILL > 400


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_broken_step_closes_the_batch_and_what_was_said_stays(model, monkeypatch, error):
    made, closed, stock = [], [], type(model.network).__call__

    class Spy(BatchGenerator):
        def close(self):
            closed.append(self)
            super().close()

    monkeypatch.setattr("mlx_densesteer.generation.batch.BatchGenerator", Spy)
    batch = Batch(model, rows=2)
    made.append(batch._generator)
    rows = [batch.add(prompt, max_tokens=50) for prompt in PROMPTS[:3]]  # the last one waits
    while batch.tokens < 12:
        batch.step()

    def broken(self, *args, **options):
        raise error("in the middle of a step")

    with monkeypatch.context() as patched, pytest.raises(error):
        patched.setattr(type(model.network), "__call__", broken)
        batch.step()
    assert closed == made
    assert batch.running == 0 and batch.step() == []
    with pytest.raises(InputError, match="the batch is closed"):
        batch.add([1])
    batch.close()
    assert closed == made
    for row, prompt in zip(rows, PROMPTS, strict=False):
        result = batch.cancel(row)
        assert result.finish_reason == "interrupted"
        alone = ds.generate(model, prompt, max_tokens=50)
        assert result.token_ids == alone.token_ids[: result.tokens]
        assert (result.tokens > 4) == (row != rows[2])
        assert type(model.network).__call__ is stock
    assert batch.cancel(rows[0]) is None


def test_cancel_takes_out_rows_that_wait_read_or_decode(model):
    with Batch(model, rows=2) as batch:
        stays = batch.add(PROMPTS[1], max_tokens=30)
        while batch.tokens < 3:
            batch.step()
        reads = batch.add([7] * 400, max_tokens=30)
        waits = batch.add(PROMPTS[2], max_tokens=30)
        batch.step()
        assert batch.running == 3
        for row in (waits, reads):
            result = batch.cancel(row)
            assert (result.text, result.tokens, result.time_to_first_token) == ("", 0, 0.0)
            assert result.finish_reason == "interrupted"
        assert batch.running == 1
        late = batch.add(PROMPTS[3], max_tokens=5)
        results = run(batch)
        assert batch.cancel(stays) is batch.cancel(99) is None
    assert set(results) == {stays, late}
    for row, prompt, limit in ((stays, PROMPTS[1], 30), (late, PROMPTS[3], 5)):
        alone = ds.generate(model, prompt, max_tokens=limit)
        same_answer(model, prompt, results[row], alone)


def test_a_row_that_cannot_run_does_not_join(model, make_vector):
    with pytest.raises(InputError, match="0 rows"):
        Batch(model, rows=0)
    with Batch(model) as batch:
        with pytest.raises(InputError, match="no tokens"):
            batch.add([])
        with pytest.raises(InputError, match="max tokens 0"):
            batch.add([1], max_tokens=0)
        with pytest.raises(InputError, match="stop text is empty"):
            batch.add([1], stop=[""])
        with pytest.raises(VectorMismatchError, match="width 96"):
            batch.add([1], steering=at_every_layer(make_vector(hidden=96)))
        assert batch.running == 0 and batch.step() == []


def test_the_texts_of_tokens_join_to_the_text(hf_folder):
    """Random bytes: most characters are incomplete, and come with the last of their tokens."""
    model = ds.load(hf_folder)
    sampling = ds.Sampling(temp=1.0, seed=7)
    with Batch(model) as batch:
        batch.add([257, 65, 66], logprobs=1, max_tokens=60, sampling=sampling)
        pieces = []
        while batch.running:
            pieces += batch.step()
    result = pieces[-1].result
    assert result.text == decode(model.tokenizer, result.token_ids) and "\ufffd" in result.text
    assert "".join(piece.text for piece in pieces) == result.text
    told = [token for piece in pieces for token in piece.logprobs]
    assert [one.token for one in told] == list(result.token_ids)
    assert "".join(one.text for one in told) == result.text


def test_a_row_ends_where_its_own_turn_does(demo_model):
    """A raw row beside a chat row: the template's end of turn, which mlx-lm does not know, ends one."""
    base = ds.Model(demo_model.network, demo_model.tokenizer, "base")
    raw = demo_model.tokenizer.encode("Sam has")
    chat = encode_prompt(demo_model.tokenizer, problems.held_out(1)[0].question)
    plain, said = (
        ds.generate(demo_model, prompt, max_tokens=20).token_ids for prompt in (raw, chat)
    )
    end = next(token for token in said[1:] if token in plain)
    base.__dict__["end_of_turn"] = end
    with Batch(base) as batch:
        rows = [batch.add(prompt, max_tokens=20) for prompt in (raw, chat, raw)]
        found = {}
        while batch.running:
            found |= {piece.row: piece.result for piece in batch.step() if piece.result}
    whole, ended, again = (found[row] for row in rows)
    assert whole.token_ids == again.token_ids == plain
    assert ended.token_ids == said[: said.index(end)]
    assert ended.finish_reason == "stop" and ended.text == decode(base.tokenizer, ended.token_ids)


def test_what_a_cache_holds_is_part_of_the_whole_prompt(demo_model):
    steering = ds.resolve(demo_model, "demo", "100%", (5,))
    prompt = encode_prompt(demo_model.tokenizer, problems.held_out(1)[0].question)
    cache = make_cache(demo_model, steering, prompt=prompt)
    demo_model.network(mx.array([prompt[:10]]), cache=cache)
    options = {"steering": steering, "brake": Brake(limit=24), "max_tokens": 150}
    with Batch(demo_model) as batch:
        for wrong in ({}, {"whole": prompt[1:]}, {"whole": prompt, "steering": None}):
            with pytest.raises(InputError, match="whole prompt"):
                batch.add(prompt[10:], cache=cache, **options | wrong)
        with pytest.raises(InputError, match="whole prompt"):
            batch.add(prompt, whole=prompt[1:])
        batch.add(prompt[10:], cache=cache, whole=prompt, **options)
        while batch.running:
            pieces = batch.step()
    found = pieces[-1].result
    alone = ds.generate(demo_model, prompt, **options)
    assert found.brakes == alone.brakes != () and found.token_ids == alone.token_ids


def test_the_brake_cuts_a_row_as_it_cuts_a_lone_answer(demo_model):
    """Overdosed rows beside others: what is shown is not taken back, and a token has its log-probability."""
    how = [
        ds.resolve(demo_model, "demo", strength, layers, positions)
        for strength, layers, positions in (
            ("100%", (5,), "all"), (0, (5,), "all"), ("300%", (3,), "generated"), ("20%", (5,), "all"),
        )
    ]  # fmt: skip
    questions = [problem.question for problem in problems.held_out(len(how))]
    brake = Brake(limit=24)
    alone = [
        ds.generate(demo_model, q, steering=s, brake=brake, max_tokens=150)
        for q, s in zip(questions, how, strict=True)
    ]
    assert [bool(one.brakes) for one in alone] == [True, False, True, False]
    with Batch(demo_model, rows=3) as batch:
        rows = [
            batch.add(encode_prompt(demo_model.tokenizer, q), steering=s, brake=brake, logprobs=0, max_tokens=150)
            for q, s in zip(questions, how, strict=True)
        ]  # fmt: skip
        said = {row: [] for row in rows}
        while batch.running:
            for piece in batch.step():
                said[piece.row].append(piece)
    for row, expected in zip(rows, alone, strict=True):
        found = said[row][-1].result
        for name in ("token_ids", "text", "finish_reason", "brakes", "prompt_tokens", "steering"):
            assert getattr(found, name) == getattr(expected, name), name
        assert "".join(piece.text for piece in said[row]) == found.text
        told = [one.token for piece in said[row] for one in piece.logprobs]
        assert told == list(found.token_ids)


@pytest.mark.parametrize("fits", [False, True])
def test_a_long_prompt_waits_while_the_cache_of_all_rows_would_not_fit(model, metal_like, fits):
    """mlx-lm's cache makes every row as long as the longest."""
    tokens = 8 * 250 if fits else 250
    room = int(tokens * token_bytes(model.network) / batch_module.KV_SHARE)
    metal_like.give_device(mx.get_active_memory() + room)
    seen = []
    with Batch(model, rows=8) as batch:
        for prompt in (*[PROMPTS[1]] * 6, [1] * 200, PROMPTS[1]):
            batch.add(prompt, max_tokens=8)
        while batch.running:
            batch.step()
            seen.append([len(row.prompt) for row in batch._inside.values()])
    assert any(200 in inside for inside in seen)
    assert any(200 in inside and len(inside) > 1 for inside in seen) == fits
    assert max(map(len, seen)) == (8 if fits else 6)


@pytest.mark.parametrize("stop", [(), ("a",)])
def test_a_row_gives_its_caches_only_if_they_are_asked_for(model, stop):
    with Batch(model) as batch:
        rows = [batch.add(PROMPTS[2], max_tokens=9, stop=stop, keep=keep) for keep in (True, False)]
        last = {}
        while batch.running:
            last |= {piece.row: piece for piece in batch.step() if piece.result}
    kept, other = (last[row] for row in rows)
    assert kept.result.token_ids == other.result.token_ids and other.caches == ()
    read = len(PROMPTS[2]) + len(kept.result.token_ids)
    assert all(read - 1 <= cache.offset <= read + 1 for cache in kept.caches)
