"""The function file: what it computes, and the C++ program of ``examples/cpp`` that runs it."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT
from mlx.utils import tree_flatten
from mlx_lm.models.qwen2 import Model, ModelArgs

from mlx_densesteer import Steering, demo, generate, load, make_cache
from mlx_densesteer.cli import main
from mlx_densesteer.demo.problems import held_out
from mlx_densesteer.errors import (
    DiskError,
    ExportError,
    InputError,
    SteeringError,
    VectorMismatchError,
)
from mlx_densesteer.export import function as function_module
from mlx_densesteer.export.function import empty_cache, export_function, file_size, steered_step
from mlx_densesteer.model.model import Model as DenseModel
from mlx_densesteer.model.prompt import encode_prompt
from mlx_densesteer.steering.steering import LARGE_DOSE
from mlx_densesteer.steering.vector import SteeringVector, VectorMeta

CAPACITY = 24
TOKENS = [11, 3, 77, 42, 5, 99, 100, 8, 61, 23, 7, 90, 54]

LAYER = 4  # the embedded vector's default


@pytest.fixture
def tiny_loaded(hf_folder):
    model, tokenizer = load(hf_folder)
    model.set_dtype(mx.float32)
    return model, tokenizer


@pytest.fixture
def write(tiny_loaded, make_vector, tmp_path):
    """Write a function file of the tiny model, steered at two layers, and import it."""

    def make(layers=(1, 2), **options):
        steering = Steering(make_vector(), 1.5, layers)
        options = {"capacity": CAPACITY, "chunks": (8, 4)} | options
        made = export_function(*tiny_loaded, steering, tmp_path / "tiny.mlxfn", **options)
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


@pytest.mark.parametrize("layers", [(2,), (0, 1, 3)])
def test_the_strength_is_an_input(layers, write, tiny_loaded, make_vector):
    function, made = write(layers)
    model = tiny_loaded[0]
    plain = model(mx.array([TOKENS]))[:, -1]
    for strength in (0.0, 1.5, -2.0, 7.25):
        ours, _ = read(function, (8, 4, 1), strength)
        steering = Steering(make_vector(), strength, layers)
        theirs = model(mx.array([TOKENS]), make_cache(model, steering))[:, -1]
        assert mx.allclose(ours, theirs, atol=1e-5, rtol=0)
        moved = mx.abs(ours - plain).max().item()
        assert moved < 1e-5 if strength == 0 else moved > 0.05
    assert made.strengths == (1.5, -1.5, 0.0)
    assert made.largest_difference < 1e-5 < made.largest_logit


def test_on_a_thread_that_was_not_the_first_it_is_said(hf_folder, make_vector, tmp_path):
    """mlx keeps the first stream for the thread that used it first: here that of the tests."""
    from concurrent.futures import ThreadPoolExecutor

    def export():
        steering = Steering(make_vector(), 1.5, (1,))
        model, tokenizer = load(hf_folder)
        export_function(model, tokenizer, steering, tmp_path / "f.mlxfn", capacity=16, chunks=[4])

    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(export).exception()
    assert isinstance(found, ExportError) and "the process that used mlx first" in str(found)
    assert not list(tmp_path.iterdir())


def test_strength_0_is_the_unsteered_step_bit_for_bit(write, tiny_loaded):
    function, _ = write()
    model = tiny_loaded[0]
    unsteered = steered_step(model, {}, CAPACITY)
    tokens = mx.array([TOKENS[:8]], mx.int32)
    cache = empty_cache(model, CAPACITY)
    theirs = unsteered(tokens, mx.array(0), mx.array(3.0), *cache)
    ours = function(tokens, mx.array(0), mx.array(0.0), *cache)
    assert all(mx.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_chunks_of_a_prompt_are_the_same_as_single_tokens(write):
    function, _ = write()
    whole, cache = read(function, (8, 4, 1), 1.5)
    single, again = read(function, [1] * 13, 1.5)
    assert mx.allclose(whole, single, atol=1e-5, rtol=0)
    for a, b in zip(cache, again, strict=True):
        assert mx.allclose(a, b, atol=1e-5, rtol=0)
        assert not a[:, :, 13:].any()  # nothing was written behind what was read


def test_a_smaller_position_goes_back(write):
    function, _ = write()
    once, cache = read(function, (8, 4, 1), 1.5)
    again, _ = read(function, (4, 1), 1.5, cache, position=8)
    assert mx.array_equal(once, again)


def test_the_strength_may_change_from_call_to_call(write, tiny_loaded, make_vector):
    """Positions are the program's: 0 for the prompt, then lambda, is ``generated``."""
    function, _ = write()
    model = tiny_loaded[0]
    _, cache = read(function, (8, 4), 0.0)
    ours, _ = read(function, (1,), 1.5, cache, position=12)
    steering = Steering(make_vector(), 1.5, (1, 2), "generated")
    caches = make_cache(model, steering, prompt_length=13)
    assert mx.allclose(ours, model(mx.array([TOKENS]), caches)[:, -1], atol=1e-5, rtol=0)


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
def test_other_precisions_and_an_untied_head(kind, tiny_loaded, make_vector, tmp_path):
    model, tokenizer = tiny_loaded
    if kind == "untied":
        args = ModelArgs.from_dict(vars(model.args) | {"tie_word_embeddings": False})
        model = Model(args)
    elif kind.endswith("bit"):
        model.set_dtype(mx.float16)
        nn.quantize(model, group_size=32, bits=int(kind[0]))
    else:
        model.set_dtype(getattr(mx, kind))
    steering = Steering(make_vector(), 2.0, (1, 2))
    options = {"capacity": 16, "chunks": [8]}
    made = export_function(model, tokenizer, steering, tmp_path / "f.mlxfn", **options)
    dtype = {"untied": "float32", "bfloat16": "bfloat16"}.get(kind, "float16")
    assert made.metadata["cache_dtype"] == dtype
    weights = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    assert weights < made.path.stat().st_size <= file_size(model, 2) < weights + 200_000


def test_the_file_says_what_it_is(write, tiny_loaded):
    function, made = write()
    _, text = mx.import_function(str(made.path), return_metadata=True)
    assert json.loads(text) == made.metadata == json.loads(bytes(function()[0]))
    said = made.metadata
    assert (said["layers"], said["strength"]) == ([1, 2], 1.5)
    assert (said["capacity"], said["chunks"], said["eos"]) == (CAPACITY, [8, 4, 1], [258])
    assert (said["vocab_size"], said["layer_count"]) == (260, 4)
    cache = function()[1:]
    assert {tuple(a.shape) for a in cache} == {tuple(said["cache_shape"])} == {(1, 2, CAPACITY, 16)}
    assert said["cache_bytes"] == sum(a.nbytes for a in cache) == 2 * 4 * 2 * 16 * CAPACITY * 4
    assert not any(a.any() for a in cache)


@pytest.mark.parametrize("layers", [(2,), (0, 1, 3)])
def test_the_file_tells_the_dose(layers, write, tiny_loaded, make_vector):
    said = write(layers)[1].metadata
    dose = DenseModel(*tiny_loaded).dose(Steering(make_vector(), -3.0, layers))
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
def test_a_large_vector_can_be_checked_where_the_strength_is_0(kind, layers, tiny_loaded, tmp_path):
    model, tokenizer = tiny_loaded
    model.set_dtype(getattr(mx, kind))
    size = float(mx.finfo(getattr(mx, kind)).max)
    size = 2 * size if kind == "float16" else 0.9 * size  # strength 1 overflows, or four of it do
    meta = VectorMeta(model="tiny", hidden_size=64, layer_count=4)
    vector = SteeringVector({k: np.full(64, size, np.float32) for k in layers}, meta)
    path = tmp_path / "f.mlxfn"
    made = export_function(model, tokenizer, Steering(vector, 0.0), path, capacity=16, chunks=[8])
    assert made.metadata["strength"] == 0
    assert 0 < made.strengths[0] * len(layers) <= made.metadata["largest_strength"] / 2


def test_the_model_stays_what_it_was(write, tiny_loaded):
    model = tiny_loaded[0]
    before = dict(tree_flatten(model.parameters()))
    logits = model(mx.array([TOKENS]))
    write()
    after = dict(tree_flatten(model.parameters()))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[k], after[k]) for k in before)
    assert mx.array_equal(model(mx.array([TOKENS])), logits)


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


def test_a_wrong_name_or_vector_is_refused(write, tiny_loaded, make_vector, tmp_path):
    steering = Steering(make_vector(hidden=32), 1.0, (1,))
    with pytest.raises(VectorMismatchError, match="hidden size 64"):
        export_function(*tiny_loaded, steering, tmp_path / "f.mlxfn")
    model, tokenizer = tiny_loaded
    model.set_dtype(mx.float16)
    with pytest.raises(SteeringError, match="overflows the model's float16"):
        export_function(model, tokenizer, Steering(make_vector(), 1e6), tmp_path / "f.mlxfn")
    with pytest.raises(ExportError, match=r"ends in \.mlxfn"):
        export_function(model, tokenizer, steering, tmp_path / "dense.npz")
    assert not list(tmp_path.iterdir())
    (tmp_path / "tiny.mlxfn").write_text("mine")
    with pytest.raises(ExportError, match=r"exists already.*--force; in Python force=True"):
        write()
    assert (tmp_path / "tiny.mlxfn").read_text() == "mine"
    write(force=True)
    assert [one.name for one in tmp_path.iterdir()] == ["tiny.mlxfn"]
    with pytest.raises(DiskError, match="there is no folder .*nope. Make it first"):
        export_function(*tiny_loaded, steering, tmp_path / "nope/f.mlxfn")
    with pytest.raises(ExportError, match=r"dcff\.mlxfn': the name is not UTF-8"):
        export_function(*tiny_loaded, steering, tmp_path / os.fsdecode(b"\xff.mlxfn"))
    assert [one.name for one in tmp_path.iterdir()] == ["tiny.mlxfn"]


def unsteered(model, vectors, capacity):
    return steered_step(model, {}, capacity)


def not_a_number(model, vectors, capacity):
    """Spoils single tokens only, and those only behind a chunk."""
    step = steered_step(model, vectors, capacity)

    def spoilt(tokens, position, *rest):
        logits, *cache = step(tokens, position, *rest)
        if tokens.shape[1] == 1:
            logits = mx.where(position > 0, mx.array(float("nan")), logits)
        return logits, *cache

    return spoilt


@pytest.mark.parametrize("broken", [unsteered, not_a_number])
@pytest.mark.parametrize("chunks", [(8, 4), (CAPACITY,), ()])
def test_a_file_that_fails_its_check_is_not_kept(broken, chunks, write, tmp_path, monkeypatch):
    monkeypatch.setattr(function_module, "steered_step", broken)
    with pytest.raises(ExportError, match="differ from run-time steering by"):
        write(chunks=chunks)
    assert not list(tmp_path.iterdir())


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
    assert "mlx cannot write or read it back" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path):
    path = tmp_path / "demo.mlxfn"
    arguments = ["export-function", "-m", "demo", "-v", "demo", "-o", str(path)]
    options = ["-s", "10%", "--positions", "generated", "--chunk", "16"]
    done = CliRunner().invoke(main, [*arguments, *options, "--capacity", "64"])
    assert (done.exit_code, done.stdout) == (0, f"{path}\n")
    assert "10% of the residual stream" in done.stderr
    assert "logits differ from run-time steering by" in done.stderr
    said = json.loads(mx.import_function(str(path), return_metadata=True)[1])
    assert (said["model"], said["vector"], said["layers"]) == ("demo", "demo", [LAYER])
    assert (said["positions"], said["chunks"]) == ("generated", [16, 1])
    assert said["strength"] == pytest.approx(1.757, abs=0.01)
    assert said["strength"] * said["dose_per_strength"] == pytest.approx(0.1)
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert "exists already" in done.stderr


# The C++ program


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Path:
    """``examples/cpp``, built as its README says."""
    if not shutil.which("cmake"):
        message = "no cmake: examples/cpp cannot be built"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    build = tmp_path_factory.mktemp("build")
    configure = ["cmake", "-S", ROOT / "examples/cpp", "-B", build]
    for command in ([*configure, f"-DPython3_EXECUTABLE={sys.executable}"], ["cmake", "--build", build]):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert not done.returncode, done.stdout + done.stderr
    return build / "generate"


@pytest.fixture(scope="session")
def demo_loaded():
    return load("demo")


@pytest.fixture(scope="session")
def demo_file(demo_loaded, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("function") / "demo.mlxfn"
    steering = Steering(SteeringVector.load(demo.VECTOR), 4.76, (LAYER,))
    return export_function(demo_loaded, steering, path, capacity=256).path


@pytest.fixture(scope="session")
def question(demo_loaded) -> list[int]:
    return encode_prompt(demo_loaded[1], held_out(1)[0].question)


def run(program, *arguments, input=""):
    words = [str(program), *map(str, arguments)]
    return subprocess.run(words, input=input, capture_output=True, text=True, timeout=120)


def ids(text: str) -> list[int]:
    return [int(line) for line in text.splitlines()]


@pytest.mark.parametrize("positions", ["all", "generated", "prompt"])
@pytest.mark.parametrize("strength", [-7.13, 0.0, 4.76])
def test_the_program_says_what_python_says(
    strength, positions, program, demo_file, demo_loaded, question
):
    steering = Steering(SteeringVector.load(demo.VECTOR), strength, (LAYER,), positions)
    expected = generate(*demo_loaded, question, steering=steering, max_tokens=60).token_ids
    options = ("--strength", strength, "--positions", positions, "--max-tokens", 60)
    done = run(program, demo_file, *options, input=" ".join(map(str, question)))
    assert (ids(done.stdout), done.stderr) == (list(expected), "")
    assert done.returncode == 0


def test_the_program_uses_what_the_file_names(program, demo_file, demo_loaded, question):
    steering = Steering(SteeringVector.load(demo.VECTOR), 4.76, (LAYER,))
    whole = generate(*demo_loaded, question, steering=steering).token_ids
    done = run(program, demo_file, *question)  # the default strength; stops at the end of turn
    assert ids(done.stdout) == list(whole)
    stop = run(program, demo_file, "--eos", whole[3], *question)
    assert ids(stop.stdout) == list(whole[: whole.index(whole[3])])
    on = run(program, demo_file, "--eos", "-", "--max-tokens", len(whole) + 2, *question)
    assert ids(on.stdout)[: len(whole) + 1] == [*whole, *demo_loaded[1].eos_token_ids]


def test_text_goes_in_and_comes_out(program, demo_file, demo_loaded):
    """The three commands of examples/cpp/README.md."""
    text, script = held_out(1)[0].question, ROOT / "examples/cpp/tokens.py"
    encoded = run(sys.executable, script, "encode", "demo", text)
    answer = run(program, demo_file, "--strength", 0, input=encoded.stdout)
    decoded = run(sys.executable, script, "decode", "demo", input=answer.stdout)
    assert decoded.stdout == generate(*demo_loaded, text).text + "\n"


@pytest.mark.parametrize(
    ("arguments", "input", "message"),
    [
        (["encode", "demo", " "], "", "the prompt is empty"),
        (["decode", "/nope"], "", "/nope: no such folder"),
        (["decode", "demo"], "3 -5", "token id '-5': expected 0 to 575"),
    ],
)
def test_tokens_says_in_a_line_what_is_wrong(arguments, input, message):
    done = run(sys.executable, ROOT / "examples/cpp/tokens.py", *arguments, input=input)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"tokens.py: {message}")
    assert done.stderr.count("\n") == 1


def test_tokens_knows_what_an_id_is():
    read_ids = runpy.run_path(str(ROOT / "examples/cpp/tokens.py"))["read_ids"]
    assert read_ids("0 575\n7", 576) == [0, 575, 7]
    for word in ("abc", "576", "1_0", "+1", "\N{FULLWIDTH DIGIT ONE}", "9" * 5000):
        with pytest.raises(InputError, match="expected 0 to 575"):
            read_ids(f"3 {word}", 576)


def test_the_program_says_when_the_cache_is_full(program, demo_file):
    prompt = [7] * 250
    done = run(program, demo_file, "--eos", "-", *prompt)
    assert done.returncode == 1
    assert len(ids(done.stdout)) == 7  # after the 250th token, and the 6 that there is room for
    assert "the KV cache is full: it holds 256 of 256 tokens" in done.stderr
    done = run(program, demo_file, *prompt, *prompt)
    assert (done.returncode, done.stdout) == (1, "")
    assert "the prompt has 500 tokens, but the file's KV cache holds 256" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.mlxfn", 1], "nothing.mlxfn: no such file"),
        ([__file__, 1], "cannot read it"),
        (["FILE"], "the prompt has no tokens"),
        (["FILE", 576], "token id 576: expected 0 to 575"),
        (["FILE", -1], "token id -1"),
        (["FILE", "one"], "token id 'one': expected a whole number"),
        (["FILE", "7" * 50], f"token id '{'7' * 40}...': expected a whole number, of 32 bits"),
        (["FILE", "--strength", "dense", 1], "--strength 'dense': expected a finite number"),
        (["FILE", "--strength", "nan", 1], "expected a finite number"),
        (["FILE", "--strength", "1e38", 1], "overflows the model's dtype"),
        (["FILE", "--positions", "some", 1], "expected all, generated or prompt"),
        (["FILE", "--max-tokens", 0, 1], "expected 1 or more"),
        (["FILE", "--strength"], "--strength needs a value"),
        (["FILE", "--steps", 1], "no option '--steps'"),
        (["FILE", "-s", 1], "no option '-s'"),
        ([], "usage: generate FILE"),
    ],
)
def test_the_program_refuses(arguments, message, program, demo_file):
    done = run(program, *[demo_file if one == "FILE" else one for one in arguments])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("generate: ")
    assert message in done.stderr


def test_help_is_a_result(program):
    for option in ("-h", "--help"):
        done = run(program, option)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("usage: generate FILE")


@pytest.mark.parametrize("where", [">/dev/full", ">&-"])
@pytest.mark.parametrize("rest", ["FILE 7", "--help"])
def test_output_that_is_lost_is_an_error(where, rest, program, demo_file):
    if where == ">/dev/full" and not Path("/dev/full").exists():
        pytest.skip("a Mac has no /dev/full")
    rest = rest.replace("FILE", str(demo_file))
    done = run("sh", "-c", f"'{program}' {rest} {where}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("generate: standard output cannot be written")


def test_the_program_warns_of_a_large_dose(program, demo_file):
    said = json.loads(mx.import_function(str(demo_file), return_metadata=True)[1])
    large = said["large_dose"] / said["dose_per_strength"]
    for strength, warns in ((0.99 * large, False), (1.01 * large, True), (-1.01 * large, True)):
        done = run(program, demo_file, "--strength", strength, "--max-tokens", 1, 7)
        assert (done.returncode, len(ids(done.stdout))) == (0, 1)
        assert ("warning: a large dose, 0.808" in done.stderr) == warns == bool(done.stderr)


def test_the_program_reads_much_space_and_a_strength_that_rounds_to_0(program, demo_file):
    options = ("--eos", "-", "--max-tokens", 3)
    plain = run(program, demo_file, "--strength", 0, *options, 7, 8)
    done = run(
        program, demo_file, "--strength", "1e-320", *options, input="7," + " \n" * 100_000 + "8"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, plain.stdout, "")
    assert len(ids(plain.stdout)) == 3


@pytest.fixture
def with_metadata(demo_file, tmp_path):
    """A function of its own, whose most likely token is the position, under changed metadata."""

    def make(**changes) -> Path:
        path = tmp_path / "small.mlxfn"
        said = json.loads(mx.import_function(str(demo_file), return_metadata=True)[1]) | changes
        cache = mx.zeros((4,))

        def function(*inputs):
            if not inputs:
                return mx.array([0], mx.uint8), cache
            tokens, position, strength, kept = inputs
            logits = mx.where(mx.arange(576) == position, 1.0 + 0 * strength, 0.0)[None]
            return logits + 0 * tokens.sum(), kept

        with mx.exporter(str(path), function, metadata=json.dumps(said)) as exporter:
            exporter()
            for count in (8, 1):
                exporter(mx.zeros((1, count), mx.int32), mx.array(0), mx.array(0.0), cache)
        return path

    return make


def test_the_program_reads_long_and_strange_texts_in_metadata(program, with_metadata):
    for name in ("a" * 200_000, 'quo"ted \\', '", "chunks": [], "x": "'):
        file = with_metadata(model=name, chunks=[8, 1])
        done = run(program, file, "--max-tokens", 2, *range(10))  # 8, 1 and the last
        assert (done.stdout, done.stderr) == ("9\n10\n", "")


@pytest.mark.parametrize(
    "changes", [{"chunks": []}, {"chunks": [8]}, {"chunks": [8, 0, 1]}, {"capacity": -1}]
)
def test_the_program_refuses_chunks_that_leave_tokens_over(changes, program, with_metadata):
    done = run(program, with_metadata(**changes), "--max-tokens", 2, 7)
    assert (done.returncode, done.stdout) == (1, "")
    assert "the file is damaged: capacity" in done.stderr


def test_cmake_takes_the_mlx_that_is_named_and_says_what_is_wrong(program, tmp_path):
    configure = ["cmake", "-S", ROOT / "examples/cpp", "-B", tmp_path / "build"]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    bare = tmp_path / "bare/bin/python"
    there = run(*configure, f"-DPython3_EXECUTABLE={sys.executable}")
    assert there.returncode == 0, there.stderr
    none = run(*configure, f"-DPython3_EXECUTABLE={bare}")
    assert none.returncode == 1
    assert f"{bare} has no mlx" in " ".join(none.stderr.split())
    wrong = run(*configure, f"-DMLX_ROOT={tmp_path}")  # not the one that it found before
    assert wrong.returncode == 1
    assert f"MLX_ROOT {tmp_path}: no MLX" in " ".join(wrong.stderr.split())


def test_the_program_refuses_files_of_others(program, demo_file, tmp_path):
    half = tmp_path / "half.mlxfn"
    half.write_bytes(demo_file.read_bytes()[:5_000_000])
    assert "cannot read it" in run(program, half, 1).stderr
    other = tmp_path / "other.mlxfn"
    mx.export_function(str(other), lambda x: x + 1, mx.array(1.0))
    done = run(program, other, 1)
    assert (done.returncode, done.stdout) == (1, "")
    assert "write one with `densesteer export-function`" in done.stderr


@pytest.mark.checkpoint
def test_the_real_checkpoint_in_c(program, real_model):
    """One file of 2.5 GB, written, read by the program, and deleted."""
    model, tokenizer = real_model
    size = model.args.hidden_size
    arrays = {
        layer: np.random.default_rng(layer).normal(size=size) / size**0.5 for layer in (8, 16)
    }
    meta = VectorMeta(model="real", hidden_size=size, layer_count=model.args.num_hidden_layers)
    vector = SteeringVector(arrays, meta)
    prompt = encode_prompt(tokenizer, "Tell me a joke.", system="Be brief.")
    steering = Steering(vector, 16.0)
    steered, plain = (
        generate(model, tokenizer, prompt, steering=one, max_tokens=6).token_ids
        for one in (steering, None)
    )
    with tempfile.TemporaryDirectory() as folder:
        made = export_function(
            model, tokenizer, steering, Path(folder) / "real.mlxfn", capacity=64, chunks=[8]
        )
        print(f"float32: {made.largest_difference:.2g} at {made.largest_logit:.3g}")
        done = run(program, made.path, "--max-tokens", 6, *prompt)
    assert ids(done.stdout) == list(steered)
    dose = 16 * made.metadata["dose_per_strength"]
    assert ("warning: a large dose" in done.stderr) == (dose >= LARGE_DOSE) == bool(done.stderr)
    assert steered != plain
