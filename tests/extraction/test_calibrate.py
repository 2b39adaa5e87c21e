"""Calibration: strengths by KL and margins, on a tiny model; the command, on the demo."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

import mlx_densesteer as ds
from mlx_densesteer import demo
from mlx_densesteer.cli import main
from mlx_densesteer.errors import InputError, VectorMismatchError
from mlx_densesteer.evaluation.scoring import Estimate
from mlx_densesteer.extraction.calibrate import (
    BEST,
    Calibrated,
    Calibration,
    best_layers,
    calibrate,
)
from mlx_densesteer.extraction.extract import ReadOut, encode_pairs
from mlx_densesteer.extraction.margin import margin_gains
from mlx_densesteer.model.divergence import Divergence
from mlx_densesteer.model.likelihood import log_likelihoods

PAIRS = [
    ds.Pair("1 + 1?", "It is 2.", "We add.\n\nIt is 2."),
    ds.Pair("What is 3 * 4?", "12", "We multiply 3 by 4.\n\nThat is 12."),
    ds.Pair("And 9 - 5?", "9 - 5 = 4", "9.\n\nMinus 5.\n\n4.\n", system="Be brief."),
]


@pytest.fixture(scope="module")
def model(hf_folder):
    loaded = ds.load(hf_folder)
    loaded.network.set_dtype(mx.float32)
    return loaded


@pytest.fixture
def vector(make_vector):
    return make_vector(size=0.5)


def test_each_setting_has_its_kl_and_its_margin(model, vector):
    seen = []
    found = calibrate(
        model,
        vector,
        PAIRS,
        layers=[1, (0, 3)],
        kl=[0.05, -0.02],
        positions="generated",
        progress=lambda *told: seen.append(told),
    )
    assert [(row.kl, row.layers) for row in found.rows] in [
        [(-0.02, a), (-0.02, b), (0.05, c), (0.05, d)]
        for a, b in [((1,), (0, 3)), ((0, 3), (1,))]
        for c, d in [((1,), (0, 3)), ((0, 3), (1,))]
    ]
    assert found.unreached == () and (found.pairs, found.positions) == (3, "generated")
    assert {what.partition(",")[0] for what, _, _ in seen} == {
        "finding strengths", "measuring the gain",
    }  # fmt: skip
    encoded = encode_pairs(model, PAIRS, ReadOut.of("mean-response"))
    texts = [([*pair.prompt, *pair.negative], len(pair.prompt)) for pair in encoded]
    for row in found.rows:
        steering = ds.Steering(vector, row.strength, row.layers, "generated")
        (kl,) = Divergence(model.network, texts, [min(row.layers)])([steering])
        assert kl == pytest.approx(abs(row.kl), rel=0.035)
        assert row.strength * row.kl > 0
        assert abs(row.dose) == pytest.approx(model.dose(steering)) and row.dose * row.kl > 0
        gains = np.array([gain(model, pair, steering) for pair in encoded])
        assert row.gain.value == pytest.approx(gains.mean(), abs=1e-4)
        assert gains.min() - 1e-4 <= row.gain.low <= row.gain.high <= gains.max() + 1e-4
    for kl in (-0.02, 0.05):  # towards sparse the one that favours sparse most is the first
        values = [np.sign(kl) * row.gain.value for row in found.rows if row.kl == kl]
        assert values == sorted(values, reverse=True)


def gain(model, pair, steering):
    total = 0.0
    for sign, response in ((1, pair.positive), (-1, pair.negative)):
        steered, stock = (
            next(log_likelihoods(model.network, [pair.prompt], [response], steering=one))[1]
            for one in (steering, None)
        )
        total += sign * (steered - stock) / len(response)
    return total


def test_without_layers_the_best_to_first_order_are_measured(model, make_vector, monkeypatch):
    vector = make_vector(size=0.5)
    encoded = encode_pairs(model, PAIRS, ReadOut.of("mean-response"))
    norms = model.norms(vector, vector.layers)
    gains = margin_gains(model, encoded, vector.layers, norms, dose=0.2)
    expected = sorted(sorted(gains, key=lambda layer: -gains[layer])[:2])
    assert best_layers(model, vector, encoded, 2) == expected
    assert best_layers(model, vector, encoded) == [0, 1, 2, 3]  # BEST at most: all
    assert len(vector.layers) <= BEST
    # what extraction measured with these weights is used
    stored = {"0": 0.5, "1": -1.0, "2": 0.1, "3": 0.2}
    meta = replace(vector.meta, margin_gain=stored, fingerprint=model.fingerprint)
    measured = ds.SteeringVector(vector.layers, meta)
    monkeypatch.setattr("mlx_densesteer.extraction.calibrate.margin_gains", None)
    assert best_layers(model, measured, encoded, 2) == [0, 3]


@pytest.mark.parametrize("own", [(0, 2), (2,)])
def test_a_trained_vector_is_measured_as_it_was_trained(model, vector, own):
    best = {"layers": [*own], "strength": 1.0, "positions": "generated", "reason": "trained"}
    trained = ds.SteeringVector(vector.layers, replace(vector.meta, recommended=best))
    for given in (None, [own]):
        found = calibrate(model, trained, PAIRS[:1], layers=given)
        assert [row.layers for row in found.rows] == [own] and found.positions == "generated"
    other = calibrate(model, trained, PAIRS[:1], layers=[1])
    assert [row.layers for row in other.rows] == [(1,)] and other.positions == "generated"


def test_what_cannot_be_reached_is_left_out_or_refused(model, vector):
    found = calibrate(model, vector, PAIRS[:1], layers=[1], kl=[0.05, 99.0])
    assert [row.kl for row in found.rows] == [0.05]
    assert len(found.unreached) == 1 and "layer 1: a KL of 99 nats" in found.unreached[0]
    with pytest.raises(InputError, match=r"no setting could be calibrated. layer 1: a KL of 99"):
        calibrate(model, vector, PAIRS[:1], layers=[1], kl=[99.0])
    nothing = ds.SteeringVector({1: np.zeros(64, np.float32)}, vector.meta)
    with pytest.raises(InputError, match="no more than a rounding error"):
        calibrate(model, nothing, PAIRS[:1])
    for options, error, message in [
        ({"kl": []}, InputError, "no KL to calibrate for"),
        ({"kl": [1e-7]}, InputError, "expected 0.0001 at least"),
        ({"layers": [9]}, VectorMismatchError, "no vector for layer 9"),
    ]:
        with pytest.raises(error, match=message):
            calibrate(model, vector, PAIRS, **options)
    with pytest.raises(InputError, match="no contrastive pairs"):
        calibrate(model, vector, [])


def row(layer, kl, gain=0.0):
    return Calibrated((layer,), kl, 1.0, 0.1, Estimate(gain, gain, gain))


def test_the_best_at_each_kl_come_first():
    rows = tuple(row(layer, kl) for kl in (0.05, 0.1) for layer in (7, 3, 5))
    found = Calibration(rows, (), "all", 3, "", "", "none")
    ranked = [(7, 0.05), (7, 0.1), (3, 0.05), (3, 0.1), (5, 0.05), (5, 0.1)]
    assert [(one.layers[0], one.kl) for one in found.best(9)] == ranked
    assert [(one.layers[0], one.kl) for one in found.best(3)] == ranked[:3]


def test_a_calibration_is_stored_and_read(model, vector, tmp_path):
    found = calibrate(model, vector, PAIRS, layers=[1, (0, 2)], kl=[0.05, 0.2, -0.1])
    assert Calibration.read(json.loads(json.dumps(found.describe()))) == found
    kept = ds.SteeringVector.load(found.on(vector).save(tmp_path / "v.npz"))
    for one in found.rows:
        known = model.known_kl_strength(kept, one.layers, "all", one.kl)
        assert known == pytest.approx(one.strength, rel=1e-12)
    low, high = (r.strength for r in found.rows if r.layers == (1,) and r.kl > 0)
    assert low < model.known_kl_strength(kept, (1,), "all", 0.1) < high
    assert model.known_kl_strength(kept, (1,), "all", 0.3) is None


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(demo.VECTOR, "v.npz")
    lines = [
        {"prompt": "Tom has 3 cups. Then Tom buys 4. How many cups does Tom have now?",
         "positive": "3 + 4 = 7\n\nThe answer is 7.", "negative": "Tom has 3.\n\nThen 4.\n\n7"},
        {"prompt": "What is 2 + 2?", "positive": "4", "negative": "2.\n\nAnd 2.\n\n4"},
    ]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def call(*words, code=0):
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == code, result.output
        return result

    return call


def test_the_command_ranks_and_stores(run):
    words = (
        "calibrate",
        "-m",
        "demo",
        "-v",
        "v.npz",
        "pairs.jsonl",
        "-l",
        "5,4+5",
        "--kl",
        "0.05,99",
    )
    done = run(*words, "--write")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["layers", "KL", "strength", "dose", "gain", "95%"]
    assert {(line[0], line[1]) for line in lines[1:3]} == {("5", "0.05"), ("4+5", "0.05")}
    assert "left out: layer 5: a KL of 99 nats per token cannot be reached" in done.stderr
    assert "next, on a task: densesteer sweep -m demo -v v.npz --pairs pairs.jsonl" in done.stderr
    document = json.loads(run(*words, "--json").stdout)
    stored = ds.SteeringVector.load("v.npz").meta.calibration
    assert document["points"] == stored["points"] and len(document["unreached"]) == 2
    assert "2 settings, KL 0.05 nats per token" in run("vector", "show", "v.npz").stdout
    told = run("generate", "-m", "demo", "-v", "v.npz", "-l", "5", "--kl", "0.05", "-n", "1", "Hi")
    assert "the strength for a KL of 0.05 nats is that of the vector's calibration" in told.stderr
    told = run("generate", "-m", "demo", "-v", "v.npz", "-l", "5", "-s", "0.2nats", "-n", "1", "Hi")
    assert "finding the strength at which the KL is 0.2 nats per token" in told.stderr


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["-v", "demo", "--write"], "the embedded vector cannot be changed", 2),
        (["-v", "demo", "--kl", "0"], "Name a KL other than 0", 2),
        (["-v", "demo", "--kl", "0.1,10%"], "KL '10%': expected a number of nats per token", 1),
        (["-v", "demo", "-l", "9"], "no vector for layer 9", 1),
        (["-v", "demo", "-l", "1+x"], "layers together (10+12)", 1),
        (["-v", "none.npz"], "none.npz: no such file", 1),
    ],
)
def test_what_cannot_be_done_is_said(run, words, message, code):
    assert message in run("calibrate", "-m", "demo", "pairs.jsonl", *words, code=code).stderr


def test_ctrl_c_says_that_nothing_was_written(run, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_densesteer.extraction.calibrate.Divergence", stop)
    done = run("calibrate", "-m", "demo", "-v", "v.npz", "pairs.jsonl", "--write", code=130)
    assert "interrupted while calibrating; nothing was written" in done.stderr
    assert ds.SteeringVector.load("v.npz").meta.calibration is None


def test_the_vectors_own_pairs_are_warned_of(run):
    from mlx_densesteer.extraction.pairs import pairs_sha256, read_pairs

    vector = ds.SteeringVector.load("v.npz")
    meta = replace(vector.meta, pairs_sha256=pairs_sha256(read_pairs("pairs.jsonl")))
    ds.SteeringVector(vector.layers, meta).save("v.npz")
    done = run("calibrate", "-m", "demo", "-v", "v.npz", "pairs.jsonl", "-l", "5")
    assert "warning: the vector was made of these pairs" in done.stderr


def test_a_sweep_calibrates_and_tries_only_the_best(run, monkeypatch, tmp_path):
    words = ("sweep", "-m", "demo", "demo", "-v", "v.npz", "--pairs", "pairs.jsonl", "-l", "4,5,4+5",
             "--kl", "0.05,0.1", "--best", "3", "--limit", "2", "-n", "24", "--no-nll", "-o", "out")  # fmt: skip
    monkeypatch.setattr("mlx_densesteer.evaluation.plot.plot_sweep", lambda *_: [])
    first = json.loads(run(*words, "--write", "--json").stdout)
    points = first["calibration"]["points"]
    assert len(points) == 6
    steered = first["rows"][1:]
    assert [row["strength"] for row in steered] == [
        points[i]["strength"] for i in (0, 3, 1)  # the best at 0.05 and at 0.1, the second at 0.05
    ]  # fmt: skip
    stored = ds.SteeringVector.load("v.npz").meta
    assert len(stored.calibration["points"]) == 6 and len(stored.tested) == 4
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()
    monkeypatch.setattr("mlx_densesteer.extraction.calibrate.calibrate", None)  # not again
    again = json.loads(run(*words, "--json").stdout)
    assert again == first | {"next": again["next"]}  # which repeats --write, or not
    assert first["next"] == again["next"].removesuffix("demo") + "--write demo"
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == before


def test_the_next_command_of_a_sweep_that_recommends_nothing(run, monkeypatch):
    from mlx_densesteer.cli.run import program
    from mlx_densesteer.evaluation import sweep as sweeping
    from mlx_densesteer.evaluation.recommendation import Recommendation, Unproven

    unproven = Unproven((4, 5), 0.1 + 0.2, 0.2, 3, 1, 321)
    monkeypatch.setattr(
        sweeping, "recommend", lambda *_, **__: Recommendation((), 0, 0, "none", "None.", unproven)
    )
    monkeypatch.setattr("mlx_densesteer.evaluation.plot.plot_sweep", lambda *_: [])
    words = ("sweep", "-m", "demo", "demo", "-v", "v.npz", "-l", "4+5", "--strengths=5%", "--skip", "7",
             "--limit", "2", "-n", "8", "--no-nll", "--system", "Be brief.")  # fmt: skip
    expected = (
        "sweep -m demo -v v.npz -l 4+5 --strengths=0.30000000000000004 --skip 9 --limit 321 "
        "-o sweep-confirm -n 8 --system 'Be brief.' --no-nll demo"
    )
    *_, says, command = run(*words).stdout.splitlines()
    assert (says, command) == (
        "Next, try that setting alone on other problems:",
        f"  {program()} {expected}",
    )
    document = json.loads(run(*words, "--json", "--write").stdout)
    assert document["next"] == f"densesteer {expected}"
    assert document["recommendation"]["unproven"]["layers"] == [4, 5]
    assert ds.SteeringVector.load("v.npz").meta.recommended is None  # unproven is not stored
