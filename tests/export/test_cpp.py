"""``examples/cpp``: the C++ program that runs a function file, and the script beside it."""

import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import ROOT, at_every_layer

from mlx_densesteer import Steering, generate
from mlx_densesteer.demo.problems import held_out
from mlx_densesteer.errors import InputError
from mlx_densesteer.export.function import export_function
from mlx_densesteer.model.prompt import encode_prompt
from mlx_densesteer.steering.request import request
from mlx_densesteer.steering.steering import LARGE_DOSE
from mlx_densesteer.steering.vector import SteeringVector, VectorMeta

pytestmark = pytest.mark.slow

DEMO_VECTOR = SteeringVector.load("demo")
LAYER = request(DEMO_VECTOR).layers[0]


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
def demo_file(demo_model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("function") / "demo.mlxfn"
    return export_function(
        demo_model, Steering(DEMO_VECTOR, 4.0, (LAYER,)), path, capacity=256
    ).path


@pytest.fixture(scope="session")
def question(demo_model) -> list[int]:
    return encode_prompt(demo_model.tokenizer, held_out(1)[0].question)


def run(program, *arguments, input=""):
    words = [str(program), *map(str, arguments)]
    return subprocess.run(words, input=input, capture_output=True, text=True, timeout=120)


def ids(text: str) -> list[int]:
    return [int(line) for line in text.splitlines()]


@pytest.mark.parametrize("positions", ["all", "generated", "prompt", "first:3"])
@pytest.mark.parametrize("strength", [-6.0, 0.0, 4.0])
def test_the_program_writes_what_python_writes(
    strength, positions, program, demo_file, demo_model, question
):
    steering = Steering(DEMO_VECTOR, strength, (LAYER,), positions)
    expected = generate(demo_model, question, steering=steering, max_tokens=60).token_ids
    options = ("--strength", strength, "--positions", positions, "--max-tokens", 60)
    done = run(program, demo_file, *options, input=" ".join(map(str, question)))
    assert (ids(done.stdout), done.stderr) == (list(expected), "")
    assert done.returncode == 0


def test_the_program_uses_what_the_file_names(program, demo_file, demo_model, question):
    steering = Steering(DEMO_VECTOR, 4.0, (LAYER,))
    whole = generate(demo_model, question, steering=steering).token_ids
    done = run(program, demo_file, *question)  # the default strength; stops at the end of turn
    assert ids(done.stdout) == list(whole)
    stop = run(program, demo_file, "--eos", whole[3], *question)
    assert ids(stop.stdout) == list(whole[: whole.index(whole[3])])
    on = run(program, demo_file, "--eos", "-", "--max-tokens", len(whole) + 2, *question)
    assert ids(on.stdout)[: len(whole) + 1] == [*whole, *demo_model.tokenizer.eos_token_ids]


def test_text_goes_in_and_comes_out(program, demo_file, demo_model):
    """The three commands of examples/cpp/README.md."""
    text, script = held_out(1)[0].question, ROOT / "examples/cpp/tokens.py"
    encoded = run(sys.executable, script, "encode", "demo", text)
    answer = run(program, demo_file, "--strength", 0, input=encoded.stdout)
    decoded = run(sys.executable, script, "decode", "demo", input=answer.stdout)
    assert decoded.stdout == generate(demo_model, text).text + "\n"


@pytest.mark.parametrize(
    ("arguments", "input", "message"),
    [
        (["encode", "demo", " "], "", "the prompt is empty"),
        (["decode", "/nope"], "", "/nope: no such folder"),
        (["decode", "demo"], "3 -5", "token id '-5': expected 0 to 575"),
    ],
)
def test_tokens_says_in_a_line_what_is_wrong(arguments, input, message, monkeypatch, capsys):
    """In this process, which has mlx already."""
    monkeypatch.setattr(sys, "argv", ["tokens.py", *arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input.encode())))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "examples/cpp/tokens.py"), run_name="__main__")
    assert end.value.code.startswith(f"tokens.py: {message}") and "\n" not in end.value.code
    assert capsys.readouterr().out == ""


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
        (["FILE", "--positions", "some", 1], "expected all, generated, prompt or first:N"),
        (["FILE", "--positions", "first:0", 1], "positions 'first:0': expected all"),
        (["FILE", "--positions", "first:", 1], "first: '': expected a whole number"),
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
        assert ("warning: a large dose, 80.8% of" in done.stderr) == warns == bool(done.stderr)


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
    assert "Write one with `densesteer export-function`" in done.stderr


@pytest.mark.checkpoint
@pytest.mark.usefixtures("unsynced")
def test_the_real_checkpoint_in_c(program, real_model):
    """One file of 2.5 GB, written, read by the program, and deleted."""
    size = real_model.hidden_size
    arrays = {
        layer: np.random.default_rng(layer).normal(size=size) / size**0.5 for layer in (8, 16)
    }
    meta = VectorMeta(model="real", hidden_size=size, layer_count=real_model.layer_count)
    vector = SteeringVector(arrays, meta)
    prompt = encode_prompt(real_model.tokenizer, "Tell me a joke.", system="Be brief.")
    steering = at_every_layer(vector, 16.0)
    steered, plain = (
        generate(real_model, prompt, steering=one, max_tokens=6).token_ids
        for one in (steering, None)
    )
    with tempfile.TemporaryDirectory() as folder:
        made = export_function(
            real_model, steering, Path(folder) / "real.mlxfn", capacity=64, chunks=[8]
        )
        print(f"float32: {made.largest_difference:.2g} at {made.largest_logit:.3g}")
        done = run(program, made.path, "--max-tokens", 6, *prompt)
    assert ids(done.stdout) == list(steered)
    dose = 16 * made.metadata["dose_per_strength"]
    assert ("warning: a large dose" in done.stderr) == (dose >= LARGE_DOSE) == bool(done.stderr)
    assert steered != plain
