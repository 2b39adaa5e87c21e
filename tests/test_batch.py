import itertools

import pytest
from mlx_lm.generate import BatchGenerator

import mlx_densesteer as ds
from mlx_densesteer.batch import generate_batch
from mlx_densesteer.errors import InputError, VectorMismatchError

PROMPTS = [list(range(1, n + 2)) for n in (1, 9, 30, 4, 4, 17, 2, 12, 23)]


@pytest.fixture
def loaded(hf_folder, tmp_path):
    folder = ds.convert(hf_folder, tmp_path / "tiny", bits=None, dtype="float32")
    return ds.load(folder)


def rows_of(vector, positions="all"):
    """One steering for each prompt: none, zero, and several strengths and layers."""
    some = itertools.product((1.0, -2.0), ((0,), (2,), (0, 3)))
    steered = [ds.Steering(vector, s, layers, positions) for s, layers in some]
    return [None, ds.Steering(vector, 0.0), *steered, None]


@pytest.mark.parametrize("positions", ["all", "generated", "prompt"])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_every_row_equals_its_solo_run(loaded, make_vector, positions, rows):
    model, tokenizer = loaded
    steering = rows_of(make_vector(), positions)
    limits = [5, 12, 1, 7, 9, 12, 3, 8, 11]
    found = dict(
        generate_batch(model, tokenizer, PROMPTS, steering=steering, max_tokens=limits, rows=rows)
    )
    assert sorted(found) == list(range(len(PROMPTS)))
    texts = set()
    for index, (prompt, how, limit) in enumerate(zip(PROMPTS, steering, limits, strict=True)):
        alone = ds.generate(model, tokenizer, prompt, steering=how, max_tokens=limit)
        together = found[index]
        for name in ("text", "token_ids", "prompt_tokens", "finish_reason", "steering"):
            assert getattr(together, name) == getattr(alone, name), (index, name)
        texts.add(together.token_ids)
    assert len(texts) > 4  # the steerings do differ


def test_one_steering_for_all_rows_and_rows_in_the_order_in_which_they_end(loaded, make_vector):
    model, tokenizer = loaded
    steering = ds.Steering(make_vector(), 3.0)
    limits = [9, 2, 5]
    results = list(
        generate_batch(model, tokenizer, PROMPTS[:3], steering=steering, max_tokens=limits)
    )
    lengths = [one.tokens for _, one in results]
    assert lengths == sorted(lengths)
    assert all(one.steering is steering for _, one in results)
    assert all(one.time_to_first_token > 0 for _, one in results)


def test_a_stop_text_ends_one_row_and_not_its_neighbours(loaded):
    model, tokenizer = loaded
    free = [one for _, one in sorted(generate_batch(model, tokenizer, PROMPTS[:3], max_tokens=8))]
    stop = free[0].text[2:4]
    found = dict(generate_batch(model, tokenizer, PROMPTS[:3], max_tokens=8, stop=[stop]))
    for index, before in enumerate(free):
        expected = ds.generate(model, tokenizer, PROMPTS[index], max_tokens=8, stop=[stop])
        assert found[index].text == expected.text
        assert found[index].finish_reason == expected.finish_reason
        if stop not in before.text:
            assert found[index].text == before.text
    assert found[0].finish_reason == "stop"
    assert found[0].text == free[0].text[: free[0].text.find(stop)]


def test_messages_go_through_the_chat_template(loaded):
    model, tokenizer = loaded
    ((_, one),) = generate_batch(model, tokenizer, ["Hello"], system="Be brief.", max_tokens=4)
    alone = ds.generate(model, tokenizer, "Hello", system="Be brief.", max_tokens=4)
    assert (one.token_ids, one.prompt_tokens) == (alone.token_ids, alone.prompt_tokens)


def test_closing_early_ends_the_rows_that_run(loaded, monkeypatch):
    model, tokenizer = loaded
    made, closed = [], []

    class Spy(BatchGenerator):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)  # alive, so that it is not closed by its own __del__

        def close(self):
            closed.append(self)
            super().close()

    monkeypatch.setattr("mlx_densesteer.batch.BatchGenerator", Spy)
    rows = generate_batch(model, tokenizer, PROMPTS, max_tokens=[2] + [99] * 8, rows=4)
    index, one = next(rows)
    assert (index, one.tokens) == (0, 2)
    assert len(made) == 1 and not closed
    rows.close()
    assert closed == made
    list(generate_batch(model, tokenizer, PROMPTS[:2], max_tokens=3))
    assert len(made) == 2 and closed == made


def test_progress_is_told_in_tokens(loaded):
    model, tokenizer = loaded
    told = []
    limits = [40, 10]
    list(generate_batch(model, tokenizer, PROMPTS[:2], max_tokens=limits, progress=told.append))
    assert told == [16 + 10, 32 + 10]


def test_no_prompts_give_nothing(loaded):
    assert list(generate_batch(*loaded, [])) == []


def test_what_cannot_run_is_refused_before_anything_runs(loaded, make_vector):
    model, tokenizer = loaded
    wide = make_vector(hidden=96)
    cases = [
        ({"steering": [None]}, InputError, "1 steerings for 2 prompts"),
        ({"steering": ds.Steering(wide)}, VectorMismatchError, "width 96"),
        ({"max_tokens": [1, 0]}, InputError, "max tokens 0"),
        ({"rows": 0}, InputError, "0 rows"),
        ({"stop": [""]}, InputError, "stop text is empty"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            generate_batch(model, tokenizer, PROMPTS[:2], **options)
    with pytest.raises(InputError, match="no tokens"):
        generate_batch(model, tokenizer, [[]])


def test_a_seed_makes_a_sampled_batch_repeatable(loaded):
    model, tokenizer = loaded

    def run(seed):
        sampling = ds.Sampling(temp=1.0, seed=seed)
        batch = generate_batch(model, tokenizer, PROMPTS, max_tokens=12, sampling=sampling)
        return [one.token_ids for _, one in sorted(batch)]

    assert run(1) == run(1) != run(2)
