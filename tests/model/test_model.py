import errno
import os
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load as mlx_lm_load

import mlx_densesteer as ds
from mlx_densesteer.errors import (
    ContextError,
    DiskError,
    InputError,
    ModelError,
    VectorMismatchError,
)
from mlx_densesteer.evaluation.sweep import settings_of
from mlx_densesteer.model import model as model_module
from mlx_densesteer.model.block import SteeredBlock
from mlx_densesteer.model.model import Model, loading, takes_model
from mlx_densesteer.steering.vector import VectorMeta


@pytest.fixture(scope="module")
def model(hf_folder):
    return ds.load(hf_folder)


@pytest.fixture(scope="module")
def vector():
    return ds.SteeringVector.load("demo")


def without_norms(vector, **changes):
    meta = replace(vector.meta, **{"residual_norms": None} | changes)
    return ds.SteeringVector(vector.layers, meta)


def test_it_unpacks_as_the_pair_of_mlx_lm(model):
    network, tokenizer = model
    assert network is model.network and tokenizer is model.tokenizer
    assert (model.layer_count, model.hidden_size, model.context) == (4, 64, 512)
    assert all(isinstance(block, SteeredBlock) for block in network.model.layers)


def test_of_takes_a_model_or_a_pair(model, hf_folder):
    assert Model.of(model) is model
    pair = mlx_lm_load(str(hf_folder))
    made = Model.of(pair)
    assert (made.network, made.tokenizer) == pair[:2] and made.name == "Tiny-Qwen2"
    assert made.fingerprint == model.fingerprint
    for wrong in (model.network, None, "demo", (1, 2), (model.network,), [*model]):
        with pytest.raises(InputError, match="given as a model: expected what load returns"):
            Model.of(wrong)
    with pytest.raises(ModelError, match="expected a text model"):
        Model.of((mx_linear(), model.tokenizer))


def mx_linear():
    import mlx.nn as nn

    return nn.Linear(2, 2)


def test_each_thing_is_worked_out_once(hf_folder, vector, make_vector, monkeypatch):
    calls = []

    def counted(name, function):
        def call(*arguments, **options):
            calls.append(name)
            return function(*arguments, **options)

        return call

    for name in ("_bfloat16_bytes", "residual_norms"):
        monkeypatch.setattr(model_module, name, counted(name, getattr(model_module, name)))
    model = ds.load(hf_folder)
    assert calls == []  # loading works nothing out
    norm_weights = 2 * model.layer_count + 1
    for _ in range(3):
        assert model.info.fingerprint == model.fingerprint
        assert model.info is model.info
        assert len(model.chat_template_sha256) == 64
    assert calls == ["_bfloat16_bytes"] * norm_weights
    for layers in ([1], [0, 3], [2]):
        model.norms(make_vector(), layers)
        model.dose(ds.resolve(model, make_vector(), "10%", layers))
    assert calls.count("residual_norms") == 3  # three fixed texts, all layers at once
    assert calls.count("_bfloat16_bytes") == norm_weights


def test_norms_are_those_of_the_file_or_measured_and_mean_the_same(demo_model, vector):
    stored = demo_model.norms(vector, [4, 1, 5, 4])
    assert stored == {k: vector.residual_norms[k] for k in (1, 4, 5)}
    measured = demo_model.norms(without_norms(vector), [1, 4, 5])
    assert measured != stored
    assert measured == pytest.approx(stored, rel=0.1)


def test_norms_recorded_from_other_weights_or_other_layers_are_not_used(demo_model, vector):
    measured = demo_model.measured_norms[5]
    for changes in (
        {"residual_norms": {"5": 1.0}, "fingerprint": "0" * 16},
        {"residual_norms": {"5": 1.0}, "fingerprint": None},
        {"residual_norms": {"4": 1.0}},
    ):
        assert demo_model.norms(without_norms(vector, **changes), [5]) == {5: measured}


def test_a_layers_norm_is_the_same_whatever_the_other_layers(demo_model, vector):
    some = without_norms(vector, residual_norms={"5": 6000.0})
    assert demo_model.norms(some, [5]) == {5: 6000.0}
    assert demo_model.norms(some, [4, 5]) == {4: demo_model.measured_norms[4], 5: 6000.0}
    lam = ds.resolve(demo_model, some, "20%", [5]).strength
    settings = settings_of(demo_model, some, [4, 5], ["20%", lam * 2])
    assert [s.dose for s in settings if s.layers == (5,)] == pytest.approx([0.2, 0.4])


@pytest.mark.parametrize("layers", [[5], [4, 5], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("dose", [0.2, -0.05])
def test_the_dose_asked_for_is_the_dose_told(demo_model, vector, layers, dose):
    steering = ds.resolve(demo_model, vector, f"{100 * dose}%", layers=layers)
    assert steering.layers == tuple(layers)
    assert demo_model.dose(steering) == pytest.approx(abs(dose), abs=1e-6)
    assert (steering.strength < 0) == (dose < 0)


def test_no_steering_is_no_dose(demo_model, vector):
    assert demo_model.dose(None) == demo_model.dose(ds.Steering(vector, 0.0, (5,))) == 0.0


ROOM = [  # tokens that are there, wanted, a narrower limit -> room; None: refused. The context is 512.
    (0, 10, None, 10),
    (500, 10, None, 10),
    (500, 12, None, 12),
    (500, 13, None, 12),
    (511, 2048, None, 1),
    (512, 1, None, None),
    (513, 1, None, None),
    (5000, 1, None, None),
    (511, 0, None, 0),  # 0: only to be read
    (512, 0, None, 0),
    (513, 0, None, None),
    (50, 100, 60, 10),
    (60, 100, 60, None),
    (60, 0, 60, 0),
    (500, 100, 9999, 12),
]  # fmt: skip


@pytest.mark.parametrize(("tokens", "wanted", "limit", "room"), ROOM)
def test_room(model, tokens, wanted, limit, room):
    if room is not None:
        assert model.room(tokens, wanted, limit=limit) == room
        return
    context = min(512, limit or 512)
    with pytest.raises(
        ContextError, match=f"prompt 3 has {tokens} tokens, .* context is {context}"
    ):
        model.room(tokens, wanted, limit=limit, what="prompt 3")


def test_a_vector_of_another_model_does_not_fit(model, make_vector):
    model.check_fits(make_vector())
    with pytest.raises(VectorMismatchError, match="width 32, but Tiny-Qwen2 has hidden size 64"):
        model.check_fits(make_vector(hidden=32))


@pytest.mark.filterwarnings("ignore:deep seems to be made for another model")
def test_a_dose_of_a_vector_that_does_not_fit_is_refused(model, make_vector):
    meta = VectorMeta(model="tiny", hidden_size=64, layer_count=12)
    deep = ds.SteeringVector({1: np.ones(64), 6: np.ones(64)}, meta, name="deep")
    wide = make_vector(hidden=32)
    for strength in (None, "20%"):
        with pytest.raises(
            VectorMismatchError, match="it holds layer 6, but Tiny-Qwen2 has layers 0..3"
        ):
            ds.resolve(model, deep, strength)
        with pytest.raises(
            VectorMismatchError, match="width 32, but Tiny-Qwen2 has hidden size 64"
        ):
            ds.resolve(model, wide, strength)
    with pytest.raises(VectorMismatchError, match="it holds layer 6"):
        ds.Session(model).set_vector(deep)
    assert ds.resolve(model, deep, "20%", layers=[1]).layers == (1,)  # this one fits


@takes_model
def describe(model, *rest, **options):
    return model, rest, options


@takes_model
def with_a_tokenizer_of_its_own(model, prompt, *, tokenizer=None):
    return model, prompt, tokenizer


class Thing:
    @takes_model
    def __init__(self, model, number=0):
        self.model, self.number = model, number

    @takes_model
    def method(self, model, number):
        return self, model, number

    @classmethod
    @takes_model
    def made(cls, model, number):
        return cls, model, number


def test_a_function_that_takes_a_model_takes_a_pair_too(model):
    network, tokenizer = model
    for arguments, options in [
        ((model, 1), {}),
        ((network, tokenizer, 1), {}),
        (((network, tokenizer), 1), {}),
        ((network, 1), {"tokenizer": tokenizer}),
    ]:
        found, rest, left = describe(*arguments, **options, x=2)
        assert (found.network, found.tokenizer) == (network, tokenizer)
        assert (rest, left) == ((1,), {"x": 2})
    for options in (
        {"model": model},
        {"model": (network, tokenizer)},
        {"model": network, "tokenizer": tokenizer},
    ):
        found, rest, left = describe(**options, x=2)
        assert (found.network, found.tokenizer) == (network, tokenizer)
        assert (rest, left) == ((), {"x": 2})
    assert describe(model)[0] is model
    assert describe.__name__ == "describe"


def test_a_method_that_takes_a_model_takes_a_pair_too(model):
    network, tokenizer = model
    for thing in (Thing(model, 3), Thing(network, tokenizer, 3), Thing((network, tokenizer), 3),
                  Thing(model=model, number=3), Thing(network, tokenizer=tokenizer, number=3)):  # fmt: skip
        assert (thing.model.network, thing.number) == (network, 3)
        found = thing.method(network, tokenizer, 4)
        assert (found[0], found[1].network, found[2]) == (thing, network, 4)
    found = Thing.made(network, tokenizer, 5)
    assert (found[0], found[1].network, found[2]) == (Thing, network, 5)


def test_what_is_no_model_is_refused(model):
    for arguments in ((), (None,), ("demo",), (model.network,), (model.network, "prompt")):
        with pytest.raises((InputError, TypeError)):
            describe(*arguments)
    with pytest.raises(InputError, match="expected what load returns"):
        ds.generate(model.network, "hello")


def test_other_options_named_tokenizer_stay(model):
    assert with_a_tokenizer_of_its_own(model, "x", tokenizer=3)[1:] == ("x", 3)


def test_the_demo_model_is_computed_in_a_dtype_that_the_cpu_is_fast_at(demo_model):
    cpu = mx.default_device() == mx.Device(mx.cpu)
    assert demo_model.info.dtype == ("float32" if cpu else "bfloat16")
    assert (demo_model.name, demo_model.context) == ("demo", 1024)


def test_text_that_cannot_fit_is_refused_at_every_door_before_it_is_encoded(
    demo_model, monkeypatch
):
    tokenizer, seen = demo_model.tokenizer._tokenizer, []
    stock = tokenizer.encode

    def counted(text, *arguments, **options):
        seen.append(len(text))
        return stock(text, *arguments, **options)

    monkeypatch.setattr(tokenizer, "encode", counted)
    from mlx_densesteer.generation.batch import Batch

    long, session = "word " * 200_000, ds.Session(demo_model)
    doors = [
        lambda: ds.stream(demo_model, long),
        lambda: ds.stream(demo_model, "Hi", system=long),
        lambda: ds.stream(demo_model, long + "\udcff", raw=True),
        lambda: ds.generate_batch(demo_model, ["Hi", long]),
        lambda: Batch(demo_model, rows=1).add(long),
        lambda: session.send(long),
        lambda: session.prompt(long),
    ]
    for door in doors:
        seen.clear()
        with pytest.raises(ContextError, match=r"has more than 1024 tokens, .* Shorten it"):
            door()
        assert sum(seen) < 50_000, "of a million characters"


def test_text_that_may_fit_is_never_refused_by_its_length(demo_model, monkeypatch):
    demo_model.check_length("<|im_end|>" * 1024, None, [1] * 10**6)  # 10 characters a token
    demo_model.check_length(4 * 1024 * "7")  # too long, but encoded in no time
    monkeypatch.setattr(model_module, "_LIKELY", 0)
    monkeypatch.setattr(model_module, "_PIECE", 300)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        text = bytes(rng.integers(32, 127, 3000)).decode() if seed % 2 else "the stones " * 600
        tokens = demo_model.tokenizer.encode(text)[: demo_model.context]
        demo_model.check_length(demo_model.tokenizer.decode(tokens))


@pytest.mark.checkpoint
def test_cuts_add_few_tokens_to_a_real_tokenizers_count(checkpoint):
    from mlx_lm.utils import load_tokenizer

    tokenizer, rng = load_tokenizer(checkpoint), np.random.default_rng(0)
    words = ["stone", "number", " ", "\n\n", "        ", "twelve", "7", "数", "é", "aaaa", "="]
    for _ in range(10):
        text = "".join(rng.choice(words, 20_000))
        pieces = [
            text[at : at + model_module._PIECE] for at in range(0, len(text), model_module._PIECE)
        ]
        counted = sum(len(tokenizer.encode(one, add_special_tokens=False)) for one in pieces)
        assert counted - len(tokenizer.encode(text)) <= 8 * len(pieces)


def test_a_full_temporary_folder_is_told_with_its_variable(tmp_path):
    remedy = pytest.raises(DiskError, match=r"Make room on the disk, .* place \(TMPDIR\)\.$")
    with remedy, loading(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_model_that_does_not_fit_is_told_before_it_is_loaded(metal_like, monkeypatch, capsys):
    """The demo's weights take 5.0 MB."""
    metal_like.give_device(working_set=6_000_000)
    ds.load("demo")
    assert capsys.readouterr().err == ""
    metal_like.give_device(working_set=5_000_000)
    ds.load("demo")
    assert "of 0.0 that the GPU can keep: it will be slow" in capsys.readouterr().err
    metal_like.give_device(working_set=3_000_000)
    monkeypatch.setattr("mlx_densesteer.model.model.load_model", None)
    with pytest.raises(ModelError, match=r"takes 0\.0 GiB, and this machine has .*--bits 4"):
        ds.load("demo")
