import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_densesteer.errors import InputError, SteeringError, VectorMismatchError
from mlx_densesteer.steering.request import (
    DEFAULT_DOSE,
    Amount,
    default_layer,
    format_dose,
    parse_layer_sets,
    parse_layers,
    request,
    resolve,
    stored_strength,
)
from mlx_densesteer.steering.steering import ThinkBudget
from mlx_densesteer.steering.vector import SteeringVector, VectorMeta


class Norms:
    """A model that knows its norms only, and counts how often it is asked."""

    def __init__(self, norms=None):
        self.given, self.asked = norms or {}, []

    def other_weights(self, vector, *, strict=False):
        return None

    def norms(self, vector, layers):
        self.asked.append(tuple(layers))
        return {layer: self.given.get(layer, 10.0 + layer) for layer in layers}

    def kl_strength(self, vector, layers, positions, kl):
        self.asked.append((tuple(layers), positions))
        return 10 * kl


def measured(vector, **meta):
    return SteeringVector(vector.layers, replace(vector.meta, **meta))


@pytest.mark.parametrize(
    ("text", "number", "unit"),
    [
        (1.5, 1.5, "strength"),
        (0, 0.0, "strength"),
        ("1.5", 1.5, "strength"),
        ("-2", -2.0, "strength"),
        ("+2.", 2.0, "strength"),
        (".5", 0.5, "strength"),
        ("1e-3", 0.001, "strength"),
        ("1E3", 1000.0, "strength"),
        (1e-05, 1e-05, "strength"),
        (np.float32(0.25), 0.25, "strength"),
        ("1000000000", 1e9, "strength"),
        (" 3\n", 3.0, "strength"),
        ("20%", 0.2, "dose"),
        ("-10 %", -0.1, "dose"),
        ("2.5%", 0.025, "dose"),
        ("0%", 0.0, "dose"),
        (" +1e2% ", 1.0, "dose"),
        (Amount(0.3, "dose"), 0.3, "dose"),
        ("0.1nats", 0.1, "kl"),
        (" -5e-2 nats\n", -0.05, "kl"),
        (Amount(0.3, "kl"), 0.3, "kl"),
    ],
)
def test_a_number_is_a_strength_per_cent_a_dose_and_nats_a_kl(text, number, unit):
    found = Amount.parse(text)
    assert (found.number, found.unit) == (pytest.approx(number, rel=1e-12, abs=0), unit)


NO_AMOUNTS = [
    "", " ", "%", "20%%", "% 20", "20 percent", "1,5", "1 5", "1.5.2", "--1", "+-1", "1e", "e5", ".",
    "0x10", "1_000", "1j", "inf", "-inf", "nan", "infinity%", "1e400", "1000000001", "9" * 5000,
    "1" * 100_000 + "!", "\u0661", "\uff11.5", "\u00b2", "20\uff05", "20\u066a", "\u22122", "1.5\x00",
    "\ud800", "1.5; rm -rf /", "__import__('os')", "${HOME}", "half", "20%20%",
    math.nan, math.inf, -math.inf, 1e10, 10**400, True, False, None, [1.5], {"strength": 1}, b"1.5",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_AMOUNTS, ids=lambda text: repr(text)[:20])
def test_what_is_no_amount(text):
    with pytest.raises(InputError, match="expected a number such as 1.5, -2 or 0, a dose") as told:
        Amount.parse(text)
    assert len(str(told.value)) < 200
    "".join(str(told.value)).encode("utf-8", "replace")


@given(st.one_of(st.text(), st.text("0123456789.eE+-% "), st.floats(), st.integers()))
def test_any_text_is_a_finite_amount_or_refused(text):
    try:
        found = Amount.parse(text)
    except InputError:
        return
    assert math.isfinite(found.number) and re.search(r"\d", str(text))


@given(st.floats(-1e6, 1e6), st.sampled_from(["strength", "dose", "kl"]))
def test_what_is_written_is_read_again(number, unit):
    found = Amount.parse(str(Amount(number, unit)))
    assert found.unit == unit
    assert found.number == pytest.approx(number, rel=5e-3, abs=1e-300)


def test_the_unit_of_a_kl_may_be_left_out():
    for text in (0.1, "0.1", "0.1nats", "+.1 nats ", Amount(0.1, "kl")):
        assert Amount.parse_kl(text) == Amount(0.1, "kl")
    for text in ("20%", "x", "", "0.1nat", "2e9"):
        with pytest.raises(InputError, match=f"KL '{text}': expected a number of nats per token"):
            Amount.parse_kl(text)


def test_doses_are_written_as_people_read_them():
    doses = {0.2: "20%", 0.025: "2.5%", -0.1: "-10%", 0: "0%", 1 / 3: "33.3%", 12.0: "1200%"}
    assert {dose: format_dose(dose) for dose in doses} == doses


@given(st.floats(-3, 3).filter(lambda d: abs(d) > 1e-6), st.sets(st.integers(0, 3), min_size=1),
       st.lists(st.floats(0.1, 1e4), min_size=4, max_size=4))  # fmt: skip
def test_the_dose_that_is_asked_for_is_the_dose_that_is_told(dose, layers, norms):
    rng = np.random.default_rng(0)
    arrays = {layer: rng.normal(size=8).astype(np.float32) for layer in range(4)}
    vector = SteeringVector(arrays, VectorMeta(model="tiny", hidden_size=8, layer_count=4))
    model = Norms(dict(enumerate(norms)))
    steering = request(vector, Amount(dose, "dose"), layers).steering(model)
    assert steering.dose(model.norms(vector, layers)) == pytest.approx(abs(dose), rel=1e-9)
    assert math.copysign(1, steering.strength) == math.copysign(1, dose)


def test_a_vector_that_is_only_rounding_has_no_dose(make_vector):
    vector = make_vector(size=1e-7)
    with pytest.raises(
        InputError, match="no more than a rounding error, so a dose means nothing there"
    ):
        resolve(Norms(), vector, "20%", layers=[1])
    assert resolve(Norms(), vector, 20.0, layers=[1]).strength == 20.0
    assert resolve(Norms(), vector, "0%", layers=[1]).strength == 0


def test_only_a_dose_asks_the_model_for_its_norms(make_vector):
    model = Norms()
    for strength in (1.5, 0, "0%"):
        request(make_vector(), strength, [1, 2]).steering(model)
    assert model.asked == []
    request(make_vector(), "10%", [1, 2]).steering(model)
    assert model.asked == [(1, 2)]


def test_only_a_kl_asks_the_model_to_measure_it(make_vector):
    model = Norms()
    assert request(make_vector(), "0nats", [1]).steering(model).strength == 0
    assert model.asked == []
    found = request(make_vector(), "-0.1nats", [1, 2], "prompt").steering(model)
    assert (found.strength, found.positions) == (-1.0, "prompt")
    assert model.asked == [((1, 2), "prompt")]


def test_a_kl_beyond_a_budget_is_measured_at_all_positions(make_vector):
    model = Norms()
    for positions in ("first:4", "think"):
        asked = request(make_vector(), 2.0, [1], positions, budget=20, late="0.1nats")
        assert asked.steering(model).budget == ThinkBudget(20, 1.0)
    assert model.asked == [((1,), "all")] * 2


POINTS = [
    {"layers": [1], "positions": "all", "kl": kl, "strength": strength}
    for kl, strength in [(0.01, 1.0), (0.16, 4.0), (0.64, 16.0), (0.1, -3.0)]
] + [{"layers": [2, 1], "positions": "generated", "kl": 0.1, "strength": 7.0}]


@pytest.mark.parametrize(
    ("asked", "strength"),
    [
        (([1], "all", 0.01), 1.0),
        (([1], "all", 0.64), 16.0),
        (([1], "all", 0.04), 2.0),  # KL as the square of the strength
        (([1], "all", 0.32), 8.0),  # more slowly above
        (([1], "all", -0.1), -3.0),
        (([1, 2], "generated", 0.1), 7.0),
        # nothing is extrapolated, and other layers, positions and signs are other settings
        (([1], "all", 0.005), None),
        (([1], "all", 1.0), None),
        (([1], "all", -0.2), None),
        (([1], "generated", 0.01), None),
        (([2], "all", 0.01), None),
    ],
)
def test_a_stored_calibration_gives_strengths(make_vector, asked, strength):
    vector = measured(make_vector(), calibration={"fingerprint": "a" * 16, "points": POINTS})
    found = stored_strength(vector, *asked, fingerprint="a" * 16)
    assert found == (strength and pytest.approx(strength, rel=1e-12))
    assert stored_strength(vector, *asked, fingerprint="b" * 16) is None
    assert stored_strength(make_vector(), *asked, fingerprint="a" * 16) is None


RECOMMENDED = {"layers": [3], "strength": 2.5, "positions": "generated"}
TRAINED = {"layers": [0, 2], "strength": 1.0, "reason": "trained"}
FIRST = TRAINED | {"positions": "first:48"}


@pytest.mark.parametrize(
    ("meta", "given", "expected"),
    [
        # what is given, else the best known layer, else the middle; else 20 %
        ({}, {}, (Amount(0.2, "dose"), (2,), "all")),
        ({}, {"strength": 1.5}, (Amount(1.5), (2,), "all")),
        ({}, {"layers": [3, 0, 3]}, (Amount(0.2, "dose"), (0, 3), "all")),
        ({}, {"positions": "prompt"}, (Amount(0.2, "dose"), (2,), "prompt")),
        ({"margin_gain": {"0": 0.1, "1": 0.9, "3": 0.5}}, {}, (Amount(0.2, "dose"), (1,), "all")),
        ({"margin_gain": {"1": 0.9}}, {"layers": [0]}, (Amount(0.2, "dose"), (0,), "all")),
        # a sweep's strength belongs to its layer; its positions are the vector's
        ({"recommended": RECOMMENDED}, {}, (Amount(2.5), (3,), "generated")),
        ({"recommended": RECOMMENDED, "margin_gain": {"1": 1.0}}, {}, (Amount(2.5), (3,), "generated")),
        ({"recommended": RECOMMENDED}, {"layers": [3]}, (Amount(2.5), (3,), "generated")),
        ({"recommended": RECOMMENDED}, {"layers": [1]}, (Amount(0.2, "dose"), (1,), "generated")),
        ({"recommended": RECOMMENDED}, {"layers": [1, 3]}, (Amount(0.2, "dose"), (1, 3), "generated")),
        ({"recommended": RECOMMENDED}, {"strength": "5%"}, (Amount(0.05, "dose"), (3,), "generated")),
        ({"recommended": RECOMMENDED}, {"positions": "all"}, (Amount(2.5), (3,), "all")),
        ({"recommended": {"layers": [3], "strength": 2.5}}, {}, (Amount(2.5), (3,), "all")),
        # a trained vector's layers belong together; some of them are as strong alone
        ({"recommended": TRAINED}, {}, (Amount(1.0), (0, 2), "all")),
        ({"recommended": TRAINED}, {"layers": [2, 0]}, (Amount(1.0), (0, 2), "all")),
        ({"recommended": TRAINED}, {"layers": [2]}, (Amount(1.0), (2,), "all")),
        ({"recommended": FIRST}, {"layers": [2]}, (Amount(1.0), (2,), "first:48")),
        ({"recommended": FIRST}, {"layers": [2], "strength": "5%"}, (Amount(0.05, "dose"), (2,), "first:48")),
        ({"recommended": FIRST}, {"layers": [1, 2]}, (Amount(0.2, "dose"), (1, 2), "first:48")),
        ({"recommended": TRAINED | {"layers": [0, 9]}}, {}, (Amount(0.2, "dose"), (2,), "all")),
    ],
)  # fmt: skip
def test_defaults(make_vector, meta, given, expected):
    made = request(measured(make_vector(), **meta), **given)
    assert (made.amount, made.layers, made.positions) == expected
    assert Amount(DEFAULT_DOSE, "dose") == Amount(0.2, "dose")


def test_why_tells_where_the_layer_comes_from(make_vector):
    vector = make_vector()
    assert request(vector).why == "it is the middle one of 4"
    assert request(vector, layers=[1]).why == ""
    assert request(measured(vector, recommended=RECOMMENDED)).why == "a sweep recommends it"
    why = request(measured(vector, margin_gain={"1": 0.5})).why
    assert why == "among the best that extraction measured"
    assert request(make_vector([3])).why == "it is the vector's only one"
    assert request(measured(vector, recommended=TRAINED)).why == "trained so"


@pytest.mark.parametrize(
    ("layers", "margin_gain", "expected"),
    [
        ([0, 1, 2, 3], {}, 2),
        ([0, 1], {}, 1),
        ([0, 3], {}, 3),
        ([1, 3], {}, 1),  # as near: the lower one
        ([3], {}, 3),
        ([0, 1, 2, 3], {"0": 0.46, "2": 0.5}, 0),  # about as good: the lower one
        ([0, 1, 2, 3], {"1": 0.8, "3": 0.9}, 3),
        ([0, 1, 2, 3], {"1": -0.8, "3": -0.5}, 3),  # no gain at all: the smallest loss
        ([0, 1], {"0": 0.5, "3": 0.9}, 0),  # not one that the vector does not hold
    ],
)
def test_the_default_layer(make_vector, layers, margin_gain, expected):
    vector = measured(make_vector(layers), margin_gain=margin_gain)
    assert default_layer(vector)[0] == expected


def test_what_can_never_be_applied_is_refused_without_a_model(make_vector):
    vector = make_vector([1, 2])
    for options, error, message in [
        ({"layers": []}, SteeringError, "no layers to steer"),
        ({"layers": [3]}, VectorMismatchError, "no vector for layer 3; it holds 1-2"),
        ({"strength": "x"}, InputError, "strength 'x'"),
        ({"positions": "here"}, SteeringError, "positions 'here'"),
    ]:
        with pytest.raises(error, match=message):
            request(vector, **options)
    with pytest.raises(SteeringError, match="overflows float32"):
        request(make_vector(size=1e31), 1e9, [1])


def test_resolve_reads_a_file_and_the_embedded_vector(make_vector, tmp_path):
    path = make_vector().save(tmp_path / "dense.npz")
    for named in (path, str(path)):
        found = resolve(Norms(), named, 1.5)
        assert (found.vector.name, found.strength, found.layers) == ("dense.npz", 1.5, (2,))
    assert resolve(Norms(), "demo", 1.5).vector.name == "demo"


@pytest.mark.parametrize(
    ("texts", "layers"),
    [
        (["14"], (14,)),
        (["3-5", "1"], (1, 3, 4, 5)),
        (["2, 4"], (2, 4)),
        (["all"], (0, 2)),
        (["7-7"], (7,)),
        (["4+2", "1"], (1, 2, 4)),
    ],
)
def test_layers_as_they_are_typed(texts, layers):
    assert parse_layers(texts, [0, 2]) == layers


@pytest.mark.parametrize(
    ("texts", "sets"),
    [
        (["8,12"], [(8,), (12,)]),
        (["3-5"], [(3,), (4,), (5,)]),
        (["8+12+16", "2"], [(8, 12, 16), (2,)]),
        (["16 + 8,all,0"], [(8, 16), (0,), (2,)]),
        (["4+4"], [(4,)]),
    ],
)
def test_layers_of_several_settings(texts, sets):
    assert parse_layer_sets(texts, [0, 2]) == sets


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-1",
        "5-3",
        "a",
        "1-",
        "1.5",
        "1-99999999",
        "9" * 5000,
        "³",
        "1+",
        "+1",
        "1-2+4",
        "all+1",
    ],
)
def test_layers_that_make_no_sense(text):
    with pytest.raises(SteeringError, match=r"expected a number \(14\), a range"):
        parse_layers([text], [0])
