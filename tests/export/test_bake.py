"""Baked checkpoints, run by what they are for: stock mlx-lm, transformers and llama.cpp."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model as Llama
from mlx_lm.models.llama import ModelArgs

import mlx_densesteer as ds
from mlx_densesteer import demo
from mlx_densesteer.cli import main
from mlx_densesteer.errors import (
    ConversionError,
    DenseSteerError,
    ExportError,
    ModelError,
    VectorMismatchError,
)
from mlx_densesteer.export import bake as baking
from mlx_densesteer.export import llama
from mlx_densesteer.export.closeness import change, float32_share, reference
from mlx_densesteer.model.config import origin
from mlx_densesteer.model.families import empty_network
from mlx_densesteer.model.model import load_folder
from mlx_densesteer.model.prompt import encode_prompt

TEXT = "Rosa has 3 boxes with 8 shells in each.\n\nIt's 1234567, she's sure."
QUESTION = "Rosa has 3 boxes with 8 shells in each. Then Rosa sells 6. How many shells are left?"


@pytest.fixture(scope="module")
def vector():
    return ds.SteeringVector.load(demo.VECTOR)


@pytest.fixture(scope="module")
def steering(vector):
    return ds.Steering(vector, 4.76, layers=(4, 5))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Return the demo model in a precision, converted once."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def get(bits, dtype):
        if (bits, dtype) not in made:
            out = folder / f"{bits}-{dtype}"
            made[bits, dtype] = ds.convert(demo.MODEL, out, bits=bits, dtype=dtype, group_size=32)
        return made[bits, dtype]

    return get


@pytest.fixture(scope="module")
def plain(converted, steering, tmp_path_factory):
    """The demo in float32, and the folder that was baked of it."""
    out = tmp_path_factory.mktemp("baked") / "steered"
    return converted(None, "float32"), ds.bake(converted(None, "float32"), steering, out)


@pytest.fixture
def shortened(monkeypatch):
    """Return a function that lets a result be compared over 48 tokens; 4 bits in bfloat16 are slow."""
    whole = ds.Model.solutions

    def shorten():
        monkeypatch.setattr(
            ds.Model, "solutions", lambda model: [(t[:48], first) for t, first in whole(model)]
        )

    return shorten


BAKED = {  # what is baked, and as what
    "llama": ({"head_dim": 32}, "llama"),
    "llama with biases": ({"attention_bias": True, "mlp_bias": True}, "llama"),
    "mistral": ({"sliding_window": None}, "llama"),
    "smollm3": ({}, "smollm3"),
}


@pytest.fixture
def folder_of(tiny_tokenizer_files, tmp_path):
    """Return a function that writes a tiny random model of a family."""

    def write(kind, **changes):
        config = {
            "model_type": kind, "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 96,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 512, "rope_theta": 1e4, "torch_dtype": "float32",
            "tie_word_embeddings": False, "head_dim": 16,
        }  # fmt: skip
        config |= changes
        folder = shutil.copytree(tiny_tokenizer_files, tmp_path / "source", dirs_exist_ok=True)
        network = empty_network(config, kind)
        mx.random.seed(1)
        weights = {
            name: 0.2 * mx.random.normal(array.shape) + 1.0 * name.endswith("norm.weight")
            for name, array in tree_flatten(network.parameters())
        }
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.mark.parametrize("name", BAKED)
def test_other_families_are_baked(folder_of, make_vector, tmp_path, name):
    changes, expected = BAKED[name]
    folder = folder_of(name.partition(" ")[0], **changes)
    steering = ds.Steering(make_vector(), 0.7, layers=(1, 2))
    out = tmp_path / "steered"
    found = ds.bake(folder, steering, out)  # compares every tensor and the logits with stock mlx-lm
    assert found.closeness.floor == 0
    assert json.loads((out / "config.json").read_text())["model_type"] == expected
    baked, source = ds.load(out), ds.load(folder)
    tokens = mx.array([list(range(40))])
    wanted = source.network(tokens, ds.make_cache(source, steering))
    assert float(mx.abs(baked.network(tokens) - wanted).max()) < 1e-4 * float(mx.abs(wanted).max())
    assert baked.fingerprint != source.fingerprint
    assert baked.baked_layers == (1, 2)
    assert baking.check(out, folder, steering).difference < 1e-3


def test_a_smollm3_is_not_written_to_gguf(folder_of, make_vector, tmp_path):
    steering = ds.Steering(make_vector(), 0.7, layers=(1,))
    with pytest.raises(ExportError, match="smollm3 model cannot be written to GGUF"):
        ds.bake(folder_of("smollm3"), steering, tmp_path / "x.gguf", format="gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_a_family_without_biases_is_not_baked(folder_of, make_vector, tmp_path):
    steering = ds.Steering(make_vector(), 0.7, layers=(1,))
    with pytest.raises(ExportError, match="a qwen3 model has no place for a vector.*vector export"):
        ds.bake(folder_of("qwen3"), steering, tmp_path / "steered")


def test_a_baked_folder_runs_as_stock_mlx_lm_runs_it(
    converted, steering, tmp_path, capsys, shortened
):
    """Bit for bit, quantised too; and it is another model than the one that it was made from."""
    for bits in (None, 8):
        source, out = converted(bits, "float32"), tmp_path / f"baked-{bits}"
        shortened()
        ds.bake(source, steering, out)
        model, tokens = ds.load(out), mx.array([ds.load(source).solutions()[0][0]])
        assert "has its steering baked in (layer 4-5)" in capsys.readouterr().err
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            stock = mlx_lm.load(out.name)[0]
        assert isinstance(stock, Llama)
        assert mx.array_equal(model.network(tokens), stock(tokens))
        assert model.baked_layers == (4, 5) and model.name == out.name
        original = ds.load(source)
        assert original.baked_layers == () and original.fingerprint != model.fingerprint
        warning = model.other_weights(steering.vector)
        assert "is added to the steering that is baked into" in warning
        with pytest.raises(VectorMismatchError, match="is added to the steering"):
            model.other_weights(steering.vector, strict=True)
    with pytest.raises(ExportError, match="has its steering baked in"):
        ds.bake(out, steering, tmp_path / "twice")
    with pytest.raises(ConversionError, match="has its steering baked in"):
        ds.convert(out, tmp_path / "converted")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"mlp_bias": False}))
    with pytest.raises(ModelError, match="Received 18 parameters not in model"):
        ds.load(out)


@pytest.mark.parametrize("format", ["mlx", "hf"])
@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        (None, "float32"),
        (8, "float32"),
        (4, "float32"),
        # 0 without the vector, if a product is the same bits with a bias of zeros
        pytest.param(None, "float16", marks=[pytest.mark.slow, pytest.mark.same_bits]),
        pytest.param(4, "bfloat16", marks=[pytest.mark.slow, pytest.mark.same_bits]),
    ],
)
def test_equal_to_run_time_steering(converted, steering, shortened, tmp_path, bits, dtype, format):
    if slow := (bits, dtype) == (4, "bfloat16"):
        shortened()
    baked = ds.bake(converted(bits, dtype), steering, tmp_path / "steered", format=format)
    found = baked.closeness
    print(f"\n{bits or 'no'} bits, {dtype}, {format}: {found}")
    assert found.moved > 5 and found.tokens > (40 if slow else 100)
    if dtype == "float32":
        assert found.difference <= float32_share() * found.largest
        assert found.same == found.tokens
    if format == "mlx":  # nothing but the vector was rounded
        assert found.floor == 0
        assert found.difference <= 0.1 * found.moved
    config = json.loads((tmp_path / "steered/config.json").read_text())
    assert ("quantization" in config) == (bits is not None and format == "mlx")


def test_only_biases_were_added(plain, steering):
    source, baked = plain
    before = mx.load(str(source / "model.safetensors"))
    after = mx.load(str(baked.path / "model.safetensors"))
    for name, array in before.items():
        assert mx.array_equal(after.pop(name), array)
    assert all(name.endswith(".bias") for name in after)
    for name, array in after.items():
        layer = int(name.split(".")[2])
        delta = steering.delta(layer) if name.endswith("down_proj.bias") else None
        expected = np.zeros(array.shape, np.float32) if delta is None else delta
        assert np.array_equal(np.array(array), expected), name


@pytest.mark.parametrize("format", ["mlx", "hf", "gguf"])
def test_the_templates_end_of_turn_goes_along(plain, steering, tmp_path, format):
    """Of a base model, whose files name another end: stock programs end an answer there too."""
    import gguf

    source = shutil.copytree(plain[0], tmp_path / "base")
    tokenizer = ds.load(source).tokenizer
    (turn,), (other,) = tokenizer.eos_token_ids, tokenizer.encode("<|endoftext|>")
    for name, key, value in (
        ("config.json", "eos_token_id", other),
        ("generation_config.json", "eos_token_id", [other]),
        ("tokenizer_config.json", "eos_token", "<|endoftext|>"),
    ):
        document = json.loads((source / name).read_text()) if (source / name).exists() else {}
        (source / name).write_text(json.dumps({"top_k": 20} | document | {key: value}))
    out = tmp_path / ("baked.gguf" if format == "gguf" else "baked")
    ds.bake(source, steering, out, format=format)
    baking.check(out, source, steering)
    if format == "gguf":
        reader = gguf.GGUFReader(out)
        ends = [reader.get_field(f"tokenizer.ggml.{k}_token_id").contents() for k in ("eos", "eot")]
        assert ends == [other, turn]
        return
    assert mlx_lm.load(str(out))[1].eos_token_ids == {other, turn}
    written = [
        json.loads((out / f"{name}.json").read_text()) for name in ("config", "generation_config")
    ]
    assert [one["eos_token_id"] for one in written] == [sorted((other, turn))] * 2
    assert written[1]["top_k"] == 20
    (out / "generation_config.json").write_bytes((source / "generation_config.json").read_bytes())
    with pytest.raises(ExportError, match=r"generation_config\.json is another"):
        baking.check(out, source, steering)


# What `LlamaConfiguration` and `BaseConfiguration` of mlx-swift-lm decode, read in its source in November 2026.
# Where a key is absent they have defaults of their own, which are not Qwen2's.
SWIFT = {
    "model_type": str, "hidden_size": int, "num_hidden_layers": int, "intermediate_size": int,
    "num_attention_heads": int, "num_key_value_heads": int, "head_dim": int, "vocab_size": int,
    "max_position_embeddings": int, "rms_norm_eps": float, "rope_theta": float,
    "tie_word_embeddings": bool, "attention_bias": bool, "mlp_bias": bool,
}  # fmt: skip


@pytest.mark.parametrize("bits", [None, 4])
def test_a_folder_is_a_llama_of_mlx_swift_lm(converted, steering, tmp_path, bits):
    source = shutil.copytree(converted(bits, "float32"), tmp_path / "source")
    given = json.loads((source / "config.json").read_text())
    given["rope_parameters"] = {"rope_type": "default", "rope_theta": given.pop("rope_theta") * 2}
    if bits is None:  # an output matrix that is a copy of the embedding
        (source / "model.safetensors.index.json").unlink()
        arrays = mx.load(str(source / "model.safetensors"))
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
        mx.save_safetensors(str(source / "model.safetensors"), arrays)
    (source / "config.json").write_text(json.dumps(given))
    ds.bake(source, steering, tmp_path / "baked")
    config = json.loads((tmp_path / "baked/config.json").read_text())
    assert {key: type(config.get(key)) for key in SWIFT} == SWIFT
    wanted = {"model_type": "llama", "rope_theta": 20000.0, "rope_scaling": None, "head_dim": 64}
    wanted |= dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), True)
    assert wanted.items() <= config.items() and "rope_traditional" not in config
    assert type(config["eos_token_id"]) in (int, list) and "text_config" not in config
    sizes = config.get("quantization", {})
    assert (sizes.get("bits"), sizes.get("group_size")) == (bits, 32 if bits else None)
    assert {type(sizes[key]) for key in sizes} <= {
        int,
        str,
    }  # other layers' settings would be objects
    stock = Llama(ModelArgs.from_dict(config)).parameters()
    names = mx.load(str(tmp_path / "baked/model.safetensors"))
    names = {name for name in names if not name.endswith((".scales", ".biases"))}
    assert names == {name for name, _ in tree_flatten(stock)}  # it wants every one, and no other


@pytest.mark.slow
def test_stock_mlx_lm_writes_the_text_that_steering_gives(plain, steering):
    source, baked = plain
    done = subprocess.run(
        [sys.executable, "-m", "mlx_lm", "generate", "--model", baked.path, "--prompt", QUESTION,
         "--max-tokens", "60"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = done.stdout.split("==========")[1].strip()
    model = ds.load(source)
    ours = ds.generate(model, QUESTION, steering=steering, max_tokens=60, brake=None)
    other = ds.generate(model, QUESTION, max_tokens=60, brake=None)
    assert text == ours.text.strip() != other.text.strip()


@pytest.fixture(scope="module")
def stock_transformers(tmp_path_factory):
    """Return a function that runs a folder in stock transformers; one process for all of them."""
    python = ROOT / ".venv-torch/bin/python"
    if not python.exists():
        message = "no .venv-torch: make it with scripts/make-torch-env"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    script = Path(__file__).parents[1].joinpath("stock_transformers.py")
    log = tmp_path_factory.mktemp("transformers") / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [python, "-I", script], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=stderr,
            env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"} | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def run(folder, tokens, prompt, out, count):
        np.savez(out / "in.npz", tokens=tokens, prompt=prompt, text=TEXT)
        said = log.stat().st_size
        job = [*map(str, (folder, out / "in.npz", out / "out.npz")), count]
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        done = process.stdout.readline()
        stderr = log.read_bytes()[said:].decode()
        assert done == "done\n", stderr
        assert "newly initialized" not in stderr and "not used" not in stderr, stderr
        with np.load(out / "out.npz") as arrays:
            return dict(arrays)

    with process:
        yield run
        process.stdin.close()


def greedy(network, tokens, steering, count):
    cache, made, batch = ds.make_cache(network, steering), [], list(tokens)
    for _ in range(count):
        batch = [int(network(mx.array([batch]), cache)[0, -1].argmax())]
        made += batch
    return made


@pytest.mark.slow
def test_stock_transformers_runs_it(plain, steering, stock_transformers, tmp_path):
    source, _ = plain
    model = load_folder(source)
    tokens, first = model.solutions()[0]
    baked = ds.bake(source, steering, tmp_path / "hf", format="hf")
    found = stock_transformers(baked.path, tokens, first, tmp_path, 24)
    expected = np.array(reference(model.network, tokens, steering).steered)
    difference = float(np.abs(found["logits"] - expected).max())
    print(
        f"\ntransformers: largest difference {difference:.1e} at logits up to {expected.max():.1f}"
    )
    assert difference < 1e-4
    assert found["greedy"].tolist() == greedy(model.network, tokens[:first], steering, 24)
    assert found["encoded"].tolist() == model.tokenizer.encode(TEXT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scaling", [{}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}]
)
def test_a_model_that_transformers_5_saved(plain, steering, stock_transformers, tmp_path, scaling):
    """Its rotary embedding is in rope_parameters alone: run, converted and baked, it keeps it."""
    source = shutil.copytree(plain[0], tmp_path / "source")
    weights = mx.load(str(source / "model.safetensors"))
    mx.save_safetensors(str(source / "model.safetensors"), weights, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    theta = config.pop("rope_theta")
    config.pop("rope_scaling", None)
    config["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"} | scaling
    (source / "config.json").write_text(json.dumps(config))

    model = ds.load(source)
    tokens, first = model.solutions()[0]
    run = mx.array([tokens])
    expected = np.array(model.network(run)[0])
    theirs = stock_transformers(source, tokens, first, tmp_path, 4)["logits"]
    assert np.abs(theirs - expected).max() < 5e-3
    assert np.abs(np.array(mlx_lm.load(str(source))[0](run)[0]) - expected).max() > 1
    written = ds.convert(source, tmp_path / "converted", bits=None, dtype="float32")
    assert np.array_equal(np.array(mlx_lm.load(str(written))[0](run)[0]), expected)
    baked = ds.bake(source, steering, tmp_path / "baked", format="hf")
    theirs = stock_transformers(baked.path, tokens, first, tmp_path, 4)["logits"]
    assert (
        np.abs(theirs - np.array(reference(model.network, tokens, steering).steered)).max() < 5e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llama_cpp_runs_the_gguf(converted, steering, tmp_path, dtype):
    from llama_cpp import LlamaCpp

    source = converted(None, dtype)
    model = load_folder(source)
    tokens, first = model.solutions()[0]
    expected = reference(model.network, tokens, steering)
    differences = []
    for strength, wanted in ((4.76, expected.steered), (0.0, expected.unsteered)):
        file = tmp_path / f"{strength}.gguf"
        setting = ds.Steering(steering.vector, strength, (4, 5))
        ds.bake(source, setting, file, format="gguf")
        assert baking.check(file, source, setting) is None
        with LlamaCpp(file) as theirs:
            assert theirs.tokenize(TEXT) == model.tokenizer.encode(TEXT)
            found = theirs.logits(tokens)
            if dtype == "float32" and strength:
                prompt = tokens[:first]
                assert theirs.greedy(prompt, 24) == greedy(model.network, prompt, steering, 24)
        differences.append(float(np.abs(found - np.array(wanted)).max()))
    moved = float(mx.abs(expected.steered - expected.unsteered).max())
    print(
        f"\nllama.cpp, {dtype}: largest difference {differences[0]:.1e} steered, {differences[1]:.1e} "
        f"unsteered; the steering moves {moved:.1f}"
    )
    assert differences[0] < (0.05 if dtype == "float32" else 0.5)


def test_check_finds_what_is_not_the_source(plain, steering, vector, tmp_path):
    source, baked = plain
    assert baking.check(baked.path, source, steering).difference < 1e-3
    with pytest.raises(ExportError, match=r"layers.5.mlp.down_proj.bias is another"):
        baking.check(baked.path, source, ds.Steering(vector, 4.0, layers=(4, 5)))
    with pytest.raises(ExportError, match=r"layers.3.mlp.down_proj.bias is another"):
        baking.check(baked.path, source, ds.Steering(vector, 4.76, layers=(3, 4, 5)))
    broken = tmp_path / "broken"
    shutil.copytree(baked.path, broken)
    arrays = mx.load(str(broken / "model.safetensors"))
    arrays["model.layers.2.self_attn.q_proj.weight"] += 1e-3
    arrays["model.layers.9.self_attn.q_proj.weight"] = mx.zeros(3)
    del arrays["model.layers.0.mlp.up_proj.bias"]
    mx.eval(arrays)
    (broken / "model.safetensors").unlink()
    mx.save_safetensors(str(broken / "model.safetensors"), arrays)
    config = json.loads((broken / "config.json").read_text()) | {"rope_theta": 1e6}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError) as caught:
        baking.check(broken, source, steering)
    for part in ("rope_theta 1000000.0, expected 10000.0", "layers.2.self_attn.q_proj.weight is another",
                 "layers.9.self_attn.q_proj.weight was not expected",
                 "layers.0.mlp.up_proj.bias is missing"):  # fmt: skip
        assert part in str(caught.value)
    with pytest.raises(ExportError, match="expected a checkpoint that `densesteer bake` wrote"):
        baking.check(source, source, steering)
    with pytest.raises(ExportError, match="no such file or folder"):
        baking.check(tmp_path / "nothing", source, steering)

    def damaged(name, content):
        shutil.rmtree(broken)
        shutil.copytree(baked.path, broken)
        if content is None:
            (broken / name).unlink()
        else:
            (broken / name).write_bytes(content)
        with pytest.raises(DenseSteerError) as caught:
            baking.check(broken, source, steering)
        assert name in str(caught.value)

    damaged("config.json", b"{")
    damaged("densesteer.json", b"{")
    damaged("tokenizer.json", None)
    damaged("tokenizer.json", (source / "tokenizer.json").read_bytes().replace(b"Tom", b"Xom"))
    damaged("model.safetensors", (baked.path / "model.safetensors").read_bytes()[:3_000_000])


def test_what_cannot_be_baked_is_refused(plain, steering, vector, tmp_path):
    source, baked = plain
    with pytest.raises(ExportError, match="positions 'generated' cannot be baked"):
        ds.bake(source, ds.Steering(vector, 1.0, (4,), "generated"), tmp_path / "x")
    with pytest.raises(ExportError, match="positions 'steps' cannot be baked"):
        ds.bake(source, ds.Steering(vector, 1.0, (4,), "steps"), tmp_path / "x")
    with pytest.raises(ExportError, match="exists already"):
        ds.bake(source, steering, baked.path)
    with pytest.raises(ExportError, match="is no model that densesteer wrote"):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/thesis.txt").write_text("years of work")
        ds.bake(source, steering, tmp_path / "mine", force=True)
    with pytest.raises(ExportError, match="is no file that densesteer baked"):
        (tmp_path / "mine.gguf").write_bytes(b"GGUF is not all that is here")
        ds.bake(source, steering, tmp_path / "mine.gguf", format="gguf", force=True)
    for name, format in (("x.gguf", "mlx"), ("x", "gguf")):
        with pytest.raises(ExportError, match=r"ends in \.gguf"):
            ds.bake(source, steering, tmp_path / name, format=format)
    shutil.copytree(baked.path, tmp_path / "mine too")
    (tmp_path / "mine too/notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"holds notes\.txt"):
        ds.bake(source, steering, tmp_path / "mine too", force=True)
    shutil.rmtree(tmp_path / "mine too")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "mine.gguf"]


@pytest.mark.parametrize(
    ("bits", "dtype", "factor", "format"),
    [
        (None, "float32", 1.001, "mlx"),
        (None, "bfloat16", 0.5, "mlx"),
        pytest.param(None, "bfloat16", 0.0, "mlx", marks=pytest.mark.slow),
        pytest.param(4, "bfloat16", -1.0, "hf", marks=pytest.mark.slow),
    ],
)
def test_a_result_that_is_not_run_time_steering_is_thrown_away(
    converted, vector, shortened, tmp_path, monkeypatch, bits, dtype, factor, format
):
    """With a vector that went wrong on its way into the file, also where 16 bits are coarse."""
    if bits == 4:
        shortened()
    steering = ds.Steering(vector, 1.0, layers=(4, 5))
    right = ds.bake(converted(bits, dtype), steering, tmp_path / "right", format=format)
    print(f"\n{bits or 'no'} bits, {dtype}, {format}: slope {right.closeness.change.slope:.3f}")
    monkeypatch.setattr(llama, "_with_delta", times(factor))
    with pytest.raises(ExportError, match="so it was thrown away"):
        ds.bake(converted(bits, dtype), steering, tmp_path / "steered", format=format)
    assert [p.name for p in tmp_path.iterdir()] == ["right"]


def times(factor):
    """``_with_delta`` with a vector that is ``factor`` times as long."""
    real = llama._with_delta
    return lambda bias, matrix, deltas, dtype: real(
        bias, matrix, {layer: factor * v for layer, v in deltas.items()}, dtype
    )


def a_layer_below():
    real = llama._with_delta
    return lambda bias, matrix, deltas, dtype: real(
        bias, matrix, {layer - 1: v for layer, v in deltas.items()}, dtype
    )


@pytest.mark.parametrize(("strength", "longer"), [(0.05, 1.1), (0.5, 1.01), (4.76, 1.01)])
def test_under_tf32_what_is_right_is_kept_and_nothing_else(
    plain, vector, strength, longer, tmp_path, monkeypatch, metal_like
):
    """A vector that is too long, or at the wrong layer: in what is written, or in the file.

    At a dose of 0.2 % (0.05) rounding hides 1 %.
    """
    metal_like.use("tf32")
    source, steering = plain[0], ds.Steering(vector, strength, layers=(4,))
    right = ds.bake(source, steering, tmp_path / "right")
    assert right.closeness.difference > 1e-5 * right.closeness.largest  # as without TF32
    for wrong in (times(longer), a_layer_below()):
        with monkeypatch.context() as patch:
            patch.setattr(llama, "_with_delta", wrong)
            with pytest.raises(ExportError, match="so it was thrown away"):
                ds.bake(source, steering, tmp_path / "wrong")
            with pytest.raises(ExportError, match="down_proj.bias is another"):
                baking.check(right.path, source, steering)
    assert baking.check(right.path, source, steering).largest


@pytest.mark.slow
@pytest.mark.checkpoint
def test_under_tf32_a_small_dose_of_a_deep_model_is_kept(
    checkpoint, real_model, make_vector, tmp_path, metal_like
):
    """24 blocks round so much that the change which is expected is a tenth rounding."""
    metal_like.use("tf32")
    shape = {"hidden": real_model.hidden_size, "layer_count": real_model.layer_count}
    steering = ds.resolve(real_model, make_vector([12], **shape), "0.2%")
    found = ds.bake(checkpoint, steering, tmp_path / "baked").closeness
    (tmp_path / "baked" / "model.safetensors").unlink()  # 2 GB
    assert found.change.slope < 0.97 < found.change.length < 1.03


def test_changes_are_compared_as_a_whole():
    rng = np.random.default_rng(0)
    expected = rng.normal(size=(50, 200))
    noise = [0.3 * rng.normal(size=expected.shape) for _ in range(2)]
    found, wanted = (mx.array(expected + one) for one in noise)
    same = change(found, wanted)
    assert same.is_right() and same.slope < 0.95  # the noise of what is expected dilutes it
    assert not change(1.1 * found, wanted).is_right()
    assert not change(-found, wanted).is_right()
    assert not change(mx.array(rng.normal(size=expected.shape)), wanted).is_right()
    assert not change(mx.zeros(expected.shape), wanted).is_right()
    assert not change(wanted, mx.zeros(expected.shape)).is_right()
    assert change(mx.zeros(expected.shape), mx.zeros(expected.shape)).is_right()
    assert not change(1.01 * wanted, wanted).is_right()


def test_another_quantisation_is_undone_in_the_models_dtype(converted, steering, tmp_path):
    """mlx dequantises mxfp4 to bfloat16 unless it is told."""
    source = tmp_path / "mxfp4"
    mlx_lm.convert(str(converted(None, "float16")), str(source), quantize=True, q_mode="mxfp4",
                   q_group_size=32, q_bits=4, dtype="float16")  # fmt: skip
    baked = ds.bake(source, steering, tmp_path / "hf", format="hf")
    arrays = mx.load(str(tmp_path / "hf/model.safetensors"))
    assert {array.dtype for array in arrays.values()} == {mx.float16}
    assert baked.quantization == "undone (mxfp4, 4-bit, group 32)"


def test_several_weight_files(tmp_path, steering, converted):
    """Sharded as large models are: the biases of a layer go where its down_proj is."""
    source, out = tmp_path / "sharded", tmp_path / "steered"
    shutil.copytree(converted(None, "float32"), source)
    arrays = mx.load(str(source / "model.safetensors"))
    names = sorted(arrays)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = source / f"model-{number:05d}-of-00002.safetensors"
        mx.save_safetensors(str(file), {k: arrays[k] for k in part})
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").unlink()  # names the one file
    assert ds.bake(source, steering, out, format="hf").closeness.difference < 1e-3
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(index) == len(names) + 6 * 4
    for name, file in index.items():
        assert name in mx.load(str(out / file))


def test_the_command_line_and_the_card(plain, tmp_path, monkeypatch):
    source = plain[0]
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return CliRunner().invoke(main, ["bake", "-m", str(source), "-v", "demo", *arguments])

    done = run("-l", "5", "-s", "30%", "-o", "steered")
    assert (done.exit_code, done.stdout) == (0, "steered\n"), done.output
    assert "30% of the residual stream" in done.stderr and "largest difference" in done.stderr
    card = Path("steered/README.md").read_text()
    record = json.loads(Path("steered/densesteer.json").read_text())
    assert re.search(r"layer 5, 30% of the residual\sstream \(strength 7\.1\d+\)", card)
    assert record["baked"]["dose"] == pytest.approx(0.3)
    assert record["baked"]["layers"] == [5] and record["source"] == origin(source)
    assert record["baked"]["vector_sha256"] in card and record["checked"]["same_argmax"] > 100
    done = run("--check", "-o", "steered")  # strength and layer are those that it records
    assert (done.exit_code, done.stdout) == (0, "steered\n"), done.output
    assert "every tensor is what it should be" in done.stderr
    assert run("-s", "1", "--check", "-o", "steered").exit_code == 1
    assert run("--force", "--check", "-o", "steered").exit_code == 2
    assert "exists already" in run("-o", "steered").output
    done = run("-o", "steered", "--force")  # the vector's default
    assert done.exit_code == 0 and ", 20% of the residual stream" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["steered"]


@pytest.mark.slow
def test_a_model_of_the_hub(hf_folder, make_vector, tmp_path):
    """By its id: the card and the record name it, not the folder of the cache."""
    from hub_server import HubServer

    make_vector([2]).save(tmp_path / "v.npz")
    with HubServer({"Org/Tiny-Qwen2": hf_folder}) as hub:
        done = subprocess.run(
            [sys.executable, "-m", "mlx_densesteer", "bake", "-m", "Org/Tiny-Qwen2", "-v", "v.npz",
             "-o", "steered"],
            cwd=tmp_path, capture_output=True, text=True, timeout=120,
            env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*",
                              "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                              "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "steered\n"), done.stderr
    assert (
        json.loads((tmp_path / "steered/densesteer.json").read_text())["source"] == "Org/Tiny-Qwen2"
    )
    assert "base_model: Org/Tiny-Qwen2\n" in (tmp_path / "steered/README.md").read_text()


@pytest.mark.checkpoint
@pytest.mark.usefixtures("unsynced")
def test_the_real_checkpoint_in_stock_programs(
    checkpoint, real_model, stock_transformers, tmp_path, monkeypatch
):
    """Qwen2.5 0.5B in float32: stock mlx-lm and stock transformers against run-time steering."""
    network, tokenizer = real_model
    rng = np.random.default_rng(0)
    vector = ds.SteeringVector(
        {16: rng.normal(size=896)}, ds.VectorMeta(model="random", hidden_size=896, layer_count=24)
    )
    steering = ds.Steering(vector, 0.5, (16,))
    prompt = encode_prompt(tokenizer, QUESTION)
    tokens, first = [*prompt, *tokenizer.encode("18. 6*3=18")], len(prompt)
    monkeypatch.setattr(ds.Model, "solutions", lambda model: [(tokens, first)])  # long ones
    baked = ds.bake(checkpoint, steering, tmp_path / "steered", format="hf")
    expected = np.array(network(mx.array([tokens]), ds.make_cache(network, steering))[0])
    theirs = stock_transformers(baked.path, tokens, first, tmp_path, 6)
    difference = float(np.abs(theirs["logits"] - expected).max())
    found = baked.closeness  # of mlx-lm, run when it was baked
    print(f"\nmlx-lm: {found}\ntransformers: largest difference {difference:.1e}")
    (baked.path / "model.safetensors").unlink()  # 2.5 GB
    assert found.difference <= 1e-5 * found.largest and found.moved > 1 and found.floor == 0
    assert found.tokens == len(tokens)
    assert difference < 1e-3
    assert theirs["greedy"].tolist() == greedy(network, prompt, steering, 6)
    assert theirs["encoded"].tolist() == tokenizer.encode(TEXT)
