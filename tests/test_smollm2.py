"""A real model of another family, SmolLM2-135M-Instruct (Llama), through the whole loop of commands."""

import json
import os
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import checkpoint_cache, same_answer
from server_process import server_process

import mlx_densesteer as ds
from mlx_densesteer.cli import main
from mlx_densesteer.export.closeness import reference
from mlx_densesteer.model.prompt import encode_prompt

pytestmark = pytest.mark.checkpoint

QUESTION = "A bus carries 30 people. At a stop 12 get off and 7 get on. How many are on the bus?"
TEXTS = (
    "It's 1234.\n\nOK",
    "  two  spaces\tand a tab\r\n",
    "naïve café, 東京 🚌 — 12,5 % x²",
    "def f(x):\n    return x+10\n",
    "<|im_start|>user\nHi<|im_end|>",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    found = checkpoint_cache() / "SmolLM2-135M-Instruct-float32"
    if not found.is_dir():
        message = f"no SmolLM2 in {found}: run scripts/fetch-test-model --size smollm2"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return found


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    return checkpoint_cache() / "SmolLM2-135M-Instruct-Q4_1.gguf"


@pytest.fixture(scope="module")
def model(folder) -> ds.Model:
    return ds.load(folder)


@pytest.fixture(scope="module")
def densesteer(folder, model):
    """Run a command in this process, which has loaded the model once for all of them."""

    def run(*arguments, **options):
        def load(name):
            return model if str(name) == str(folder) else ds.load(name)

        with pytest.MonkeyPatch.context() as patch:
            for module in ("model.model", "distributed.loading"):
                patch.setattr(f"mlx_densesteer.{module}.load", load)
            done = CliRunner().invoke(main, [*map(str, arguments)], **options)
        assert done.exit_code == 0, done.output
        return done

    return run


@pytest.fixture(scope="module")
def vector_file(densesteer, folder, tmp_path_factory) -> Path:
    """The vector that the command extracts from a few of the demo's pairs."""
    place = tmp_path_factory.mktemp("smollm2")
    lines = Path(__file__).parents[1].joinpath("scripts/demo-pairs.jsonl").read_text("utf-8")
    (place / "pairs.jsonl").write_text("\n".join(lines.splitlines()[:6]), "utf-8")
    out = place / "dense.npz"
    densesteer("extract", "-m", folder, place / "pairs.jsonl", "-o", out)
    return out


@pytest.fixture(scope="module")
def steering(vector_file) -> ds.Steering:
    return ds.Steering(ds.SteeringVector.load(vector_file), 0.4, layers=(14,))


def test_what_it_is(model):
    info = model.info
    assert (info.layer_count, info.hidden_size, info.dtype) == (30, 576, "float32")
    assert model.network.model_type == "llama" and model.context == 8192
    assert model.baked_layers == ()


@pytest.mark.skipif(sys.platform != "linux", reason="the layout of libstdc++ is Linux's")
def test_it_computes_what_llama_cpp_computes(model, gguf_file, vector_file, steering, tmp_path):
    """The GGUF itself in llama.cpp, the weights converted from it here: tokens, logits, and what a vector moves."""
    from llama_cpp import LlamaCpp, read_control_vector

    ids = encode_prompt(model.tokenizer, QUESTION)
    ours = reference(model.network, ids, steering)
    ds.export_vector(steering.vector.select([14]), tmp_path / "v.gguf")
    with LlamaCpp(gguf_file) as theirs:
        for text in TEXTS:
            assert theirs.tokenize(text) == model.tokenizer.encode(text), text
        plain = theirs.logits(ids)
        theirs.steer(read_control_vector(tmp_path / "v.gguf", strength=0.4))
        steered = theirs.logits(ids)
    expected = np.array(ours.unsteered)
    apart = np.linalg.norm(plain - expected) / np.linalg.norm(expected)
    moved, wanted = steered - plain, np.array(ours.steered) - expected
    angle = float((moved * wanted).sum() / np.linalg.norm(moved) / np.linalg.norm(wanted))
    print(f"\nllama.cpp: {apart:.1e} apart, cosine {angle:.4f} of what the vector moves")
    # llama.cpp rounds activations to 8 bits; queries and keys in a wrong order are 1.0 apart
    assert apart < 0.08
    assert angle > 0.9


def test_a_steered_row_of_a_batch_is_that_row_alone(model, steering):
    ids = encode_prompt(model.tokenizer, QUESTION)
    steerings = (steering, None)
    rows = dict(ds.generate_batch(model, [ids, ids], steering=steerings, max_tokens=12))
    for number, one in enumerate(steerings):
        alone = ds.generate(model, ids, steering=one, max_tokens=12)
        same_answer(model, ids, rows[number], alone)
    assert rows[0].token_ids != rows[1].token_ids


def test_swept_and_recommended(densesteer, folder, vector_file, tmp_path):
    problems = tmp_path / "problems.jsonl"
    lines = [
        {"id": str(i), "question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"}
        for i in (2, 3, 4)
    ]
    problems.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    done = densesteer(
        "sweep", "-m", folder, problems, "-v", vector_file, "-l", "14", "-s", "10%,-10%",
        "-n", 32, "-o", tmp_path / "sweep",
    )  # fmt: skip
    rows = json.loads((tmp_path / "sweep" / "table.json").read_text("utf-8"))["rows"]
    assert len(rows) == 3 and {row["problems"] for row in rows} == {3}
    assert "densesteer" in done.output  # the next command


def test_baked_for_stock_mlx_lm_and_llama_cpp(densesteer, folder, vector_file, model, tmp_path):
    setting = ("-m", folder, "-v", vector_file, "-s", 0.4, "-l", 14)
    densesteer("bake", *setting, "-o", tmp_path / "baked")  # compares with stock mlx-lm
    baked = ds.load(tmp_path / "baked")
    assert baked.baked_layers == (14,) and baked.fingerprint != model.fingerprint
    densesteer("bake", "--check", *setting, "-o", tmp_path / "baked")
    densesteer("bake", *setting, "-o", tmp_path / "baked.gguf", "--format", "gguf")
    if sys.platform == "linux":
        from llama_cpp import LlamaCpp

        ids = encode_prompt(model.tokenizer, QUESTION)
        expected = np.array(baked.network(mx.array([ids]))[0].astype(mx.float32))
        with LlamaCpp(tmp_path / "baked.gguf") as theirs:
            assert theirs.tokenize(TEXTS[0]) == model.tokenizer.encode(TEXTS[0])
            assert float(np.abs(theirs.logits(ids) - expected).max()) < 0.1


def test_served_steered(folder, vector_file):
    with server_process("-m", str(folder), "-v", str(vector_file)) as server:
        url = urlsplit(server.await_url())
        texts = []
        for more in ({}, {"steering": {"strength": 0.4, "layers": [14]}}):
            connection = HTTPConnection(url.netloc, timeout=300)
            body = {
                "messages": [{"role": "user", "content": QUESTION}],
                "max_tokens": 16,
                "temperature": 0,
            }
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body | more), headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
            assert response.status == 200, answer
            texts.append(answer["choices"][0]["message"]["content"])
    assert all(texts) and texts[0] != texts[1]


def test_generated_in_a_process_of_its_own(folder, vector_file):
    done = subprocess.run(
        [sys.executable, "-m", "mlx_densesteer", "generate", "-m", folder, "-v", vector_file, "-s", "10%",
         "-l", "14", "-n", "16", "--json", "What is the capital of France?"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert "Paris" in result["text"] and result["steering"]["layers"] == [14]
