import json
import re
import struct

import mlx.core as mx
import pytest
from gguf_model import vocabulary, write_gguf
from mlx.utils import tree_flatten

from mlx_densesteer.cli.doctor import tiny_model
from mlx_densesteer.errors import (
    ConversionError,
    ModelError,
    UnsupportedModelError,
    install_command,
)
from mlx_densesteer.model.convert import convert
from mlx_densesteer.model.gguf import hf_name, open_gguf
from mlx_densesteer.model.model import load

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocabulary=263)


def test_a_float_file_gives_the_same_model(model, tmp_path):
    path = write_gguf(tmp_path / "tiny-q.gguf", model)
    folder = convert(path, tmp_path / "out", bits=None, dtype="float32")
    loaded, _ = load(folder)
    tokens = mx.array([[1, 2, 3, 4, 5]])
    assert mx.array_equal(loaded(tokens), model(tokens))
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True and config["rms_norm_eps"] == 1e-6
    record = json.loads((folder / "densesteer.json").read_text())
    assert record["source"] == "tiny-q" and len(record["gguf_sha256"]) == 64


def test_a_quantised_file_is_dequantised(model, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", model, quantised=True)
    loaded, _ = load(convert(path, tmp_path / "out", bits=None, dtype="float32"))
    tokens = mx.array([[1, 2, 3, 4, 5]])
    difference = float(mx.abs(loaded(tokens) - model(tokens)).max())
    assert 0 < difference < 0.05 * float(mx.abs(model(tokens)).max())


def test_an_output_matrix_of_its_own_unties_the_embeddings(model, tmp_path):
    own = mx.random.normal((263, 64))
    path = write_gguf(tmp_path / "tiny.gguf", model, extra=[("lm_head.weight", own)])
    loaded, _ = load(convert(path, tmp_path / "out", bits=None, dtype="float32"))
    assert mx.array_equal(loaded.lm_head.weight, own)
    assert mx.array_equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_the_tokenizer(model, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", model)
    _, tokenizer = load(convert(path, tmp_path / "out", bits=4, group_size=32))
    tokens, *_ = vocabulary()

    def texts(text):
        return [tokens[i] for i in tokenizer.encode(text)]

    assert texts("hello") == ["hel", "l", "o"]
    assert texts(" 123") == ["Ġ", "1", "2", "3"]
    assert texts("<|im_start|>he<tool_call>") == ["<|im_start|>", "he", "<tool_call>"]
    assert texts("e\u0301") == list(texts("\u00e9"))  # NFC
    assert "[PAD262]" not in tokenizer.get_vocab()
    ends = {tokens.index("<|im_end|>"), tokens.index("<|endoftext|>")}
    assert tokenizer.eos_token_ids == ends
    text = "Hé, 12 + 30 = 42.\n\n日本 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_progress_counts_tensors(model, tmp_path):
    told = []
    path = write_gguf(tmp_path / "tiny.gguf", model)
    convert(path, tmp_path / "out", progress=lambda *event: told.append(event))
    counts = [event for event in told if event[2]]
    assert counts[-1][1] == counts[-1][2] == len(tree_flatten(model.parameters()))
    assert [event[1] for event in counts] == list(range(1, len(counts) + 1))


def test_another_architecture_is_refused_by_name(model, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", model, architecture="gemma2")
    with pytest.raises(
        UnsupportedModelError, match="GGUF of architecture 'gemma2', expected one of"
    ):
        convert(path, tmp_path / "out")


def test_a_llama_without_its_rule_for_words_is_refused(model, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", model, architecture="llama")
    with pytest.raises(ConversionError, match="tokenizer.ggml.pre is None, expected 'smollm'"):
        convert(path, tmp_path / "out")


def test_a_llama_with_some_biases_is_refused(model, tmp_path):
    def named(writer):
        writer.add_tokenizer_pre("smollm")

    path = write_gguf(tmp_path / "tiny.gguf", model, architecture="llama", also=named)
    with pytest.raises(ConversionError, match="has biases on attn_q, but none on attn_output"):
        convert(path, tmp_path / "out")


VARIANTS = {
    "split.count": lambda w: w.add_uint16("split.count", 3),
    "qwen2.rope.scaling.type": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
    "qwen2.rope.scaling.factor": lambda w: w.add_rope_scaling_factor(4.0),
    "tokenizer.ggml.pre": lambda w: w.add_tokenizer_pre("deepseek-r1-qwen"),
    "tokenizer.ggml.add_bos_token": lambda w: w.add_add_bos_token(True),
}


@pytest.mark.parametrize("key", VARIANTS)
def test_what_would_be_left_out_is_refused(model, tmp_path, key):
    path = write_gguf(tmp_path / "tiny.gguf", model, also=VARIANTS[key])
    with pytest.raises(ConversionError, match=f"{key} is .*, expected"):
        convert(path, tmp_path / "out")


UNTRUE = {
    "eos": (
        lambda w: w.add_eos_token_id(99999),
        "eos_token_id is 99999, but the vocabulary has 263",
    ),
    "pad": (
        lambda w: w.add_pad_token_id(99999),
        "padding_token_id is 99999, but the vocabulary has",
    ),
    "kinds": (lambda w: w.add_token_types([1, 1]), "not a complete GGUF file"),
    "merges": (lambda w: w.add_token_merges(["h e", "hz zz"]), "is not in the vocabulary"),
    "heads": (
        lambda w: w.add_head_count(0),
        "num_attention_heads 0, expected a whole number above 0",
    ),
    "hidden": (
        lambda w: w.add_string("qwen2.embedding_length", "64"),
        "embedding_length is 64, expected one whole",
    ),
}


@pytest.mark.parametrize("field", UNTRUE)
def test_fields_that_cannot_be_true(model, tmp_path, field):
    also, message = UNTRUE[field]
    path = write_gguf(tmp_path / "tiny.gguf", model, leave_out=[field], also=also)
    with pytest.raises((ConversionError, ModelError), match=message):
        convert(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]


ARITHMETIC = {  # keys that change what is computed: what to leave out, what to write, and what is told
    "a window": ([], lambda w: w.add_sliding_window(16), "sliding_window 16"),
    "a window in some layers": (
        [],
        lambda w: (w.add_sliding_window(16), w.add_sliding_window_pattern([True, False, False, False])),
        "sliding_window 16",
    ),
    "heads by layer": (["heads"], lambda w: w.add_head_count([4, 4, 2, 4]), "head_count is 2, 4, expected one"),
    "key heads by layer": (
        ["kv heads"], lambda w: w.add_head_count_kv([2, 2, 1, 2]), "head_count_kv is 1, 2, expected one",
    ),
    "mlp by layer": (["mlp"], lambda w: w.add_feed_forward_length([128, 64, 128, 128]), "feed_forward_length is 64, 128"),
    "width of keys": ([], lambda w: w.add_key_length(32), "key_length is 32, expected 16"),
    "width of values": ([], lambda w: w.add_value_length(8), "value_length is 8, expected 16"),
    "rotated part": ([], lambda w: w.add_rope_dimension_count(8), "dimension_count is 8, expected 16"),
    "not causal": ([], lambda w: w.add_causal_attention(False), "attention.causal is False"),
    "attention scale": ([], lambda w: w.add_attention_scale(0.5), "attention.scale is 0.5"),
    "stretched attention": ([], lambda w: w.add_rope_scaling_attn_factors(1.5), "attn_factor is 1.5"),
    "experts": ([], lambda w: w.add_expert_count(4), "expert_count is 4"),
    "end added": ([], lambda w: w.add_add_eos_token(True), "add_eos_token is True"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARITHMETIC)
def test_what_would_be_computed_otherwise_is_refused(model, tmp_path, name):
    leave_out, also, message = ARITHMETIC[name]
    path = write_gguf(tmp_path / "tiny.gguf", model, leave_out=leave_out, also=also)
    with pytest.raises((ConversionError, UnsupportedModelError), match=message):
        convert(path, tmp_path / "out")


HARMLESS = {
    "a window as wide as the context": ([], lambda w: w.add_sliding_window(512)),
    "a window in no layer": ([], lambda w: (w.add_sliding_window(16), w.add_sliding_window_pattern([False] * 4))),
    "no window": ([], lambda w: w.add_sliding_window(0)),
    "heads by layer, all the same": (["heads", "kv heads"], lambda w: (w.add_head_count([4] * 4), w.add_head_count_kv([2] * 4))),
    "the usual widths": ([], lambda w: (w.add_key_length(16), w.add_value_length(16), w.add_rope_dimension_count(16))),
    "causal": ([], lambda w: w.add_causal_attention(True)),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_is_accepted(model, tmp_path, name):
    leave_out, also = HARMLESS[name]
    path = write_gguf(tmp_path / "tiny.gguf", model, leave_out=leave_out, also=also)
    loaded, _ = load(convert(path, tmp_path / "out", bits=None, dtype="float32"))
    tokens = mx.array([[1, 2, 3, 4, 5]])
    assert mx.array_equal(loaded(tokens), model(tokens))


def test_the_end_of_a_turn_that_is_no_end_of_text(model, tmp_path):
    tokens, *_ = vocabulary()
    tokens[tokens.index("<|im_end|>")] = "<|my_turn_ends|>"

    def also(writer):
        writer.add_token_list(tokens)
        writer.add_eos_token_id(tokens.index("<|endoftext|>"))
        writer.add_eot_token_id(tokens.index("<|my_turn_ends|>"))
        writer.add_eom_token_id(tokens.index("<tool_call>"))

    path = write_gguf(tmp_path / "tiny.gguf", model, leave_out=["tokens", "eos"], also=also)
    _, tokenizer = load(convert(path, tmp_path / "out"))
    ends = {"<|endoftext|>", "<|my_turn_ends|>", "<tool_call>"}
    assert tokenizer.eos_token_ids == {tokens.index(token) for token in ends}


def test_special_tokens_anywhere_in_the_vocabulary(model, tmp_path, capfd):
    """First, in the middle, part of a merge; unused ones between. Every token keeps its number."""
    plain, *_ = vocabulary()
    words = [token for token in plain if token in ("he", "hel") or len(token) == 1]
    middle = [*words[:100], "<|im_start|>", "[PAD102]", "<tool_call>", *words[100:]]
    tokens = ["<|endoftext|>", *middle, "<|im_end|>", "[PAD263]"]
    own = {"<|endoftext|>": 3, "<|im_start|>": 3, "<|im_end|>": 3, "<tool_call>": 4, "he": 4}
    kinds = [own.get(token, 5 if "PAD" in token else 1) for token in tokens]

    def also(writer):
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_eos_token_id(tokens.index("<|im_end|>"))
        writer.add_pad_token_id(0)

    left = ["tokens", "kinds", "eos", "pad"]
    network = tiny_model(vocabulary=len(tokens))
    path = write_gguf(tmp_path / "tiny.gguf", network, leave_out=left, also=also)
    _, tokenizer = load(convert(path, tmp_path / "out"))
    assert "hole" not in "".join(capfd.readouterr())
    text = "<|im_start|>hello<tool_call> 12<|endoftext|>h\u00e9<|im_end|>"
    ids = tokenizer.encode(text)
    shown = [tokens[i] for i in ids]
    assert shown == ["<|im_start|>", "he", "l", "l", "o", "<tool_call>", "\u0120", "1", "2", "<|endoftext|>",
                     "h", "\u00c3", "\u00a9", "<|im_end|>"]  # fmt: skip
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello<tool_call> 12h\u00e9"
    assert tokenizer.eos_token_ids == {0, tokens.index("<|im_end|>")}


def test_a_token_that_is_there_twice(model, tmp_path):
    tokens, *_ = vocabulary()
    tokens[5] = tokens[4]
    path = write_gguf(
        tmp_path / "tiny.gguf", model, leave_out=["tokens"], also=lambda w: w.add_token_list(tokens)
    )
    with pytest.raises(ConversionError, match="is in the vocabulary twice"):
        convert(path, tmp_path / "out")


def test_a_merge_of_one_part(model, tmp_path):
    def also(writer):
        writer.add_token_merges(["h e", "unknown"])

    path = write_gguf(tmp_path / "tiny.gguf", model, leave_out=["merges"], also=also)
    with pytest.raises(ConversionError, match="the merge .* is not in the vocabulary"):
        convert(path, tmp_path / "out")


def test_the_usual_values_are_accepted(model, tmp_path):
    def usual(writer):
        writer.add_tokenizer_pre("qwen2")
        writer.add_add_bos_token(False)
        writer.add_uint16("split.count", 1)

    folder = convert(write_gguf(tmp_path / "tiny.gguf", model, also=usual), tmp_path / "out")
    assert load(folder)[1].encode("he") == [256]


@pytest.mark.parametrize("missing", ["rope", "tokens", "eos", "heads"])
def test_a_missing_field_is_named(model, tmp_path, missing):
    path = write_gguf(tmp_path / "tiny.gguf", model, leave_out=[missing])
    with pytest.raises(ConversionError, match=r"the GGUF file lacks (qwen2|tokenizer)\."):
        convert(path, tmp_path / "out")


def test_damaged_files(model, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", model)
    data = path.read_bytes()
    for content in (
        b"",
        b"GGUF",
        b"not a gguf file at all" * 10,
        data[:100],
        data[: len(data) // 2],
        data[:-1000],
    ):
        path.write_bytes(content)
        with pytest.raises(ConversionError, match="not a complete GGUF file|is not a GGUF file"):
            convert(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]


def test_names():
    assert hf_name("blk.11.ffn_down.weight") == "model.layers.11.mlp.down_proj.weight"
    assert hf_name("blk.0.attn_q.bias") == "model.layers.0.self_attn.q_proj.bias"
    assert hf_name("output.weight") == "lm_head.weight"
    for name in (
        "rope_freqs.weight",
        "blk.x.attn_q.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk",
        "",
    ):
        with pytest.raises(ConversionError, match="is not part of a Qwen2, Qwen3 or Llama model"):
            hf_name(name)


def test_without_the_extra_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(ConversionError, match=re.escape(install_command("gguf"))):
        open_gguf(tmp_path / "x.gguf")
    (tmp_path / "notes.txt").write_text("buy milk")  # for which no extra is of use
    with pytest.raises(ConversionError, match=r"notes\.txt: is not a GGUF file"):
        open_gguf(tmp_path / "notes.txt")
