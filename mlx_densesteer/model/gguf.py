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
from ..steering.formats.gguf import check_header, contents, damage, gguf_package
from .config import check_config

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
    check_header(path)
    gguf = gguf_package(path, ConversionError)
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
    text_only = "use a model that generates text"
    changed = "mlx-lm's Qwen2 does not compute this; use a Qwen2 or Qwen2.5 file"
    expected = {  # the values that change nothing, the usual one first
        "split.count": ((1, 0), "the parts must be joined first: gguf-split --merge"),
        "qwen2.rope.scaling.type": (("none",), stretched),
        "qwen2.rope.scaling.factor": ((1, 0), stretched),
        "qwen2.rope.scale_linear": ((1, 0), stretched),
        "tokenizer.ggml.model": (("gpt2",), "use a Qwen2 or Qwen2.5 file"),
        "tokenizer.ggml.pre": (("qwen2",), foreign),
        "tokenizer.ggml.add_bos_token": ((False,), foreign),
        "tokenizer.ggml.add_eos_token": ((False,), foreign),
        "qwen2.rope.scaling.attn_factor": ((1, 0), stretched),
        "qwen2.rope.dimension_sections": (([0, 0, 0, 0],), text_only),
        "qwen2.attention.causal": ((True,), text_only),
        "qwen2.attention.scale": ((0,), changed),
        "qwen2.attention.clamp_kqv": ((0,), changed),
        "qwen2.expert_count": ((0,), changed),
    }
    for key, (values, remedy) in expected.items():
        found = contents(reader, key)
        if found is not None and found not in values:
            raise ConversionError(f"{path}: {key} is {found!r}, expected {values[0]!r}: {remedy}.")


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
    value = contents(reader, key)
    if value is None:
        raise ConversionError(
            f"the GGUF file lacks {key}: it is incomplete, or made by an old converter. "
            "Get a newer file."
        )
    return value


def _count(reader: "GGUFReader", key: str) -> int:
    """Return a number that some files have once, and others for every layer."""
    value = _value(reader, key)
    values = sorted(set(value)) if isinstance(value, list) else [value]
    if len(values) != 1 or type(values[0]) is not int:
        raise ConversionError(
            f"{key} is {', '.join(str(v)[:20] for v in values[:4])}, expected one whole number: mlx-lm's "
            "Qwen2 has the same for all layers. Use a Qwen2 or Qwen2.5 file."
        )
    return values[0]


def _token(reader: "GGUFReader", name: str, tokens: list[str]) -> int | None:
    """Return the number of a token of the metadata, such as ``eos``; ``None`` if it has none."""
    number = contents(reader, f"tokenizer.ggml.{name}_token_id")
    if number is not None and not (type(number) is int and 0 <= number < len(tokens)):
        raise ConversionError(
            f"tokenizer.ggml.{name}_token_id is {str(number)[:20]}, but the vocabulary has {len(tokens)} "
            "tokens. Download the file again, or get a newer one."
        )
    return number


def _end_tokens(reader: "GGUFReader") -> list[int]:
    """Return the tokens that end a response, as llama.cpp finds them: by number, and Qwen's by name."""
    tokens = _value(reader, "tokenizer.ggml.tokens")
    kinds = _value(reader, "tokenizer.ggml.token_type")
    ends = {_token(reader, name, tokens) for name in ("eos", "eot", "eom")} - {None}
    named = ("<|endoftext|>", "<|im_end|>")
    ends |= {i for i, t in enumerate(tokens) if t in named and kinds[i] == _CONTROL}
    return sorted(ends, reverse=True)


def read_config(reader: "GGUFReader", dtype: str, where: str) -> dict[str, object]:
    """Return the ``config.json`` of the file, as ``config.read_config`` returns that of a folder.

    Args:
        where: names the file in errors.

    Raises:
        ConversionError, ModelError, UnsupportedModelError: a value is missing, wrong, or one that
            mlx-lm's Qwen2 does not compute with.
    """
    names = {tensor.name for tensor in reader.tensors}
    tokens = _value(reader, "tokenizer.ggml.tokens")
    _value(reader, "tokenizer.ggml.eos_token_id")
    window = contents(reader, "qwen2.attention.sliding_window") or None
    pattern = contents(reader, "qwen2.attention.sliding_window_pattern")
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": _count(reader, "qwen2.embedding_length"),
        "intermediate_size": _count(reader, "qwen2.feed_forward_length"),
        "num_hidden_layers": _count(reader, "qwen2.block_count"),
        "num_attention_heads": _count(reader, "qwen2.attention.head_count"),
        "num_key_value_heads": _count(reader, "qwen2.attention.head_count_kv"),
        "max_position_embeddings": _count(reader, "qwen2.context_length"),
        "rms_norm_eps": round(float(_value(reader, "qwen2.attention.layer_norm_rms_epsilon")), 12),
        "rope_theta": float(_value(reader, "qwen2.rope.freq_base")),
        "vocab_size": len(tokens),
        "tie_word_embeddings": "output.weight" not in names,
        "eos_token_id": _end_tokens(reader),
        "torch_dtype": dtype,
        # Without it, transformers takes the folder for an old one and warns of its tokenizer.
        "transformers_version": metadata.version("transformers"),
    }
    if window is not None:
        config |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
        if isinstance(pattern, list):
            kinds = ("full_attention", "sliding_attention")
            config["layer_types"] = [kinds[bool(windowed)] for windowed in pattern]
    config = check_config(config, where)
    size = config["hidden_size"] // config["num_attention_heads"]
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        found = contents(reader, f"qwen2.{key}")
        if found not in (None, size):
            raise ConversionError(
                f"qwen2.{key} is {str(found)[:20]}, expected {size}, the width of a head: mlx-lm's Qwen2 "
                "has no other. Use a Qwen2 or Qwen2.5 file."
            )
    return config


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
    # The padding at the end is left out. Anything between has to keep its number.
    count = 1 + max(i for i in range(len(tokens)) if kinds[i] != _UNUSED)
    vocabulary = {token: i for i, token in enumerate(tokens[:count])}
    if len(vocabulary) < count:
        twice = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise ConversionError(f"token {twice[:60]!r} is in the vocabulary twice. Get a newer file.")
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
    for i, token in special.items():
        tokenizer.add_tokens([AddedToken(token, special=kinds[i] == _CONTROL, normalized=False)])
    config: dict[str, object] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[_token(reader, "eos", tokens)],
        "model_max_length": int(_value(reader, "qwen2.context_length")),
    }
    if (padding := _token(reader, "padding", tokens)) is not None:
        config["pad_token"] = tokens[padding]
    if template := contents(reader, "tokenizer.chat_template"):
        config["chat_template"] = template
    return tokenizer, config
