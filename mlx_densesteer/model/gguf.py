"""Convert a Qwen2 GGUF file to a Hugging Face folder, which mlx-lm can convert.

Tensors are dequantised one at a time; the precision that llama.cpp's quantisation lost stays lost.

Format: the GGUF specification of ggml; tensor names as llama.cpp's ``convert_hf_to_gguf``
writes them for the architecture ``qwen2`` (no row permutation).
"""

import json
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import ConversionError, UnsupportedModelError
from ..steering.formats.gguf import check_header, damage, gguf_package

if TYPE_CHECKING:
    from gguf import GGUFReader

SHARD_BYTES = 2 * 2**30
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# Qwen2's rule for cutting text into words before byte-pair merging: digits one by one.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # token types of the GGUF specification


def open_gguf(path: Path) -> "GGUFReader":
    """Open a GGUF file of the architecture ``qwen2``.

    Raises:
        ConversionError: the ``gguf`` extra is not installed; not a GGUF file, or truncated.
        UnsupportedModelError: another architecture; the message names it.
    """
    gguf = gguf_package(path, ConversionError)
    check_header(path)
    with damage(path):
        reader = gguf.GGUFReader(path)
        architecture = _value(reader, "general.architecture")
    if architecture != "qwen2":
        raise UnsupportedModelError(
            f"{path}: is a GGUF of architecture {architecture!r}, but only the Qwen2 family "
            "(Qwen2, Qwen2.5; architecture qwen2) can be steered."
        )
    with damage(path):
        _check_variant(reader, path)
    return reader


def _check_variant(reader: "GGUFReader", path: Path) -> None:
    """Raise for variants of Qwen2 files that this module would convert wrongly."""
    stretched = "use the model's file without a stretched context"
    foreign = "its tokenizer is not Qwen2's; convert from the Hub"
    expected = {  # the values that change nothing, the usual one first
        "split.count": ((1, 0), "the parts must be joined first: gguf-split --merge"),
        "qwen2.rope.scaling.type": (("none",), stretched),
        "qwen2.rope.scaling.factor": ((1, 0), stretched),
        "qwen2.rope.scale_linear": ((1, 0), stretched),
        "tokenizer.ggml.model": (("gpt2",), "use a Qwen2 or Qwen2.5 file"),
        "tokenizer.ggml.pre": (("qwen2",), foreign),
        "tokenizer.ggml.add_bos_token": ((False,), foreign),
    }
    for key, (values, remedy) in expected.items():
        field = reader.get_field(key)
        if field is not None and field.contents() not in values:
            raise ConversionError(
                f"{path}: {key} is {field.contents()!r}, expected {values[0]!r}: {remedy}."
            )


def write_hf_folder(
    reader: "GGUFReader",
    folder: Path,
    config: dict[str, object],
    progress: Callable[[int, int], None],
) -> None:
    """Write a Hugging Face folder: tokenizer, weights in the dtype of ``config``, and ``config``.

    Args:
        config: what ``read_config`` returns.
        progress: receives the number of tensors written, and of all.

    Raises:
        ConversionError: a tensor or a metadata field that a Qwen2 file must have is missing,
            or a tensor has an unknown name or quantisation.
    """
    dtype = getattr(mx, str(config["torch_dtype"]))
    tokenizer, tokenizer_config = _tokenizer(reader)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {
        "config.json": config,
        "generation_config.json": {"eos_token_id": _end_tokens(reader)},
        "tokenizer_config.json": tokenizer_config,
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    for number, shard in enumerate(_shards(reader, dtype, progress)):
        mx.save_safetensors(str(folder / f"model-{number:05d}.safetensors"), shard)


def _shards(
    reader: "GGUFReader", dtype: mx.Dtype, progress: Callable[[int, int], None]
) -> Iterator[dict[str, mx.array]]:
    from gguf.quants import dequantize

    shard: dict[str, mx.array] = {}
    total = len(reader.tensors)
    for done, tensor in enumerate(reader.tensors):
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise ConversionError(
                f"tensor {tensor.name} has the quantisation {tensor.tensor_type.name}, which the "
                f"gguf package cannot undo ({error}). Get another quantisation of this model."
            ) from error
        array = mx.array(np.ascontiguousarray(values, dtype=np.float32)).astype(dtype)
        mx.eval(array)
        shard[hf_name(tensor.name)] = array
        progress(done + 1, total)
        if sum(a.nbytes for a in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def hf_name(name: str) -> str:
    """Return the Hugging Face name of a Qwen2 GGUF tensor."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    block, number, part = [*stem.split("."), "", "", ""][:3]
    if block == "blk" and number.isdecimal() and part in _BLOCK:
        return f"model.layers.{number}.{_BLOCK[part]}.{kind}"
    raise ConversionError(
        f"tensor {name} is not part of a Qwen2 model; expected names such as blk.0.attn_q.weight."
    )


def gguf_name(name: str) -> str:
    """Return the GGUF name of a Hugging Face tensor: the inverse of ``hf_name``."""
    stem, _, kind = name.rpartition(".")
    tops = {hf: short for short, hf in _TOP.items()}
    parts = {hf: short for short, hf in _BLOCK.items()}
    if stem in tops:
        return f"{tops[stem]}.{kind}"
    number, _, part = stem.removeprefix("model.layers.").partition(".")
    if not number.isdecimal() or part not in parts:
        raise ConversionError(f"tensor {name} is not part of a Qwen2 model.")
    return f"blk.{number}.{parts[part]}.{kind}"


def _value(reader: "GGUFReader", key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ConversionError(
            f"the GGUF file lacks {key}: it is incomplete, or made by an old converter. "
            "Get a newer file."
        )
    return field.contents()


def _end_tokens(reader: "GGUFReader") -> list[int]:
    """Return the tokens that end a response: Qwen's end of turn and end of text."""
    tokens = _value(reader, "tokenizer.ggml.tokens")
    kinds = _value(reader, "tokenizer.ggml.token_type")
    ends = [int(_value(reader, "tokenizer.ggml.eos_token_id"))]
    ends += [i for i, t in enumerate(tokens) if t == "<|endoftext|>" and kinds[i] == _CONTROL]
    return sorted(set(ends), reverse=True)


def read_config(reader: "GGUFReader", dtype: str) -> dict[str, object]:
    """Return the Hugging Face ``config.json`` of the file."""
    names = {tensor.name for tensor in reader.tensors}
    heads = int(_value(reader, "qwen2.attention.head_count"))
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": int(_value(reader, "qwen2.embedding_length")),
        "intermediate_size": int(_value(reader, "qwen2.feed_forward_length")),
        "num_hidden_layers": int(_value(reader, "qwen2.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(_value(reader, "qwen2.attention.head_count_kv")),
        "max_position_embeddings": int(_value(reader, "qwen2.context_length")),
        "rms_norm_eps": round(float(_value(reader, "qwen2.attention.layer_norm_rms_epsilon")), 12),
        "rope_theta": float(_value(reader, "qwen2.rope.freq_base")),
        "vocab_size": len(_value(reader, "tokenizer.ggml.tokens")),
        "tie_word_embeddings": "output.weight" not in names,
        "eos_token_id": int(_value(reader, "tokenizer.ggml.eos_token_id")),
        "torch_dtype": dtype,
        # Without it, transformers takes the folder for an old one and warns of its tokenizer.
        "transformers_version": metadata.version("transformers"),
    }


def _tokenizer(reader: "GGUFReader") -> tuple[Any, dict[str, object]]:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    tokens = _value(reader, "tokenizer.ggml.tokens")
    kinds = _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in _value(reader, "tokenizer.ggml.merges")]
    special = {i: t for i, t in enumerate(tokens) if kinds[i] in (_CONTROL, _USER_DEFINED)}
    plain = (i for i in range(len(tokens)) if i not in special and kinds[i] != _UNUSED)
    vocabulary = {tokens[i]: i for i in plain}
    for merge in merges:  # tokenizers would raise a bare Exception
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise ValueError(f"the merge {merge!r} is not in the vocabulary")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for i, token in sorted(special.items()):
        added = AddedToken(token, special=kinds[i] == _CONTROL, normalized=False)
        if tokenizer.add_tokens([added]) != 1 or tokenizer.token_to_id(token) != i:
            raise ConversionError(f"token {token!r} should be number {i}; the vocabulary has gaps.")
    config: dict[str, object] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[int(_value(reader, "tokenizer.ggml.eos_token_id"))],
        "model_max_length": int(_value(reader, "qwen2.context_length")),
    }
    if padding := reader.get_field("tokenizer.ggml.padding_token_id"):
        config["pad_token"] = tokens[int(padding.contents())]
    if template := reader.get_field("tokenizer.chat_template"):
        config["chat_template"] = template.contents()
    return tokenizer, config
