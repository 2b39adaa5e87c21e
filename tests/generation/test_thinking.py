"""A reasoning model's thought: parted from the answer, gated, budgeted, and left out of the history."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
from thinking import make_folder

import mlx_densesteer as ds
from mlx_densesteer.errors import InputError, ModelError, SteeringError
from mlx_densesteer.generation.answer import receipt
from mlx_densesteer.generation.batch import Batch
from mlx_densesteer.generation.brake import Brake
from mlx_densesteer.generation.speculation import Draft
from mlx_densesteer.generation.thought import Parting
from mlx_densesteer.model.prompt import encode_answer, encode_prompt
from mlx_densesteer.steering.steering import Steering, ThinkBudget

CYCLE = "tabc\n\n"


@pytest.fixture(
    scope="session", params=["R1", "Qwen3", pytest.param("SmolLM3", marks=pytest.mark.slow)]
)
def folder(request, tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("thinking") / request.param, request.param)


@pytest.fixture(scope="session")
def model(folder):
    return ds.load(folder)


@pytest.fixture(scope="session")
def vector(folder):
    return ds.SteeringVector.load(folder / "out.npz")


def thought_of(tokens: int) -> str:
    """What the model has thought after so many tokens; a blank line is one."""
    whole, rest = divmod(tokens, 5)
    return (CYCLE * whole + CYCLE[:rest]).strip()


def ways(model, prompt, steering=None, **options):
    """Answer alone, in a batch of three, with a draft, and as a session; all must say the same."""
    options = {"max_tokens": 40} | options
    alone = ds.generate(model, prompt, steering=steering, **options)
    others = [Steering(steering.vector, 1.5, (0,), "generated"), None] if steering else [None, None]
    together = dict(ds.generate_batch(model, [prompt] * 3, steering=[steering, *others], **options))
    drafted = ds.generate(model, prompt, steering=steering, draft=Draft(model, 3), **options)
    reply = ds.Session(model, steering, **options).send(prompt)
    assert "".join(reply) == alone.text
    for other in (together[0], drafted, reply.result):
        for name in ("token_ids", "text", "thought", "answer", "thought_tokens", "finish_reason"):
            assert getattr(other, name) == getattr(alone, name), name
    return alone


@pytest.mark.parametrize("limit", [1, 4, 5, 11])
def test_a_limit_ends_the_thought_and_the_answer_follows(model, limit):
    found = ways(model, "17 * 3?", think_limit=limit)
    assert (found.thought, found.answer) == (thought_of(limit), "51")
    assert (found.thought_tokens, found.finish_reason) == (limit, "stop")
    assert found.text.endswith("</think>51") and found.thought_limit == limit


def test_without_a_limit_the_answer_is_a_thought_that_is_cut_off(model):
    found = ways(model, "17 * 3?")
    assert found.answer == "" and found.finish_reason == "length"
    marks = found.text.startswith("<think>")
    assert found.thought_tokens == found.tokens - marks == 40 - marks
    assert found.thought == thought_of(found.thought_tokens)


@pytest.mark.parametrize("tokens", [1, 4, 13])
def test_beyond_its_budget_a_thought_is_steered_and_ends(model, vector, tokens):
    steering = Steering(vector, 0.0, (1,), budget=ThinkBudget(tokens, 2.0))
    found = ways(model, "17 * 3?", steering)
    assert (found.thought, found.answer) == (thought_of(tokens), "51")
    assert found.thought_tokens == tokens
    # with a strength that alone changes nothing here, in any positions
    for where in ("all", "prompt", "generated", "steps", "think", "answer", "first:2"):
        weak = Steering(vector, 0.25, (1,), where, ThinkBudget(tokens, 2.0))
        assert ds.generate(model, "17 * 3?", steering=weak, max_tokens=40).text == found.text


def test_gates(model, vector):
    opened = model.opens_thought(encode_prompt(model.tokenizer, "?"))

    def said(where, strength=2.0, **options):
        steering = Steering(vector, strength, (1,), where)
        return ways(model, "17 * 3?", steering, **{"max_tokens": 12} | options)

    found = said("think")
    assert (found.thought, found.answer, found.thought_tokens) == ("", "51", 0)
    assert said("steps").thought == thought_of(5) and said("steps").answer == "51"
    # in an answer every token then leads to another </think>
    found = said("answer", think_limit=3)
    if opened:
        assert found.text == "tab" + "</think>" * 9
        assert (found.thought, found.answer) == ("tab", "")
    else:  # the prompt's last token is the answer's: the thought is not open yet
        assert (found.text, found.thought) == ("</think>" * 12, None)
    for where in ("prompt", "first:1"):  # the last prompt token alone
        assert said(where).text == "</think>51"


def test_a_session_leaves_earlier_thoughts_out(model, vector):
    session = ds.Session(model, max_tokens=40, think_limit=6)
    for question in ("17 * 3?", "And twice?"):
        "".join(session.send(question))
    assert [turn.reply.answer for turn in session.turns] == ["51", "51"]
    messages = [
        {"role": "user", "content": "17 * 3?"},
        {"role": "assistant", "content": "51"},
        {"role": "user", "content": "And twice?"},
    ]
    text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = model.tokenizer.encode(text, add_special_tokens=False)
    assert session.prompt("And twice?", turns=1) == prompt
    assert session.turns[1].reply.prompt_tokens == len(prompt)
    # a question whose thought was interrupted does not count; one that was cut off leaves no word of it
    reply = session.send("Once more?")
    for _ in range(4):
        next(reply)
    reply.close()
    assert reply.result.thought and len(session.turns) == 2
    session.max_tokens = 5
    "".join(session.send("Once more?"))
    assert session.turns[-1].reply.answer == "" and session.turns[-1].reply.thought
    assert "tab" not in model.tokenizer.decode(session.prompt("So?"))


@pytest.mark.parametrize("exact", [False, True])
def test_turns_under_changing_steerings_are_those_of_new_sessions(model, vector, exact):
    session = ds.Session(model, Steering(vector, 0.0, (1,)), max_tokens=30, exact=exact)
    settings = [
        Steering(vector, 0.25, (1,), "think", ThinkBudget(3, 2.0)),
        Steering(vector, 2.0, (1,), "think"),
        Steering(vector, 0.0, (0, 1), "all", ThinkBudget(8, 2.0)),
        Steering(vector, 0.0, (1,)),
        Steering(vector, 2.0, (1,), "steps"),
    ]
    for number, steering in enumerate(settings):
        session.steer(steering)
        "".join(session.send(f"{number}?"))
        new = ds.Session(model, steering, max_tokens=30, exact=exact)
        new._turns = list(session.turns[:-1])
        assert "".join(new.send(f"{number}?")) == session.turns[-1].reply.text


def test_a_saved_session_keeps_thoughts_and_budget(model, vector, tmp_path):
    steering = Steering(vector, 0.25, (1,), "think", ThinkBudget(4, 2.0))
    session = ds.Session(model, steering, max_tokens=40)
    "".join(session.send("17 * 3?"))
    loaded = ds.Session.load(session.save(tmp_path / "s.json"), model)
    assert loaded.steering.fingerprint == steering.fingerprint
    assert loaded.turns[0].reply == replace(
        session.turns[0].reply, steering=loaded.turns[0].reply.steering
    )


def test_the_brake_knows_thoughts(model, vector):
    """A thought that repeats itself for ever is cut off; the limit counts what stays."""
    options = {"brake": Brake(limit=20, window=64), "max_tokens": 120}
    steering = Steering(vector, 0.25, (1,), budget=ThinkBudget(100, 1.0))
    found = ds.generate(model, "17 * 3?", steering=steering, think_limit=40, **options)
    assert found.brakes and found.answer == "51" and found.thought_tokens == 40
    assert found.steering.is_zero or found.steering.budget.strength < 1.0


def test_streams_show_both_parts_as_they_grow(model):
    pieces = ds.stream(model, "17 * 3?", max_tokens=40, think_limit=7)
    shown = [pieces.shown for _ in pieces]
    assert shown[-1] == (thought_of(7), "51")
    for (a, b), (c, d) in itertools.pairwise(shown):
        assert (c or "").startswith(a or "") and d.startswith(b)
    assert any(answer == "" and thought for thought, answer in shown)


def test_a_batch_tells_both_parts(model, vector):
    with Batch(model) as batch:
        prompt = encode_prompt(model.tokenizer, "17 * 3?")
        steering = Steering(vector, 0.0, (1,), budget=ThinkBudget(3, 2.0))
        rows = [batch.add(prompt, max_tokens=40, think_limit=6)]
        rows.append(batch.add(prompt, max_tokens=40, steering=steering))
        last = {}
        while batch.running:
            last |= {piece.row: piece for piece in batch.step()}
    assert [last[row].shown for row in rows] == [(thought_of(6), "51"), (thought_of(3), "51")]


def test_models_without_marks_refuse(hf_folder, make_vector):
    model = ds.load(hf_folder)
    for options in (
        {"think_limit": 3},
        {"steering": Steering(make_vector(), 1.0, (1,), "think")},
        {"steering": Steering(make_vector(), 1.0, (1,), budget=ThinkBudget(3, 2.0))},
    ):
        for call in (
            lambda o=options: ds.stream(model, "hello", **o),
            lambda o=options: ds.generate_batch(model, ["hello"], **o),
        ):
            with pytest.raises(ModelError, match="no tokens around a thought"):
                call()
    assert ds.generate(model, "hello", max_tokens=4).thought is None


@pytest.mark.parametrize("limit", [0, -1])
def test_no_thought_has_less_than_a_token(model, limit):
    with pytest.raises(InputError, match="at least 1"):
        ds.stream(model, "hello", think_limit=limit)


def test_what_a_response_says_is_encoded_with_its_marks(model):
    text = "<think>\nta\n</think>\n\n51 <|im_end|>"
    ids = encode_answer(model.tokenizer, text)
    marks = [model.tokenizer.think_start_id, model.tokenizer.think_end_id]
    assert [token for token in ids if token in marks] == marks
    assert model.tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids
    assert model.tokenizer.decode(ids) == text


MARKS = SimpleNamespace(has_thinking=True, think_start_tokens=(1, 2), think_end_tokens=(3, 4))


def test_marks_of_several_tokens():
    """As Gemma 4's: a half mark is not shown, and if it does not go on it is text."""
    words = {1: "<|ch>", 2: "th", 3: "<c", 4: "|>", 5: "a", 6: " b"}
    parting, text, shown = Parting(MARKS), "", []
    for token in (1, 5, 1, 2, 5, 3, 6, 3, 4, 6, 1, 2):
        text += words[token]
        parting.add(token, len(text))
        certain = len(text) if parting.certain is None else parting.certain
        shown.append(parting.split(text[:certain]))
    assert shown[0] == shown[2 - 2] == (None, "")
    assert shown[1] == shown[2] == (None, "<|ch>a")
    assert shown[5] == ("a", "<|ch>a") and shown[6] == ("a<c b", "<|ch>a")
    assert shown[-1] == ("a<c b", "<|ch>a b<|ch>th")
    assert parting.tokens == 3


def test_an_answer_without_a_thought_stays_as_it_is():
    """Blanks before it are code's indentation; a thought may still follow them."""
    parting = Parting(MARKS)
    parting.add(5, 4)
    assert parting.split("   ") == (None, "") and parting.split("   a") == (None, "   a")
    assert Parting(SimpleNamespace(has_thinking=False)).split("  ") == (None, "  ")


def test_a_thought_that_was_cut_off_does_not_open_the_next_answers(tmp_path_factory):
    """Where the template keeps thoughts: the last turn alone counts."""
    folder = make_folder(tmp_path_factory.mktemp("keeps") / "Keeps", "Qwen3", keeps=True)
    model = ds.load(folder)
    session = ds.Session(model, max_tokens=8)
    assert "".join(session.send("17 * 3?")).startswith("<think>")
    session.think_limit, session.max_tokens = 3, 40
    "".join(session.send("Again?"))
    assert "<think>tabc" in model.tokenizer.decode(session.prompt("Again?", turns=1))
    found = session.turns[1].reply
    assert (found.thought, found.answer) == ("tab", "51")


def test_prompts_may_be_arrays_and_an_empty_one_is_refused(model, vector):
    import mlx.core as mx
    import numpy as np

    steering = Steering(vector, 2.0, (1,), "think")
    prompt = encode_prompt(model.tokenizer, "17 * 3?")
    logits = [
        model.network(mx.array([prompt]), ds.make_cache(model, steering, prompt=kind(prompt)))
        for kind in (list, tuple, np.array, mx.array)
    ]
    assert all(mx.array_equal(one, logits[0]) for one in logits)
    for empty in ([], mx.array([], mx.int32), None):
        with pytest.raises(SteeringError, match="need the prompt"):
            ds.make_cache(model, steering, prompt=empty)


def test_caches_that_were_filled_go_on_in_another_thread(model, vector):
    """With the vector at the last block nothing else evaluates where the thought is."""
    import threading

    import mlx.core as mx

    prompt = encode_prompt(model.tokenizer, "17 * 3?")
    caches = ds.make_cache(model, Steering(vector, 2.0, (1,), "answer"), prompt=prompt)
    model.network(mx.array([prompt]), caches)
    mx.eval([cache.state for cache in caches])
    done = []
    thread = threading.Thread(
        target=lambda: done.append(mx.argmax(model.network(mx.array([[5]]), caches)[0, -1]).item())
    )
    thread.start()
    thread.join()
    assert done


def test_what_the_receipt_and_the_brake_say(model, vector):
    limit = ds.generate(model, "17 * 3?", think_limit=5, max_tokens=40)
    assert "5 tokens of them thought (ended at its limit)" in receipt(limit, 512)
    cut = ds.generate(model, "17 * 3?", think_limit=9, max_tokens=9)
    assert "limit)" not in receipt(cut, 512)
    steering = Steering(vector, 0.0, (1,), budget=ThinkBudget(4, 2.0))
    soft = ds.generate(model, "17 * 3?", steering=steering, max_tokens=40)
    assert "(from 4 on at strength +2)" in receipt(soft, 512)
    weak = Steering(vector, 0.0, (1,), budget=ThinkBudget(4, 0.25))
    options = {"brake": Brake(limit=20, window=64), "max_tokens": 200}
    found = ds.generate(model, "17 * 3?", steering=weak, **options)
    assert [one.strength_before for one in found.brakes] == [0.25, 0.125, 0.0625]


def test_a_kl_is_not_measured_where_there_is_no_thought(model, vector):
    for where in ("think", "answer"):
        with pytest.raises(InputError, match="texts without thoughts"):
            ds.resolve(model, vector, "0.1nats", (1,), where)


def test_session_files_of_the_first_release_are_read(model, vector, tmp_path):
    import json

    session = ds.Session(model, max_tokens=6)
    "".join(session.send("17 * 3?"))
    path = session.save(tmp_path / "s.json")
    document = json.loads(path.read_text())
    for turn in document["turns"]:
        for name in [*turn]:
            if name == "said" or name.startswith("thought"):
                del turn[name]
    path.write_text(json.dumps(document))
    assert ds.Session.load(path, model).turns[0].reply.answer == session.turns[0].reply.text


def test_stop_texts_are_looked_for_in_the_answer_alone(model, vector):
    for stop, said in (("bc", "51"), ("\n\n", "51"), ("1", "5"), ("51", "")):
        found = ways(model, "17 * 3?", think_limit=7, stop=(stop,))
        assert (found.thought, found.answer) == (thought_of(7), said), stop


def test_a_second_end_of_the_thought_is_no_text():
    """As a model writes that was made to end its thought and is not done with it."""
    words = {1: "<t>", 2: "", 3: "</", 4: "t>", 5: "a"}
    parting, text, shown = Parting(MARKS, opened=True), "", []
    for token in (5, 3, 4, 5, 5, 3, 4, 5, 3, 4):
        text += words[token]
        parting.add(token, len(text))
        certain = len(text) if parting.certain is None else parting.certain
        shown.append(parting.split(text[:certain]))
    assert shown[-1] == ("a", "aaa") and text == "a</t>aa</t>a</t>"
    for (_, before), (_, after) in itertools.pairwise(shown):
        assert after.startswith(before)


def test_the_brake_names_what_looped(model, vector):
    steering = Steering(vector, 0.1, (1,), budget=ThinkBudget(4, 0.25))
    options = {"brake": Brake(limit=20, window=64), "max_tokens": 200}
    found = ds.generate(model, "17 * 3?", steering=steering, **options)
    assert found.brakes[0].strength_before == 0.25


def test_a_sessions_budget_is_set_and_kept(model, vector, tmp_path):
    session = ds.Session(model, Steering(vector, 0.0, (1,)), max_tokens=40)
    session.set_budget(5, 2.0)
    assert "".join(session.send("17 * 3?")).endswith("</think>51")
    session.set_strength(0.25)
    assert session.steering.budget == ThinkBudget(5, 2.0)
    session.think_limit = 3
    again = ds.Session.load(session.save(tmp_path / "s.json"), model)
    assert again.think_limit == 3 and again.steering.budget == ThinkBudget(5, 2.0)
    session.set_budget(None)
    assert session.steering.budget is None
    with pytest.raises(InputError, match="no budget"):
        ds.resolve(model, vector, 1.0, late=2.0)
    for tokens in (0, 1.5, True, "5"):
        with pytest.raises(SteeringError, match="expected a whole number"):
            session.set_budget(tokens)
