"""Model folders: which weight files are the model, what is missing or damaged, and what is no model."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_densesteer.errors import ConversionError, ModelError, UnsupportedModelError
from mlx_densesteer.export.bake import bake
from mlx_densesteer.model import weights
from mlx_densesteer.model.convert import convert
from mlx_densesteer.model.model import load
from mlx_densesteer.model.weights import INDEX, weight_files
from mlx_densesteer.steering.steering import Steering

TOKENS = mx.arange(20)[None]


@pytest.fixture
def folder(hf_folder, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(hf_folder, tmp_path / "Tiny-Qwen2")


@pytest.fixture(scope="module")
def arrays(hf_folder):
    return mx.load(str(hf_folder / "model.safetensors"))


@pytest.fixture(scope="module")
def expected(hf_folder):
    return logits(hf_folder)


def logits(folder):
    return np.array(load(folder).network(TOKENS).astype(mx.float32))


def save(file, arrays):
    mx.save_safetensors(str(file), arrays, metadata={"format": "pt"})


def other(arrays):
    """The weights of another model of the same shape."""
    return {name: array + 1 for name, array in arrays.items()}


def shard(folder, arrays, *, index=True, count=2):
    """Write the weights as shards instead."""
    (folder / "model.safetensors").unlink()
    places = {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {key: arrays[key] for key in sorted(arrays)[number::count]}
        save(folder / name, part)
        places |= dict.fromkeys(part, name)
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


@pytest.mark.parametrize("index", [True, False])
def test_shards(folder, arrays, expected, index):
    shard(folder, arrays, index=index)
    assert np.array_equal(logits(folder), expected)


@pytest.mark.parametrize(
    "stray",
    [
        "model.safetensors",
        "model-00001-of-00003.safetensors",
        "model_backup.safetensors",
        "modelX.safetensors",
    ],
)
def test_beside_an_index_other_files_are_no_part_of_the_model(
    folder, arrays, expected, stray, tmp_path
):
    shard(folder, arrays)
    save(folder / stray, other(arrays))
    assert np.array_equal(logits(folder), expected)
    made = convert(folder, tmp_path / "out", bits=None)
    assert np.array_equal(logits(made), expected)


@pytest.mark.parametrize(
    "stray", ["model_backup.safetensors", "model copy.safetensors", "model.old.safetensors"]
)
def test_a_backup_is_no_part_of_the_model(folder, arrays, expected, stray):
    save(folder / stray, other(arrays))
    assert np.array_equal(logits(folder), expected)
    (folder / stray).write_bytes(b"not even a weight file")
    assert np.array_equal(logits(folder), expected)


@pytest.mark.parametrize("stray", ["model-00001-of-00001.safetensors", "model-00000.safetensors"])
def test_without_an_index_files_that_hold_the_same_tensor_are_refused(
    folder, arrays, stray, tmp_path
):
    save(folder / stray, {"model.norm.weight": arrays["model.norm.weight"]})
    for action in (lambda: load(folder), lambda: convert(folder, tmp_path / "out")):
        with pytest.raises(
            ModelError, match=rf"{stray} and model.safetensors both hold model.norm.weight"
        ):
            action()


def test_indexed_shards_that_hold_the_same_tensor_are_refused(folder, arrays):
    first, second = sorted(set(shard(folder, arrays).values()))
    save(folder / second, arrays)
    with pytest.raises(ModelError, match=f"{first} and {second} both hold"):
        load(folder)


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(folder, arrays, index, tmp_path):
    _, second = sorted(set(shard(folder, arrays, index=index).values()))
    (folder / second).unlink()
    message = f"lacks {second}, which {INDEX} names" if index else "has 1 of 2 shards"
    for action in (lambda: load(folder), lambda: convert(folder, tmp_path / "out")):
        with pytest.raises(ModelError, match=message):
            action()


def test_a_tensor_that_is_not_where_the_index_says(folder, arrays):
    first, _ = sorted(set(shard(folder, arrays).values()))
    save(folder / first, {"x": mx.zeros(3)})
    with pytest.raises(ModelError, match=rf"{first} lacks \S+, which {INDEX} expects there"):
        load(folder)


@pytest.mark.parametrize(
    "index",
    [b"", b"[]", b"{}", b"[" * 100_000, b'{"weight_map": 1}', b'{"weight_map": {}}', b"\xff",
     b'{"weight_map": {"a": 1}}', b'{"weight_map": {"a": "../x.safetensors"}}', b'{"weight_map": {"a": "config.json"}}',
     b'{"weight_map": {"a": "%s.safetensors"}}' % (b"x" * 300)],
)  # fmt: skip
def test_a_damaged_index(folder, index):
    (folder / INDEX).write_bytes(index)
    with pytest.raises(ModelError, match=INDEX):
        load(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "damaged or incomplete"),
        (lambda data: data[:-1], "damaged or incomplete"),
        (lambda data: data + b"x", "damaged or incomplete"),
        (lambda data: data[:20], "damaged or incomplete"),
        (lambda data: b"", "damaged or incomplete"),
        (lambda data: b"\xff" * 8 + data[8:], "damaged or incomplete"),
        (lambda data: data[:8] + b"[" * (len(data) - 8), "damaged or incomplete"),
        (lambda data: data.replace(b'"BF16"', b'"XX16"', 1), "damaged or incomplete"),
        (
            lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "git lfs pull",
        ),
    ],
)
def test_a_damaged_file_is_named(folder, damage, message, tmp_path):
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    for action in (lambda: load(folder), lambda: convert(folder, tmp_path / "out")):
        with pytest.raises(ModelError, match=rf"model\.safetensors: .*{message}"):
            action()


def test_tensors_that_do_not_fit_the_configuration(folder, arrays):
    file = folder / "model.safetensors"
    norm = arrays["model.norm.weight"]
    for changes, message in (
        ({"model.layers.9.mlp.up_proj.weight": norm}, "layers.9.mlp.up_proj"),
        ({"model.layers.0.self_attn.o_proj.bias": norm}, "o_proj.bias"),
        ({"model.norm.weight": norm[:3]}, "model.norm.weight"),
        ({"score.weight": norm}, "score.weight"),
    ):
        save(file, arrays | changes)
        with pytest.raises(
            ModelError, match=rf"cannot be loaded \(ValueError: .*{message}"
        ) as raised:
            load(folder)
        assert len(str(raised.value)) < 600
    save(file, {name: array for name, array in arrays.items() if name != "model.norm.weight"})
    with pytest.raises(ModelError, match=r"cannot be loaded \(ValueError: Missing 1 .*model.norm"):
        load(folder)
    save(file, arrays)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ModelError, match=r"cannot be loaded \(ValueError: Missing 1 .*lm_head"):
        load(folder)
    save(file, arrays | {"model.norm.weight": norm.view(mx.uint16)})
    with pytest.raises(
        UnsupportedModelError, match="model.norm.weight is U16, expected one of BF16"
    ):
        load(folder)


@pytest.mark.parametrize("name", ["a[1]", "[ab]*?", "x [0.5B] {y}"])
def test_brackets_in_the_names_of_folders(hf_folder, tmp_path, expected, name, make_vector):
    folder = tmp_path / name / name
    shutil.copytree(hf_folder, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [258, 256]}')
    assert np.array_equal(logits(folder), expected)
    made = convert(folder, tmp_path / name / "made", bits=None)
    assert np.array_equal(logits(made), expected)
    assert load(made).tokenizer.eos_token_ids == {256, 258}
    assert [file.name for file in weight_files(folder)] == ["model.safetensors"]
    baked = bake(folder, Steering(make_vector(), 1.0, (1,)), tmp_path / name / "baked")
    assert (baked.path / "model.safetensors").is_file()


def test_no_weights(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for name, message in (
        ("pytorch_model.bin", r"found pytorch_model\.bin\. Get the model's safetensors version"),
        (
            "model_00001.safetensors",
            rf"found model_00001\.safetensors\. Rename it, or add .*{INDEX}",
        ),
        ("notes.md", "found none. Get the"),
    ):
        (folder / "pytorch_model.bin").rename(folder / name)
        for action in (lambda: load(folder), lambda: convert(folder, tmp_path / "out")):
            with pytest.raises(ModelError, match=f"no model.safetensors or numbered .*; {message}"):
                action()
        (folder / name).rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "config", ['{"base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}', "[]", "{", "{}"]
)
def test_an_adapter_is_no_model(tmp_path, config):
    (tmp_path / "adapter_config.json").write_text(config)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    base = r" 'Qwen/Qwen2\.5-0\.5B'" if "Qwen" in config else ""
    for action in (lambda: load(tmp_path), lambda: convert(tmp_path, tmp_path / "out")):
        with pytest.raises(
            ModelError, match=rf"is a LoRA adapter .* into its model{base} \(PEFT: merge"
        ):
            action()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"peft_type": "LORA", "r": 8}', r"is an adapter of PEFT \(peft_type 'LORA'\), .*merge_and_unload"),
        ('{"lora_parameters": {}}', r"has no num_layers in its adapter_config\.json"),
        ("{", r"adapter_config\.json: is not JSON .*Correct it"),
        ("[]", r"adapter_config\.json: is "),
        (None, r"no adapter_config\.json, so no adapter"),
        ('{"num_layers": 1, "lora_parameters": {}}', "cannot be loaded"),
    ],
)  # fmt: skip
def test_an_adapter_that_mlx_lm_cannot_read_is_named(folder, tmp_path, config, message):
    adapter = tmp_path / "adapter"
    if config is not None:
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(config)
    with pytest.raises(ModelError, match=rf"/adapter\b.*{message}"):
        load(folder, adapter_path=str(adapter))


def test_the_headers_are_read_once(folder, monkeypatch):
    read, header = [], weights._read_header
    monkeypatch.setattr(weights, "_read_header", lambda file: read.append(file) or header(file))
    load(folder)
    assert len(read) == 1


@pytest.mark.parametrize("ends", [10**6, [256, 260], -1, "256", True, [[256]]])
def test_end_tokens_of_the_generation_config_that_are_none(folder, ends):
    """mlx-lm prefers them to those of config.json."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(ModelError, match=r"generation_config\.json has eos_token_id .* ids below"):
        load(folder)


def test_no_tokenizer(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")  # useless without merges.txt
    for action in (lambda: load(folder), lambda: convert(folder, tmp_path / "out")):
        with pytest.raises(ModelError, match=r"no tokenizer, expected tokenizer\.json"):
            action()


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", "null", "1", '"x"', '{"model": 5}', '{"tokenizer_class": 5}', '{"added_tokens": 5}', '{"eos_token": [1]}',
     '{"added_tokens_decoder": {"x": 1}}', '{"chat_template": 7}', '{"eos_token_id": {}}', '{"tool_parser_type": "os"}',
     '{"chat_template_type": "x"}', '{"auto_map": {"AutoTokenizer": ["x.T", null]}}', "[" * 100_000],
)  # fmt: skip
def test_whatever_the_libraries_raise_becomes_our_error(folder, name, content, tmp_path):
    """Damaged files beside the weights: a result or our error, from both doors."""
    (folder / name).write_text(content)
    for action in (lambda: load(folder), lambda: convert(folder, tmp_path / "out")):
        try:
            action()
        except (ModelError, ConversionError) as error:
            assert "\n" not in str(error) and len(str(error)) < 800


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.norm.weight", "model.layers.2.mlp.up_proj.weight", "model.layers.3.self_attn.k_proj.bias",
     "model.layers.0.self_attn.o_proj.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight"],
)  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_numbers_that_are_none(folder, arrays, name, value, tied, tmp_path):
    """NaN would make token 0 for ever. It is found wherever it is, also in a token's row that is never read."""
    if tied and name == "lm_head.weight":
        return
    changed = (
        dict(arrays)
        if tied
        else arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"][::-1]}
    )
    place = mx.zeros(changed[name].shape, mx.bool_)
    place[(7,) if place.ndim == 1 else (57, 3)] = True
    changed[name] = mx.where(place, mx.array(value, mx.bfloat16), changed[name])
    save(folder / "model.safetensors", changed)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    with pytest.raises(ModelError, match=f"its logits are not finite: {name} has NaN or infinity"):
        load(folder)
    with pytest.raises(ConversionError, match=f"not finite: {name}"):
        convert(folder, tmp_path / "out", bits=None)


def test_a_model_too_large_for_its_dtype(folder, arrays):
    changed = {name: array.astype(mx.float16) for name, array in arrays.items()}
    for name in list(changed):
        if "mlp" in name:
            changed[name] = changed[name] * 3000
    save(folder / "model.safetensors", changed)
    with pytest.raises(ModelError, match=r"some value overflows \(dtype float16\).*dtype bfloat16"):
        load(folder)


def test_large_numbers_are_no_infinity(folder, arrays):
    """The sum of an embedding's row overflows in float16; no logit and no weight does."""
    changed = {name: array.astype(mx.float16) for name, array in arrays.items()}
    embedding = changed["model.embed_tokens.weight"]
    changed |= {
        "lm_head.weight": embedding,
        "model.embed_tokens.weight": mx.full(embedding.shape, 2000, mx.float16),
    }
    save(folder / "model.safetensors", changed)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert not np.isfinite(np.array(changed["model.embed_tokens.weight"].sum(axis=-1))).any()
    assert np.isfinite(logits(folder)).all()


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-that-name/x"])
def test_a_name_that_the_system_refuses(name):
    for action in (load, convert):
        with pytest.raises(ModelError, match="is no path"):
            action(name)
