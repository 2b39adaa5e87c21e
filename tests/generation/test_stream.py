import dataclasses

import mlx.core as mx
import pytest
from helpers import at_every_layer
from mlx_lm import generate as mlx_lm_generate
from mlx_lm import load as mlx_lm_load

import mlx_densesteer as ds
from mlx_densesteer import demo
from mlx_densesteer.demo.problems import held_out
from mlx_densesteer.errors import ContextError, InputError
from mlx_densesteer.model.prompt import encode_prompt


@pytest.fixture(scope="module")
def loaded(hf_folder):
    return ds.load(hf_folder)


@pytest.fixture
def steering(make_vector):
    return ds.Steering(make_vector(size=3.0), 1.0, layers=(1, 2))


def test_unsteered_is_what_mlx_lm_generates(loaded, hf_folder):
    stock, tokenizer = mlx_lm_load(str(hf_folder))
    expected = mlx_lm_generate(stock, tokenizer, encode_prompt(tokenizer, "2 + 2?"), max_tokens=12)
    assert ds.generate(*loaded, "2 + 2?", max_tokens=12).text == expected


def test_steering_changes_the_text_and_strength_zero_does_not(loaded, make_vector, steering):
    plain = ds.generate(*loaded, "hello", max_tokens=12)
    zero = ds.generate(*loaded, "hello", max_tokens=12, steering=at_every_layer(make_vector(), 0.0))
    steered = ds.generate(*loaded, "hello", max_tokens=12, steering=steering)
    assert zero.token_ids == plain.token_ids
    assert steered.token_ids != plain.token_ids
    assert steered.steering is steering


def test_pieces_add_up_and_counts_are_true(loaded):
    pieces = ds.stream(*loaded, "hello", max_tokens=15)
    text = "".join(pieces)
    result = pieces.result
    assert text == result.text
    assert result.tokens == len(result.token_ids) == 15
    assert result.finish_reason == "length"
    assert result.prompt_tokens == len(encode_prompt(loaded[1], "hello"))
    assert result.steps >= 1 and result.density == 15 / result.steps
    assert result.time_to_first_token > 0 and result.tokens_per_second > 0
    assert result.peak_memory_bytes > 10_000


def test_the_end_of_turn_token_is_not_counted(loaded, monkeypatch):
    model, tokenizer = loaded
    ids = ds.generate(model, tokenizer, "hello", max_tokens=9).token_ids
    end = ids[5]
    before = tokenizer.eos_token_ids
    try:
        tokenizer.eos_token_ids = {end}
        result = ds.generate(model, tokenizer, "hello", max_tokens=9)
    finally:
        tokenizer.eos_token_ids = before
    assert result.token_ids == ids[: ids.index(end)]
    assert result.finish_reason == "stop"


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_stop_text_ends_the_response_and_is_left_out(loaded, length):
    text = ds.generate(*loaded, "hello", max_tokens=30).text
    stop = text[7 : 7 + length]
    pieces = ds.stream(*loaded, "hello", max_tokens=30, stop=["never there", stop])
    shown = list(pieces)
    assert "".join(shown) == text[: text.index(stop)]
    assert pieces.result.finish_reason == "stop"


def test_a_stop_text_that_never_comes_changes_nothing(loaded):
    text = ds.generate(*loaded, "hello", max_tokens=20).text
    assert ds.generate(*loaded, "hello", max_tokens=20, stop=[text[-1] + "\0"]).text == text


def test_an_interruption_keeps_what_was_held_back(loaded):
    text = ds.generate(*loaded, "hello", max_tokens=30).text
    pieces = ds.stream(*loaded, "hello", max_tokens=30, stop=[text[8:] + "never"])
    shown = ""
    while len(shown) < 8:
        shown += next(pieces)
    pieces.close()
    result = pieces.result
    assert result.text.startswith(shown) and result.finish_reason == "interrupted"
    assert loaded[1].decode(list(result.token_ids)).startswith(result.text)


def test_two_streams_of_one_seed_do_not_meet(loaded):
    def start():
        return ds.stream(*loaded, "hello", max_tokens=8, sampling=ds.Sampling(temp=1.0, seed=1))

    alone = list(start())
    first, second = start(), start()
    assert list(first) == alone == list(second)


def test_stopping_early_keeps_what_was_said(loaded):
    pieces = ds.stream(*loaded, "hello", max_tokens=30)
    first = next(pieces)
    assert pieces.result.text == first
    assert pieces.result.finish_reason == "interrupted"


def test_sampling_repeats_with_a_seed(loaded):
    def sample(seed):
        options = ds.Sampling(temp=1.0, top_p=0.9, seed=seed)
        return ds.generate(*loaded, "hello", max_tokens=12, sampling=options).token_ids

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_positions_reach_the_cache(loaded, make_vector):
    """That they are exact is shown in test_patch; here, that the prompt's length is passed on."""
    texts = {
        positions: ds.generate(
            *loaded, "hello", max_tokens=12,
            steering=ds.Steering(make_vector(size=3.0), 1.0, (1,), positions),
        ).token_ids
        for positions in ("prompt", "generated")
    }  # fmt: skip
    assert texts["prompt"] != texts["generated"]


def test_prompts(loaded):
    tokenizer = loaded[1]
    chat = tokenizer.decode(encode_prompt(tokenizer, "Hi", system="Be brief."))
    assert chat == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(encode_prompt(tokenizer, "Hi", raw=True)) == "Hi"
    ids = encode_prompt(tokenizer, "hello")
    by_ids = ds.generate(*loaded, ids, max_tokens=5)
    assert by_ids.token_ids == ds.generate(*loaded, "hello", max_tokens=5).token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "  \n"}, "the prompt is empty"),
        ({"prompt": []}, "no tokens"),
        ({"max_tokens": 0}, "max tokens 0"),
        ({"stop": [""]}, "a stop text is empty"),
        ({"prompt": "caf\udce9"}, "not valid UTF-8"),
        ({"raw": True, "system": "x"}, "cannot go with raw"),
    ],
)
def test_input_that_cannot_be_used(loaded, options, message):
    options = {"prompt": "hello"} | options
    with pytest.raises(InputError, match=message):
        ds.stream(*loaded, options.pop("prompt"), **options)


def test_sampling_options_that_cannot_be_used():
    bad = [{"temp": -1}, {"temp": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"seed": -1}]
    for options in [*bad, {"seed": 2**64}]:
        with pytest.raises(InputError, match="expected"):
            ds.Sampling(**options)


def test_peak_memory_is_of_this_response(loaded):
    mx.eval(mx.zeros((64, 2**20)))  # 256 MiB, gone again
    before = mx.get_active_memory()  # other tests may hold a model
    peak = ds.generate(*loaded, "hello", max_tokens=2).peak_memory_bytes
    assert before < peak < before + 2**27


@pytest.fixture(scope="module")
def toy():
    return ds.load("demo")


@pytest.fixture(scope="module")
def overdose():
    """Four times what collapses the demo model."""
    return ds.Steering(ds.SteeringVector.load(demo.VECTOR), 35.0, (5,))


def test_the_brake_cuts_a_loop_off_and_goes_on_at_a_lower_strength(toy, overdose):
    for problem in held_out(2):
        looping = ds.generate(*toy, problem.question, steering=overdose, max_tokens=160)
        assert looping.finish_reason == "length" and not looping.brakes
        pieces = ds.stream(
            *toy, problem.question, steering=overdose, max_tokens=160, brake=ds.Brake()
        )
        text, result = "".join(pieces), pieces.result
        assert text == result.text  # nothing that was said is taken back
        strengths = [overdose.strength, *(one.strength_after for one in result.brakes)]
        assert strengths == [35.0 / 2**n for n in range(len(strengths))] and len(strengths) > 1
        assert result.steering.strength == strengths[-1]
        assert result.tokens <= 160 and result.text != looping.text
        for one in result.brakes:
            assert one.dropped > 0 and one.strength_before > one.strength_after


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_what_follows_a_brake_is_what_the_lower_strength_says(toy, overdose, positions):
    """The whole sequence is read again under the new strength, the question too."""
    question = held_out(1)[0].question
    overdose = dataclasses.replace(overdose, positions=positions)
    braked = ds.generate(*toy, question, steering=overdose, max_tokens=120, brake=ds.Brake())
    kept = braked.brakes[-1].at_token
    prompt = [*encode_prompt(toy[1], question), *braked.token_ids[:kept]]
    again = ds.generate(*toy, prompt, steering=braked.steering, max_tokens=120 - kept)
    assert braked.token_ids[kept:] == again.token_ids


def by_hand(model, tokens, steering, prompt_length, count) -> tuple[int, ...]:
    """Greedy decoding with nothing but a cache."""
    cache, said = ds.make_cache(model, steering, prompt=range(prompt_length)), []
    while len(said) < count:
        logits = model(mx.array([tokens]), cache=cache)[0, -1]
        tokens = [mx.argmax(logits).item()]
        said += tokens
    return tuple(said)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_after_a_brake_the_same_positions_are_steered(toy, overdose, positions):
    checked = 0
    for text, strength, factor in [(".\n\n" * 6 + ".", 8.0, 0.8), (".\n\n" * 7, 8.0, 0.6)]:
        prompt = toy[1].encode(text, add_special_tokens=False)
        steering = at_every_layer(overdose.vector, strength, positions)
        braked = ds.generate(
            *toy, prompt, steering=steering, max_tokens=120,
            brake=ds.Brake(limit=4, window=64, factor=factor, tries=9),
        )  # fmt: skip
        kept = braked.brakes[-1].at_token if braked.brakes else 0
        tokens, rest = [*prompt, *braked.token_ids[:kept]], braked.token_ids[kept:]
        assert by_hand(toy[0], tokens, braked.steering, len(prompt), len(rest)) == rest
        checked += bool(kept and rest and braked.steering.strength)
    assert checked


def test_a_stop_text_ends_the_answer_where_it_would_without_a_brake(toy, overdose):
    question = held_out(1)[0].question
    for strength in (2.4, 35.0, -16.0):
        steering = dataclasses.replace(overdose, strength=strength)
        whole = ds.generate(*toy, question, steering=steering, max_tokens=60).text
        stops = [whole[at : at + 2 + 3 * (at % 2)] for at in range(0, len(whole) - 5, 11)]
        for stop in dict.fromkeys(stops):  # 2 and 5 characters long
            ended = ds.generate(*toy, question, steering=steering, max_tokens=60, stop=(stop,))
            pieces = ds.stream(
                *toy, question, steering=steering, max_tokens=60, stop=(stop,), brake=ds.Brake()
            )
            shown, braked = "".join(pieces), pieces.result
            assert shown == braked.text == ended.text == whole[: whole.index(stop)]
            assert braked.token_ids == ended.token_ids and not braked.brakes
            assert braked.finish_reason == ended.finish_reason == "stop"


def test_a_stop_text_after_a_brake(toy, overdose):
    question = held_out(1)[0].question
    plain = ds.generate(*toy, question, steering=overdose, max_tokens=160, brake=ds.Brake())
    shown_before = len(toy[1].decode(list(plain.token_ids[: plain.brakes[-1].at_token])))
    stop = plain.text[shown_before + 9 : shown_before + 12]
    pieces = ds.stream(
        *toy, question, steering=overdose, max_tokens=160, brake=ds.Brake(), stop=(stop,)
    )
    shown, result = "".join(pieces), pieces.result
    assert shown == result.text == plain.text[: plain.text.index(stop)]
    assert result.finish_reason == "stop"


def test_who_stops_at_the_last_piece_has_the_whole_answer(loaded):
    pieces = ds.stream(*loaded, "hello", max_tokens=3)
    while len(pieces.result.token_ids) < 3:
        next(pieces)
    pieces.close()
    assert pieces.result.finish_reason == "length"


def test_the_last_try_switches_the_steering_off(toy, overdose):
    brake = ds.Brake(factor=0.95, tries=2)
    result = ds.generate(
        *toy, held_out(1)[0].question, steering=overdose, max_tokens=300, brake=brake
    )
    assert [one.strength_after for one in result.brakes] == [0.95 * 35.0, 0.0]
    assert result.steering.strength == 0 and result.steering.vector is overdose.vector


def test_a_brake_changes_nothing_where_nothing_repeats(toy, overdose):
    mild = ds.Steering(overdose.vector, 2.4, (5,))
    for steering in (mild, None):
        for problem in held_out(3):
            plain = ds.generate(*toy, problem.question, steering=steering, max_tokens=90)
            pieces = ds.stream(
                *toy, problem.question, steering=steering, max_tokens=90, brake=ds.Brake()
            )
            assert "".join(pieces) == plain.text
            assert pieces.result.token_ids == plain.token_ids and not pieces.result.brakes


def test_an_interruption_keeps_what_the_brake_held_back(toy, overdose):
    pieces = ds.stream(
        *toy, held_out(1)[0].question, steering=ds.Steering(overdose.vector, 2.4, (5,)),
        max_tokens=90, brake=ds.Brake(),
    )  # fmt: skip
    shown = next(pieces)
    pieces.close()
    result = pieces.result
    assert result.text.startswith(shown)
    assert toy[1].decode(list(result.token_ids)) == result.text


def test_a_response_ends_where_the_context_does(loaded):
    """And a prompt that leaves no room is refused before anything is read."""
    model, tokenizer = loaded
    context = model.args.max_position_embeddings
    result = ds.generate(model, tokenizer, [5] * (context - 3), max_tokens=30)
    assert result.tokens == 3 and result.finish_reason == "length"
    for length in (context, 4 * context):
        with pytest.raises(
            ContextError, match=f"has {length} tokens, and the model's context is {context}"
        ):
            ds.stream(model, tokenizer, [5] * length)


def test_a_long_prompt_is_not_warned_of_in_others_words(caplog, capfd):
    _, tokenizer = ds.load("demo")
    assert tokenizer.model_max_length == 1024
    assert len(tokenizer.encode("apples " * 2000)) > 1024
    assert "indexing errors" not in caplog.text + "".join(capfd.readouterr())
