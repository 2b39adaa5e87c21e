import dataclasses
import itertools
import json
import os

import mlx.core as mx
import numpy as np
import pytest
from helpers import every_third_ends_a_step, rounding, same_but_for_ties
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models.base import create_attention_mask

import mlx_densesteer as ds
from mlx_densesteer import demo
from mlx_densesteer.errors import ContextError, InputError, SessionError, VectorMismatchError
from mlx_densesteer.generation.batch import Batch
from mlx_densesteer.generation.session import Session
from mlx_densesteer.model.cache import SteeredQuantizedKVCache
from mlx_densesteer.model.prefix import Chunk, Prefix
from mlx_densesteer.model.prompt import encode_prompt

# Thousands of sequences take minutes: DENSESTEER_EXAMPLES=3000 scripts/test -k random_operations
EXAMPLES = int(os.environ.get("DENSESTEER_EXAMPLES", "60"))


@pytest.fixture(scope="module")
def loaded(hf_folder):
    model, tokenizer = ds.load(hf_folder)
    model.set_dtype(mx.float32)
    return every_third_ends_a_step(model, tokenizer), tokenizer


@pytest.fixture
def steering(make_vector):
    return ds.Steering(make_vector(size=2.0), 1.0, layers=(1, 2))


def fresh(session: Session, **options) -> Session:
    """A new, exact session with the same history and settings."""
    twin = Session(
        session.model, session.steering, system=session.system,
        max_tokens=session.max_tokens, sampling=session.sampling, exact=True, **options,
    )  # fmt: skip
    twin._turns = list(session.turns)
    return twin


def next_logits(session: Session, text: str) -> mx.array:
    """What the model says next to ``text``, from the session's own caches."""
    chunks, last = session._lay_out(session.turns, text)
    session.prefix.fill(chunks, session.steering)
    logits = session.model.network(mx.array([[last]]), cache=session.prefix.caches)
    mx.eval(logits)
    return logits


def say(reply) -> tuple[int, ...]:
    for _ in reply:
        pass
    return reply.result.token_ids


def check(session: Session, reply, twin: Session, text: str) -> None:
    """The answer is that of ``twin``; if ``session`` is not exact, up to the first near tie."""
    expected, got = say(twin.send(text)), say(reply)

    def logits_after(tokens):
        chunks, last = twin._lay_out(twin.turns[:-1], text)
        prefix = Prefix(twin.model.network)
        prefix.fill(chunks, twin.steering)
        return twin.model.network(mx.array([[last, *tokens]]), cache=prefix.caches)[0, -1]

    assert same_but_for_ties(got, expected, logits_after) or not session.exact


TEXTS = st.text("abc ?é\n", min_size=1, max_size=12).filter(str.strip)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), TEXTS),
        st.tuples(st.just("stop early"), TEXTS),
        st.tuples(st.just("strength"), st.sampled_from([0.0, -2.0, 0.5, 1.0, 30.0])),
        st.tuples(st.just("layers"), st.sampled_from([(0,), (1,), (3,), (0, 2), (1, 2, 3)])),
        st.tuples(st.just("vector"), st.sampled_from([0, 1, None])),
        st.tuples(st.just("positions"), st.sampled_from(["all", "prompt", "generated", "steps"])),
        st.tuples(st.just("system"), st.sampled_from([None, "Be brief."])),
        st.tuples(st.sampled_from(["undo", "regenerate", "drop", "look"]), st.none()),
    ),
    min_size=2,
    max_size=9,
)


def apply(session: Session, vectors, name: str, value) -> None:
    """Do one operation; a send is compared with that of a new session."""
    if name == "send":
        check(session, session.send(value), fresh(session, keep_bytes=0), value)
    elif name == "stop early":
        reply = session.send(value)
        next(reply, None)
        reply.close()
    elif name == "strength" and session.steering:
        session.set_strength(value)
    elif name == "layers" and session.steering:
        if set(value) <= set(session.steering.vector.layers):
            session.set_layers(value)
    elif name == "positions" and session.steering:
        session.set_positions(value)
    elif name == "vector":
        session.set_vector(None if value is None else vectors[value])
    elif name == "system":
        session.system = value
    elif name == "regenerate" and session.turns:
        twin = fresh(session)
        asked = twin.undo().user
        check(session, session.regenerate(), twin, asked)
    elif name in ("undo", "drop") and session.turns:
        getattr(session, name)()
    elif name == "look":
        look(session)


def look(session: Session) -> None:
    expected, got = next_logits(fresh(session, keep_bytes=0), "?"), next_logits(session, "?")
    assert mx.abs(got - expected).max().item() <= (0 if session.exact else rounding(expected))


@pytest.fixture(scope="module")
def bfloat16(hf_folder):
    model, tokenizer = ds.load(hf_folder)
    return every_third_ends_a_step(model, tokenizer), tokenizer


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    operations=OPERATIONS,
    positions=st.sampled_from(["all", "prompt", "generated", "steps"]),
    keep=st.sampled_from([0, 9_000, 2**20]),
    half=st.sampled_from([False, False, True]),  # twice as slow on a CPU
    exact=st.booleans(),
)
def test_random_operations_leave_the_cache_right(
    loaded, bfloat16, make_vector, operations, positions, keep, half, exact
):
    """Bit for bit if exact, else up to rounding."""
    either = bfloat16 if half else loaded
    vectors = [make_vector(size=2.0), make_vector((1, 2, 3), seed=1, size=2.0)]
    start = ds.Steering(vectors[0], 1.0, (1,), positions)
    session = Session(*either, start, max_tokens=5, keep_bytes=keep, exact=exact)
    for name, value in operations:
        apply(session, vectors, name, value)
    look(session)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "steps"])
def test_the_first_answer_is_that_of_generate(loaded, make_vector, positions):
    steering = ds.Steering(make_vector(size=2.0), 1.0, (1,), positions)
    alone = ds.generate(*loaded, "hello", steering=steering, max_tokens=10, system="Be kind.")
    session = Session(*loaded, steering, system="Be kind.", max_tokens=10)
    assert session.prompt("hello") == encode_prompt(loaded[1], "hello", system="Be kind.")
    assert say(session.send("hello")) == alone.token_ids
    assert session.turns[0].reply.text == alone.text


@pytest.mark.parametrize(
    ("positions", "where"),
    [
        ("all", range(9)),
        ("generated", (2, 3, 4, 8)),
        ("prompt", (0, 1, 2, 5, 6, 7, 8)),
        ("steps", (2, 8)),
    ],
)
def test_earlier_answers_are_steered_as_they_were_generated(loaded, make_vector, positions, where):
    """Tokens 3 and 4 are an answer, 8 is about to begin one; 2 and 8 are prompt as well."""
    model, vector = loaded[0], make_vector(size=2.0)
    chunks = [Chunk((1, 2)), Chunk((3, 4, 5), answer=True), Chunk((6, 7, 8))]
    prefix = Prefix(model)
    prefix.fill(chunks, ds.Steering(vector, 1.0, (1,), positions))
    logits = model(mx.array([[9]]), cache=prefix.caches)[0, -1]
    expected = by_hand(model, [1, 2, 3, 4, 5, 6, 7, 8, 9], where, vector.layers[1])
    assert mx.abs(logits - expected).max().item() < rounding(expected)
    assert not mx.allclose(logits, by_hand(model, [*range(1, 10)], (), vector.layers[1]), atol=0.1)


def by_hand(model, tokens, where, v) -> mx.array:
    """The last logits with ``v`` added at some positions behind block 1, no cache."""
    h = model.model.embed_tokens(mx.array([tokens]))
    mask = create_attention_mask(h)
    for layer, block in enumerate(model.model.layers):
        h = block(h, mask, None)
        if layer == 1:
            h = h + mx.array([[float(i in where)] for i in range(len(tokens))]) * mx.array(v)
    return model.model.embed_tokens.as_linear(model.model.norm(h))[0, -1]


def test_turning_the_dial_computes_the_upper_layers_only(loaded, steering):
    session = Session(*loaded, steering, max_tokens=6)
    say(session.send("hello"))
    session.set_strength(2.0)
    chunks, _ = session._lay_out(session.turns, "again")
    length = sum(len(chunk.tokens) for chunk in chunks)
    held = session.prefix.chunks
    work = session.prefix.fill(chunks, session.steering)
    again = sum(len(chunk.tokens) for chunk in held)
    assert work.resteered == again > 0
    assert work.block_tokens == again * 2 + (length - again) * 4  # of 4 layers, 2 and 3 are above 1
    assert session.prefix.fill(chunks, session.steering) == (0, 0)


@pytest.mark.parametrize("options", [{}, {"kv_bits": 8}, {"stop": ["\n"]}, {"drafted": True}])
def test_an_answer_is_not_read_again(options):
    """Neither for the next question nor, below the steered layer, after a turn of the dial."""
    model, vector = ds.load("demo"), ds.SteeringVector.load("demo")
    options = dict(options)
    if options.pop("drafted", False):
        options["draft"] = ds.Draft(model, tokens=2)
    session = Session(model, ds.Steering(vector, 2.0, (4,)), max_tokens=20, **options)
    for text in ("Ann has 3 pens.", "And now?"):
        say(session.send(text))
        held = session.prefix.length
        asked, answered = (
            session.prompt(text, turns=len(session.turns) - 1),
            session.turns[-1].reply,
        )
        assert held >= len(asked) + len(answered.token_ids) - 1
        chunks, _ = session._lay_out(session.turns, "Why?")
        length = sum(len(chunk.tokens) for chunk in chunks)
        twin = session.prefix.fork()
        assert twin.fill(chunks, session.steering) == ((length - held) * 6, 0)
        work = session.prefix.fork().fill(
            chunks, dataclasses.replace(session.steering, strength=1.0)
        )
        assert work == (held * 1 + (length - held) * 6, held)


def test_an_exact_session_reads_its_answers_once_more(loaded, steering):
    session = Session(*loaded, steering, max_tokens=6, exact=True)
    asked = session.prompt("hello")
    say(session.send("hello"))
    assert session.prefix.length == len(asked) - 1
    chunks, _ = session._lay_out(session.turns, "again")
    length = sum(len(chunk.tokens) for chunk in chunks)
    assert session.prefix.fill(chunks, session.steering) == ((length - len(asked) + 1) * 4, 0)


def test_an_answer_that_broke_off_within_a_step_is_read_again(loaded, steering, monkeypatch):
    session = Session(*loaded, steering, max_tokens=6)
    reply = session.send("hello")
    next(reply)
    held = session.prefix.length
    monkeypatch.setattr(mx, "async_eval", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(reply)
    monkeypatch.undo()
    reply.close()
    assert session.prefix.length == held and len(session.turns) == 1
    look(session)


def _interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_turning_the_dial_steers_earlier_answers_at_the_same_positions(
    loaded, make_vector, positions
):
    steering = ds.Steering(make_vector(size=2.0), 1.0, (1,), positions)
    session = Session(*loaded, steering, max_tokens=6)
    say(session.send("hello"))
    look(session)  # reads the answer as part of the history
    session.set_strength(-2.0)
    look(session)


def test_the_residual_stream_is_kept_within_its_limit(loaded, steering):
    for limit in (0, 64 * 4 * 30):
        session = Session(*loaded, steering, max_tokens=6, keep_bytes=limit)
        for _ in range(3):
            say(session.send("a question of some length"))
        assert session.prefix.residual_bytes <= limit
        look(session)


def test_a_new_steering_is_refused_before_anything_changes(loaded, steering, make_vector):
    session = Session(*loaded, steering, max_tokens=4)
    say(session.send("hello"))
    wide = make_vector((1,), hidden=32)
    with pytest.raises(VectorMismatchError):
        session.set_vector(wide)
    with pytest.raises(VectorMismatchError):
        session.set_layers([7])
    assert session.steering == steering and len(session.turns) == 1
    look(session)


def test_set_vector_takes_the_vectors_own_defaults(loaded, make_vector):
    session = Session(*loaded)
    with pytest.raises(SessionError, match="set_vector"):
        session.set_strength(1)
    session.set_vector(make_vector((1, 2)))
    expected = ds.resolve(session.model, make_vector((1, 2)))
    assert session.steering.fingerprint == expected.fingerprint
    assert session.model.dose(session.steering) == pytest.approx(0.2)
    session.set_strength("-10%")
    assert session.strength < 0 and session.model.dose(session.steering) == pytest.approx(0.1)
    session.set_strength(0.5)
    assert session.strength == 0.5
    with pytest.raises(InputError, match="expected a number such as 1.5"):
        session.set_strength("much")
    session.set_vector(None)
    assert session.steering is None and session.strength == 0


def test_an_answer_that_was_stopped_stays_and_one_that_never_began_does_not(loaded, steering):
    session = Session(*loaded, steering, max_tokens=9)
    reply = session.send("hello")
    first = next(reply)
    reply.close()
    assert session.turns[0].reply.text.startswith(first)
    assert session.turns[0].reply.finish_reason == "interrupted"
    session.send("never read").close()
    assert len(session.turns) == 1
    left = session.send("left alone")
    next(left)
    assert say(session.send("next")) and [t.user for t in session.turns] == [
        "hello", "left alone", "next",
    ]  # fmt: skip
    before = session.turns[-1]
    session.regenerate().close()
    assert session.turns[-1] == before


def test_ctrl_c_while_reading_leaves_a_session_that_goes_on(loaded, steering, monkeypatch):
    session = Session(*loaded, steering, max_tokens=5)
    say(session.send("hello"))
    block = session.prefix._blocks[2]

    class Interrupting(type(block)):
        def __call__(self, *args):
            raise KeyboardInterrupt

    reply = session.send("again")
    original, block.__class__ = block.__class__, Interrupting
    with pytest.raises(KeyboardInterrupt):
        next(reply)
    block.__class__ = original
    reply.close()
    assert len(session.turns) == 1
    look(session)


def test_a_full_context_is_an_error_or_drops_the_oldest_turns(loaded):
    session = Session(*loaded, max_tokens=6)
    say(session.send("first"))
    say(session.send("second"))
    long = "a long question " * 5
    session.context = len(session.prompt(long)) - 10
    with pytest.raises(
        ContextError, match=rf"\d+ tokens, and the model's context is {session.context}"
    ):
        session.send(long)
    assert len(session.turns) == 2
    session.drop_oldest = True
    say(session.send(long))
    assert [turn.user for turn in session.turns] == ["second", long]
    look(session)
    with pytest.raises(ContextError):
        session.send(long * 9)
    assert len(session.turns) == 2


def test_dropping_the_oldest_turns_makes_room_for_more_than_one_question(loaded):
    """Else the whole history would be read again in every turn from then on."""
    session = Session(*loaded, max_tokens=6, drop_oldest=True)
    session.context = len(session.prompt("q")) * 6
    kept = []
    for _ in range(12):
        reply = session.send("q")
        kept.append(len(session.turns))
        say(reply)
    drops = [before + 1 - after for before, after in itertools.pairwise(kept) if after <= before]
    assert len(drops) >= 2 and min(drops) >= 2, kept
    look(session)


def test_a_brake_that_came_while_the_dial_was_turned_stays(loaded, steering, make_vector):
    session = Session(*loaded, steering, max_tokens=300, brake=ds.Brake(limit=4, window=64))
    for change in (
        lambda: session.set_positions("generated"),
        lambda: session.set_layers((1,)),
    ):
        session.reset()
        session.set_strength(40.0)
        reply = session.send("aaaa")
        while not reply.result.brakes:
            next(reply)
        change()
        assert session.strength == session.turns[0].reply.steering.strength < 40
    reply = session.send("aaaa")
    next(reply)
    with pytest.raises(VectorMismatchError):
        session.set_vector(make_vector(hidden=32))
    assert len(session.turns) == 1 and next(reply, None) is not None  # a refusal ends nothing


def test_an_answer_ends_where_the_context_does(loaded):
    session = Session(*loaded, max_tokens=500, context=60)
    length = len(session.prompt("hello"))
    say(session.send("hello"))
    assert session.turns[0].reply.tokens <= 60 - length
    assert session.turns[0].reply.finish_reason == "length"


def test_nothing_to_undo(loaded):
    session = Session(*loaded)
    for step in (session.undo, session.regenerate, lambda: session.drop(1)):
        with pytest.raises(SessionError):
            step()
    with pytest.raises(InputError):
        session.send("  ")


def test_quantised_keys_and_values(loaded, make_vector):
    """Right as well: the same as a new session's; the tiny model's heads are too narrow for it."""
    with pytest.raises(ds.DenseSteerError, match="multiple of 32"):
        Session(*loaded, kv_bits=8)
    model, tokenizer = ds.load("demo")
    vector = ds.SteeringVector.load(demo.VECTOR)
    steering = ds.Steering(vector, 2.0, (4,))
    session = Session(model, tokenizer, steering, kv_bits=8, max_tokens=8, exact=True)
    say(session.send("Ann has 3 pens."))
    session.set_strength(-1.0)
    assert isinstance(session.prefix.caches[0], SteeredQuantizedKVCache)
    expected = next_logits(fresh(session, kv_bits=8), "And now?")
    assert mx.array_equal(next_logits(session, "And now?"), expected).item()
    exact = next_logits(fresh(session), "And now?")
    assert 0 < mx.abs(exact - expected).max().item() < 1.0


def test_caches_for_a_batch_share_and_leave_the_session_alone(loaded, steering):
    session = Session(*loaded, steering, max_tokens=8)
    say(session.send("hello"))
    before = next_logits(session, "and?")
    choices = [None, steering, ds.Steering(steering.vector, -1.0, (2,), "generated")]
    results = {}
    with Batch(*loaded) as batch:
        rows = {}
        for one in choices:
            tokens, caches = session.caches_for("and?", one)
            rows[batch.add(tokens, cache=caches, steering=one, max_tokens=8)] = one
        while batch.running:
            results |= {rows[p.row]: p.result for p in batch.step() if p.result}
    for one in choices:
        twin = fresh(session)
        twin.steer(one)
        assert results[one].token_ids == say(twin.send("and?"))
    assert mx.array_equal(next_logits(session, "and?"), before).item()
    assert len(session.turns) == 1


def test_sampling_with_a_seed_repeats_in_a_session(loaded, steering):
    session = Session(*loaded, steering, max_tokens=8, sampling=ds.Sampling(1.0, 1.0, seed=3))
    first = say(session.send("hello"))
    assert say(session.regenerate()) == first


def plain(turn):
    """Everything of a turn; two loaded vectors are equal if their steerings' fingerprints are."""
    rest = dataclasses.replace(turn.reply, steering=None)
    return turn.user, rest, turn.reply.steering.describe()


def test_saved_and_loaded(loaded, make_vector, tmp_path):
    steering = ds.Steering(make_vector(size=2.0), 1.5, (1, 2), "generated")
    session = Session(
        *loaded,
        exact=True,
        steering=steering,
        system="Be brief.",
        max_tokens=7,
        stop=["never there"],
    )
    say(session.send("hello"))
    session.set_vector(make_vector((2,), seed=5))
    say(session.send("again"))
    session.set_strength(0.5)
    path = session.save(tmp_path / "talk.json")
    assert sorted(tmp_path.iterdir()) == [path]
    back = Session.load(path, loaded)
    assert list(map(plain, back.turns)) == list(map(plain, session.turns))
    assert back.steering.fingerprint == session.steering.fingerprint
    assert (back.system, back.sampling, back.max_tokens, back.stop) == (
        session.system, session.sampling, session.max_tokens, session.stop,
    )  # fmt: skip
    assert mx.array_equal(next_logits(back, "x"), next_logits(session, "x")).item()


def test_files_that_are_no_sessions(loaded, tmp_path):
    session = Session(*loaded, max_tokens=3)
    say(session.send("hello"))
    letter = tmp_path / "letter.json"
    for text in ("Dear Ann", "[1]", '{"format": "other"}', "[" * 100_000):
        letter.write_text(text)
        with pytest.raises(SessionError, match=r"not a session .* Choose another name\.$"):
            session.save(letter)
        with pytest.raises(SessionError, match="not a session"):
            Session.load(letter, loaded)
        assert letter.read_text() == text
    path = session.save(tmp_path / "talk.json")
    session.save(path)  # one of ours is replaced
    whole = json.loads(path.read_text())

    def turn(**changes):
        return {"turns": [whole["turns"][0] | changes]}

    for damage in (
        {"turns": [{"user": 3}]}, {"vectors": {"x": {"name": "v", "npz": "!!"}}}, {"stop": [1]},
        {"steering": {"vector": "none", "strength": 1, "layers": [1], "positions": "all"}},
        {"sampling": {"temp": -1}}, {"sampling": {"temp": 0, "top_p": 1, "seed": 1.5}},
        {"max_tokens": True}, {"turns": {"0": 1}}, {"vectors": []}, {"system": 5},
        turn(token_ids=[2**32]), turn(token_ids=[-1]), turn(token_ids=[1.0]), turn(token_ids=["1"]),
        turn(token_ids=[loaded[0].args.vocab_size]), turn(answer=None), turn(peak_memory_bytes="x"),
        turn(brakes=[{"at_token": 1}]), turn(time_to_first_token=None),
        {"steering": {"vector": "x", "strength": 1, "layers": [1.5], "positions": "all"}},
    ):  # fmt: skip
        path.write_text(json.dumps(whole | damage))
        with pytest.raises(SessionError, match="damaged") as caught:
            Session.load(path, loaded)
        assert len(str(caught.value)) < 250 + len(str(path))
    for text in ('"max_tokens": 1e999', '"max_tokens": NaN', '"max_tokens": 3, "max_tokens": 4'):
        path.write_text(json.dumps(whole).replace('"max_tokens": 3', text))
        with pytest.raises(SessionError, match="not a session file: is not JSON"):
            Session.load(path, loaded)
    for token in (loaded[0].args.vocab_size, 2**32):
        path.write_text(json.dumps(whole | turn(token_ids=[65, token])))
        with pytest.raises(
            SessionError, match=f"damaged .*token {token} is outside the vocabulary"
        ):
            Session.load(path, loaded)
    path.write_text(json.dumps(whole | {"version": 2}))
    with pytest.raises(SessionError, match="version 2"):
        Session.load(path, loaded)
    with pytest.raises(SessionError, match=r"of version 1, .* Choose another name\.$"):
        session.save(path)
    path.write_text(json.dumps(whole)[:-20])  # what is left of one of ours is replaced
    assert Session.load(session.save(path), loaded).turns
    path.write_text(json.dumps(whole | {"fingerprint": "0"}))
    with pytest.raises(SessionError, match="another model"):
        Session.load(path, loaded)


@pytest.mark.checkpoint
def test_the_dial_on_the_real_checkpoint(real_model):
    model, tokenizer = real_model
    rng = np.random.default_rng(0)
    arrays = {layer: rng.normal(size=896).astype(np.float32) / 30 for layer in (12, 18)}
    vector = ds.SteeringVector(arrays, ds.VectorMeta("random", 896, 24))
    session = Session(model, tokenizer, ds.Steering(vector, 4.0, (12,)), max_tokens=5)
    say(session.send("What is 12 + 30?"))
    for strength, layers in ((-4.0, (12,)), (2.0, (12, 18)), (0.0, (12,))):
        session.set_layers(layers)
        session.set_strength(strength)
        look(session)
        if strength:
            assert session.prefix.residual_bytes == session.prefix.length * 896 * 4
    say(session.send("And 13 + 30?"))
    look(session)
    assert len(session.turns) == 2


def test_ctrl_c_while_an_answer_settles_loses_no_turn(loaded, steering, monkeypatch):
    session = Session(*loaded, steering, max_tokens=4)
    say(session.send("hello"))
    monkeypatch.setattr(Prefix, "keep_decoded", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        say(session.send("again"))
    monkeypatch.undo()
    assert [turn.user for turn in session.turns] == ["hello", "again"]
    look(session)


def test_a_question_that_is_closed_before_it_is_read_takes_nothing_of_a_broken_answer(
    loaded, steering, monkeypatch
):
    session = Session(*loaded, steering, max_tokens=6)
    reply = session.send("hello")
    next(reply)
    monkeypatch.setattr(mx, "async_eval", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(reply)
    monkeypatch.undo()
    reply.close()
    held = session.prefix.length
    session.send("never read").close()
    assert session.prefix.length == held and len(session.turns) == 1
    look(session)
