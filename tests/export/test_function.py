"""The function file: what it computes, what it says, and what is refused."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT, at_every_layer, rounding
from mlx.utils import tree_flatten
from mlx_lm.models import qwen2

from mlx_densesteer import Steering, load, make_cache
from mlx_densesteer.cli import main
from mlx_densesteer.errors import (
    DiskError,
    ExportError,
    SteeringError,
    VectorMismatchError,
)
from mlx_densesteer.export import function as function_module
from mlx_densesteer.export.function import empty_cache, export_function, file_size, steered_step
from mlx_densesteer.model.model import Model
from mlx_densesteer.steering.request import request
from mlx_densesteer.steering.steering import LARGE_DOSE
from mlx_densesteer.steering.vector import SteeringVector, VectorMeta

CAPACITY = 24
TOKENS = [11, 3, 77, 42, 5, 99, 100, 8, 61, 23, 7, 90, 54]

DEMO_VECTOR = SteeringVector.load("demo")
LAYER = request(DEMO_VECTOR).layers[0]


@pytest.fixture
def tiny_model(hf_folder) -> Model:
    """The tiny model with its tokenizer, in float32."""
    model = load(hf_folder)
    model.network.set_dtype(mx.float32)
    return model


@pytest.fixture
def write(tiny_model, make_vector, tmp_path):
    """Write a function file of the tiny model, steered at two layers, and import it."""

    def make(layers=(1, 2), **options):
        steering = Steering(make_vector(), 1.5, layers)
        options = {"capacity": CAPACITY, "chunks": (8, 4)} | options
        made = export_function(tiny_model, steering, tmp_path / "tiny.mlxfn", **options)
        return mx.import_function(str(made.path)), made

    return make


def read(function, counts, strength, cache=None, position=0):
    """Feed ``TOKENS`` in chunks; return the logits after the last one, and the cache."""
    cache = function()[1:] if cache is None else cache
    for count in counts:
        tokens = mx.array([TOKENS[position : position + count]], mx.int32)
        logits, *cache = function(tokens, mx.array(position), mx.array(strength), *cache)
        position += count
    return logits, cache


def close(found, expected):
    return mx.abs(found - expected).max().item() < rounding(expected)


@pytest.mark.parametrize("layers", [(2,), (0, 1, 3)])
def test_the_strength_is_an_input(layers, write, tiny_model, make_vector):
    function, made = write(layers)
    network = tiny_model.network
    plain = network(mx.array([TOKENS]))[:, -1]
    for strength in (0.0, 1.5, -2.0, 7.25):
        ours, _ = read(function, (8, 4, 1), strength)
        steering = Steering(make_vector(), strength, layers)
        theirs = network(mx.array([TOKENS]), make_cache(network, steering))[:, -1]
        assert close(ours, theirs)
        assert close(ours, plain) if strength == 0 else mx.abs(ours - plain).max().item() > 0.05
    assert made.strengths == (1.5, -1.5, 0.0)
    assert made.largest_difference < 1e-5 < made.largest_logit


def test_on_a_thread_that_was_not_the_first_it_is_said(hf_folder, make_vector, tmp_path):
    """mlx keeps the first stream for the thread that used it first: here that of the tests."""
    from concurrent.futures import ThreadPoolExecutor

    def export():
        steering = Steering(make_vector(), 1.5, (1,))
        network, tokenizer = load(hf_folder)  # mlx-lm's own pair is taken too
        path = tmp_path / "f.mlxfn"
        export_function(network, tokenizer, steering, path, capacity=16, chunks=[4])

    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(export).exception()
    assert isinstance(found, ExportError) and "the process that used mlx first" in str(found)
    assert not list(tmp_path.iterdir())


def test_strength_0_is_the_unsteered_step_bit_for_bit(write, tiny_model):
    function, _ = write()
    network = tiny_model.network
    unsteered = steered_step(network, {}, CAPACITY)
    tokens = mx.array([TOKENS[:8]], mx.int32)
    cache = empty_cache(network, CAPACITY)
    theirs = unsteered(tokens, mx.array(0), mx.array(3.0), *cache)
    ours = function(tokens, mx.array(0), mx.array(0.0), *cache)
    assert all(mx.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_chunks_of_a_prompt_are_the_same_as_single_tokens(write):
    function, _ = write()
    whole, cache = read(function, (8, 4, 1), 1.5)
    single, again = read(function, [1] * 13, 1.5)
    assert close(whole, single)
    for a, b in zip(cache, again, strict=True):
        assert close(a, b)
        assert not a[:, :, 13:].any()  # nothing was written behind what was read


def test_a_smaller_position_goes_back(write):
    function, _ = write()
    once, cache = read(function, (8, 4, 1), 1.5)
    again, _ = read(function, (4, 1), 1.5, cache, position=8)
    assert mx.array_equal(once, again)


def test_the_strength_may_change_from_call_to_call(write, tiny_model, make_vector):
    """Positions are the program's: 0 for the prompt, then lambda, is ``generated``."""
    function, _ = write()
    network = tiny_model.network
    _, cache = read(function, (8, 4), 0.0)
    ours, _ = read(function, (1,), 1.5, cache, position=12)
    steering = Steering(make_vector(), 1.5, (1, 2), "generated")
    caches = make_cache(network, steering, prompt=range(13))
    assert close(ours, network(mx.array([TOKENS]), caches)[:, -1])


def test_no_room_gives_nan_and_the_cache_stays_whole(write):
    function, _ = write()
    _, cache = read(function, (8, 4, 1), 1.5)
    logits, *_ = function(mx.array([[5]]), mx.array(CAPACITY - 1), mx.array(1.5), *cache)
    assert mx.isfinite(logits).all()
    for count, position in ((1, CAPACITY), (4, CAPACITY - 3), (8, 10**6), (1, -1)):
        tokens = mx.zeros((1, count), mx.int32)
        logits, *after = function(tokens, mx.array(position), mx.array(1.5), *cache)
        assert mx.isnan(logits).all()
        assert [a.shape for a in after] == [a.shape for a in cache]
    with pytest.raises(ValueError, match="No imported function found"):
        function(mx.zeros((1, 3), mx.int32), mx.array(0), mx.array(1.5), *cache)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "4 bit", "8 bit", "untied"])
def test_other_precisions_and_an_untied_head(kind, tiny_model, make_vector, tmp_path, pytestconfig):
    network, tokenizer = tiny_model
    if kind == "untied":
        args = vars(network.args) | {"tie_word_embeddings": False}
        network = qwen2.Model(qwen2.ModelArgs.from_dict(args))
    elif kind.endswith("bit"):
        network.set_dtype(mx.float16)
        nn.quantize(network, group_size=32, bits=int(kind[0]))
    else:
        network.set_dtype(getattr(mx, kind))
    steering = Steering(make_vector(), 2.0, (1, 2))
    model = Model(network, tokenizer)
    model.measured_norms = {1: 1.0, 2: 1.0}  # a CPU takes long to measure them in 16 bits
    made = export_function(model, steering, tmp_path / "f.mlxfn", capacity=16, chunks=[8])
    dtype = {"untied": "float32", "bfloat16": "bfloat16"}.get(kind, "float16")
    assert made.metadata["cache_dtype"] == dtype
    weights = sum(a.nbytes for _, a in tree_flatten(network.parameters()))
    if not pytestconfig.getoption("metal_like"):  # which traces longer products
        assert weights < made.path.stat().st_size <= file_size(network, 2) < weights + 200_000


def test_the_file_says_what_it_is(write, tiny_model):
    function, made = write()
    _, text = mx.import_function(str(made.path), return_metadata=True)
    assert json.loads(text) == made.metadata == json.loads(bytes(function()[0]))
    said = made.metadata
    assert (said["model"], said["layers"], said["strength"]) == (tiny_model.name, [1, 2], 1.5)
    assert (said["capacity"], said["chunks"], said["eos"]) == (CAPACITY, [8, 4, 1], [258])
    assert (said["vocab_size"], said["layer_count"]) == (260, 4)
    cache = function()[1:]
    assert {tuple(a.shape) for a in cache} == {tuple(said["cache_shape"])} == {(1, 2, CAPACITY, 16)}
    assert said["cache_bytes"] == sum(a.nbytes for a in cache) == 2 * 4 * 2 * 16 * CAPACITY * 4
    assert not any(a.any() for a in cache)


@pytest.mark.parametrize("layers", [(2,), (0, 1, 3)])
def test_the_file_tells_the_dose(layers, write, tiny_model, make_vector):
    said = write(layers)[1].metadata
    assert said["dose"] == tiny_model.dose(Steering(make_vector(), 1.5, layers))
    dose = tiny_model.dose(Steering(make_vector(), -3.0, layers))
    assert 3 * said["dose_per_strength"] == pytest.approx(dose)
    assert said["large_dose"] == LARGE_DOSE


def test_the_program_of_the_page_runs_again_and_hands_its_cache_over(
    hf_folder, make_vector, tmp_path, monkeypatch, capsys
):
    """What it needs beside the weights is one cache and a step's scratch, not a cache per token."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(hf_folder, tmp_path / "converted/Qwen2.5-1.5B-Instruct-4bit")
    make_vector().save(tmp_path / "dense.npz")
    page = (ROOT / "docs/export-function.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = code.replace("layers=(14,)", "layers=(2,)").replace("What is", "What is " + "1 + " * 20)
    writing, reading = code.split("f = mx.import_function")
    for _ in range(2):
        names = {}
        exec(writing, names)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        exec("f = mx.import_function" + reading, names)
        grown = mx.get_peak_memory() - before
        cache = sum(array.nbytes for array in names["cache"])
        assert names["position"] > 80
        assert cache < grown < 3 * cache + (tmp_path / "steered.mlxfn").stat().st_size
    assert len(capsys.readouterr().out.splitlines()) == 8


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2, 3)])
@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_a_large_vector_can_be_checked_where_the_strength_is_0(kind, layers, tiny_model, tmp_path):
    tiny_model.network.set_dtype(getattr(mx, kind))
    size = float(mx.finfo(getattr(mx, kind)).max)
    size = 2 * size if kind == "float16" else 0.9 * size  # strength 1 overflows, or four of it do
    meta = VectorMeta(model="tiny", hidden_size=64, layer_count=4)
    vector = SteeringVector({k: np.full(64, size, np.float32) for k in layers}, meta)
    path = tmp_path / "f.mlxfn"
    setting = Steering(vector, 0.0, layers)
    made = export_function(tiny_model, setting, path, capacity=16, chunks=[8])
    assert made.metadata["strength"] == 0
    assert 0 < made.strengths[0] * len(layers) <= made.metadata["largest_strength"] / 2


def test_the_model_stays_what_it_was(write, tiny_model):
    network = tiny_model.network
    before = dict(tree_flatten(network.parameters()))
    logits = network(mx.array([TOKENS]))
    write()
    after = dict(tree_flatten(network.parameters()))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[k], after[k]) for k in before)
    assert mx.array_equal(network(mx.array([TOKENS])), logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 1}, "capacity 1: expected 2 to 512"),
        ({"capacity": 513}, "which is the model's context"),
        ({"chunks": [25]}, "chunk lengths 25, 1: expected 1 to 24"),
        ({"chunks": [0]}, "chunk lengths 1, 0"),
    ],
)
def test_what_cannot_be_written_is_refused(options, message, write, tmp_path):
    with pytest.raises(ExportError, match=message):
        write(**options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("positions", ["steps", "think", "answer"])
def test_what_depends_on_the_text_is_not_known_to_a_file(demo_model, tmp_path, positions):
    steering = replace(request(DEMO_VECTOR).steering(demo_model), positions=positions)
    with pytest.raises(ExportError, match=f"'{positions}' cannot be exported: the file has no"):
        export_function(demo_model, steering, tmp_path / "f.mlxfn")


def test_a_wrong_name_or_vector_is_refused(write, tiny_model, make_vector, tmp_path):
    steering = Steering(make_vector(hidden=32), 1.0, (1,))
    with pytest.raises(VectorMismatchError, match="hidden size 64"):
        export_function(tiny_model, steering, tmp_path / "f.mlxfn")
    tiny_model.network.set_dtype(mx.float16)
    with pytest.raises(SteeringError, match="overflows the model's float16"):
        export_function(tiny_model, at_every_layer(make_vector(), 1e6), tmp_path / "f.mlxfn")
    with pytest.raises(ExportError, match=r"ends in \.mlxfn"):
        export_function(tiny_model, steering, tmp_path / "dense.npz")
    assert not list(tmp_path.iterdir())
    (tmp_path / "tiny.mlxfn").write_text("mine")
    with pytest.raises(ExportError, match=r"exists already.*replace it .force"):
        write()
    assert (tmp_path / "tiny.mlxfn").read_text() == "mine"
    write(force=True)
    assert [one.name for one in tmp_path.iterdir()] == ["tiny.mlxfn"]
    with pytest.raises(DiskError, match="there is no folder .*nope. Make it first"):
        export_function(tiny_model, steering, tmp_path / "nope/f.mlxfn")
    with pytest.raises(ExportError, match=r"dcff\.mlxfn': the name is not UTF-8"):
        export_function(tiny_model, steering, tmp_path / os.fsdecode(b"\xff.mlxfn"))
    assert [one.name for one in tmp_path.iterdir()] == ["tiny.mlxfn"]


def unsteered(network, vectors, capacity):
    return steered_step(network, {}, capacity)


def a_little_stronger(network, vectors, capacity):
    return steered_step(network, {k: 1.01 * v for k, v in vectors.items()}, capacity)


def a_layer_below(network, vectors, capacity):
    return steered_step(network, {k - 1: v for k, v in vectors.items()}, capacity)


def not_a_number(network, vectors, capacity):
    """Spoils single tokens only, and those only behind a chunk."""
    step = steered_step(network, vectors, capacity)

    def spoilt(tokens, position, *rest):
        logits, *cache = step(tokens, position, *rest)
        if tokens.shape[1] == 1:
            logits = mx.where(position > 0, mx.array(float("nan")), logits)
        return logits, *cache

    return spoilt


@pytest.mark.parametrize("broken", [unsteered, a_little_stronger, a_layer_below, not_a_number])
@pytest.mark.parametrize("chunks", [(8, 4), (CAPACITY,), ()])
def test_a_file_that_fails_its_check_is_not_kept(broken, chunks, write, tmp_path, monkeypatch):
    monkeypatch.setattr(function_module, "steered_step", broken)
    with pytest.raises(ExportError, match="differ from run-time steering by"):
        write(chunks=chunks)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(  # at a dose of 0.2 % (0.05) rounding hides 1 %
    ("broken", "strength"),
    [
        (a_little_stronger, 0.5),
        (a_little_stronger, 4.76),
        (a_layer_below, 0.05),
        (a_layer_below, 4.76),
    ],
)
def test_under_tf32_what_is_right_is_kept_and_nothing_else(
    broken, strength, demo_model, metal_like, monkeypatch, tmp_path
):
    metal_like.use("tf32")
    network = copy.deepcopy(demo_model.network)
    network.set_dtype(mx.float32)
    model = Model(network, demo_model.tokenizer)
    model.measured_norms = dict.fromkeys(range(6), 1.0)
    options = {"capacity": 40, "chunks": [32]}
    steering = Steering(DEMO_VECTOR, strength, (4,))
    export_function(model, steering, tmp_path / "right.mlxfn", **options)
    monkeypatch.setattr(function_module, "steered_step", broken)
    with pytest.raises(ExportError, match="differ from run-time steering by"):
        export_function(model, steering, tmp_path / "wrong.mlxfn", **options)


def test_an_interruption_leaves_the_old_file(write, tmp_path):
    (tmp_path / "tiny.mlxfn").write_text("old")

    def interrupt(what):
        if what.startswith("checking"):
            assert len(list(tmp_path.iterdir())) == 2  # the new one is there, under another name
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(force=True, progress=interrupt)
    assert [one.read_text() for one in tmp_path.iterdir()] == ["old"]


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    code = (
        "import resource, sys\nfrom mlx_densesteer.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "main(['export-function', '-m', 'demo', '-v', 'demo', '-o', sys.argv[1]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "f.mlxfn")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"Error: {tmp_path / 'f.mlxfn'}: cannot be written" in done.stderr
    assert "Make room on the disk" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path):
    path = tmp_path / "demo.mlxfn"
    arguments = ["export-function", "-m", "demo", "-v", "demo", "-o", str(path)]
    options = ["-s", "10%", "--positions", "first:9", "--chunk", "16"]
    done = CliRunner().invoke(main, [*arguments, *options, "--capacity", "64"])
    assert (done.exit_code, done.stdout) == (0, f"{path}\n")
    assert "10% of the residual stream" in done.stderr
    assert "logits differ from run-time steering by" in done.stderr
    said = json.loads(mx.import_function(str(path), return_metadata=True)[1])
    assert (said["model"], said["vector"], said["layers"]) == ("demo", "demo", [LAYER])
    assert (said["positions"], said["chunks"]) == ("first:9", [16, 1])
    assert said["strength"] == pytest.approx(2.38, abs=0.01)
    assert said["strength"] * said["dose_per_strength"] == pytest.approx(0.1)
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert "exists already" in done.stderr
