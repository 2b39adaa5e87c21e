"""Convert a GGUF file of a Qwen2, Qwen3 or Llama model to a Hugging Face folder, which mlx-lm can convert.

Tensors are dequantised one at a time; the precision that llama.cpp's quantisation lost stays lost.

Format: the GGUF specification of ggml; tensor names, the order of the rows of Llama's queries and keys, and the
rules of the tokenizers as llama.cpp's ``convert_hf_to_gguf`` and ``llama-vocab`` have them.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import ConversionError, UnsupportedModelError
from ..steering.formats.gguf import check_header, contents, damage, gguf_package
from .config import check_config

if TYPE_CHECKING:
    from gguf import GGUFReader

BAKED_KEY = (
    "mlx_densesteer.baked"  # of a file that `bake` wrote; JSON, as `densesteer.json` of a folder
)
SHARD_BYTES = 2 * 2**30
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = (
    _SPLIT % r"\p{N}"
)  # Qwen's rule for cutting text into words before byte-pair merging: digits one by one


class Words(NamedTuple):
    """How a tokenizer cuts text into words: ``tokenizer.ggml.pre``."""

    split: str | None  # the rule, or None for GPT-2's with digits one by one
    nfc: bool = False
    begins: bool = (
        False  # whether every text begins with the token `bos`, unless the file says otherwise
    )
    whole: bool = False  # whether a word that is a token is not built from merges


WORDS = {
    "qwen2": Words(SPLIT, nfc=True),
    "smollm": Words(None),
    "llama-bpe": Words(_SPLIT % r"\p{N}{1,3}", begins=True, whole=True),
}
# llama.cpp's architecture: the class of transformers, and the tokenizers that are known
_ARCHITECTURES = {
    "qwen2": ("Qwen2ForCausalLM", ("qwen2",)),
    "qwen3": ("Qwen3ForCausalLM", ("qwen2",)),
    "llama": ("LlamaForCausalLM", ("smollm", "llama-bpe")),
}
_ENDS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
# Llama 3.1 and 3.2 stretch their rotary embedding so; the file has only the result, by frequency
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_ROPE = "rope_freqs.weight"
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # token types of the GGUF specification


def open_gguf(path: Path) -> "GGUFReader":
    """Open a GGUF file of the architecture ``qwen2``, ``qwen3`` or ``llama``.

    Raises:
        ConversionError: the ``gguf`` extra is not installed; not a GGUF file, or truncated.
        UnsupportedModelError: another architecture; the message names it.
    """
    check_header(path)
    gguf = gguf_package(path, ConversionError)
    with damage(path):
        reader = gguf.GGUFReader(path)
        architecture = _value(reader, "general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"{path}: is a GGUF of architecture {architecture!r}, expected one of {', '.join(_ARCHITECTURES)}. "
            "Convert the model from the Hub."
        )
    with damage(path):
        _check_variant(reader, path)
    return reader


def _check_variant(reader: "GGUFReader", path: Path) -> None:
    """Raise for variants of files that this module would convert wrongly."""
    architecture = contents(reader, "general.architecture")
    stretched = "use the model's file without a stretched context"
    foreign = "convert the model from the Hub, for its tokenizer"
    text_only = "use a model that generates text"
    changed = "mlx-lm does not compute this; convert the model from the Hub"
    known = _ARCHITECTURES[architecture][1]
    if architecture == "llama" and contents(reader, BAKED_KEY) is not None:
        raise ConversionError(
            f"{path}: has its steering baked in. Convert the model that it was made from, and bake that."
        )
    expected = {  # the values that change nothing, the usual one first
        "split.count": ((1, 0), "the parts must be joined first: gguf-split --merge"),
        "rope.scaling.type": (("none",), stretched),
        "rope.scaling.factor": ((1, 0), stretched),
        "rope.scale_linear": ((1, 0), stretched),
        "tokenizer.ggml.model": (("gpt2",), foreign),
        "tokenizer.ggml.pre": (known, foreign),
        "tokenizer.ggml.add_eos_token": ((False,), foreign),
        "rope.scaling.attn_factor": ((1, 0), stretched),
        "rope.dimension_sections": (([0, 0, 0, 0],), text_only),
        "attention.causal": ((True,), text_only),
        "attention.scale": ((0,), changed),
        "attention.clamp_kqv": ((0,), changed),
        "expert_count": ((0,), changed),
    }
    if architecture != "llama":
        expected["tokenizer.ggml.add_bos_token"] = ((False,), foreign)
    expected = {
        key if key.startswith(("split.", "tokenizer.")) else f"{architecture}.{key}": wanted
        for key, wanted in expected.items()
    }
    for key, (values, remedy) in expected.items():
        found = contents(reader, key)
        absent = found is None and not (key == "tokenizer.ggml.pre" and architecture == "llama")
        if not absent and found not in values:
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
        ConversionError: a tensor or a metadata field that a file must have is missing, or a tensor has an
            unknown name or quantisation.
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
    for number, shard in enumerate(_shards(reader, config, dtype, progress)):
        mx.save_safetensors(str(folder / f"model-{number:05d}.safetensors"), shard)


def _shards(
    reader: "GGUFReader",
    config: Mapping[str, object],
    dtype: mx.Dtype,
    progress: Callable[[int, int], None],
) -> Iterator[dict[str, mx.array]]:
    from gguf.quants import dequantize

    shard: dict[str, mx.array] = {}
    total = len(reader.tensors)
    for done, tensor in enumerate(reader.tensors):
        if tensor.name == _ROPE:  # it is in the configuration
            continue
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise ConversionError(
                f"tensor {tensor.name} has the quantisation {tensor.tensor_type.name}, which the "
                f"gguf package cannot undo ({error}). Get another quantisation of this model."
            ) from error
        name = hf_name(tensor.name)
        if config["model_type"] == "llama":
            values = _paired(values, name, config)
        array = mx.array(np.ascontiguousarray(values, dtype=np.float32)).astype(dtype)
        mx.eval(array)
        shard[name] = array
        progress(done + 1, total)
        if sum(a.nbytes for a in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def _paired(values: np.ndarray, name: str, config: Mapping[str, object]) -> np.ndarray:
    """Return the rows of Llama's queries or keys in the order of transformers; other tensors unchanged.

    llama.cpp's rotary embedding turns rows 2i and 2i + 1 of a head together, transformers' rows i and i + half.
    """
    part = name.rpartition(".")[0].rpartition(".")[2]
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(part)
    if heads is None:
        return values
    pairs = values.reshape(config[heads], -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def hf_name(name: str) -> str:
    """Return the Hugging Face name of a GGUF tensor."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    block, number, part = [*stem.split("."), "", "", ""][:3]
    if block == "blk" and number.isdecimal() and part in _BLOCK:
        return f"model.layers.{number}.{_BLOCK[part]}.{kind}"
    raise ConversionError(
        f"tensor {name} is not part of a Qwen2, Qwen3 or Llama model; expected names such as "
        "blk.0.attn_q.weight."
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
        raise ConversionError(f"tensor {name} is not part of a Qwen2, Qwen3 or Llama model.")
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
            f"{key} is {', '.join(str(v)[:20] for v in values[:4])}, expected one whole number: "
            "mlx-lm has the same for all layers. Convert the model from the Hub."
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
    """Return the tokens that end a response, as llama.cpp finds them: by number and by name."""
    tokens = _value(reader, "tokenizer.ggml.tokens")
    kinds = _value(reader, "tokenizer.ggml.token_type")
    ends = {_token(reader, name, tokens) for name in ("eos", "eot", "eom")} - {None}
    ends |= {i for i, t in enumerate(tokens) if t in _ENDS and kinds[i] == _CONTROL}
    return sorted(ends, reverse=True)


def read_config(reader: "GGUFReader", dtype: str, where: str) -> dict[str, object]:
    """Return the ``config.json`` of the file, as ``config.read_config`` returns that of a folder.

    Args:
        where: names the file in errors.

    Raises:
        ConversionError, ModelError, UnsupportedModelError: a value is missing, wrong, or one that
            mlx-lm does not compute with.
    """
    names = {tensor.name for tensor in reader.tensors}
    tokens = _value(reader, "tokenizer.ggml.tokens")
    _value(reader, "tokenizer.ggml.eos_token_id")
    family = _value(reader, "general.architecture")
    size = contents(reader, f"{family}.attention.key_length")
    window = contents(reader, f"{family}.attention.sliding_window") or None
    pattern = contents(reader, f"{family}.attention.sliding_window_pattern")
    config = {
        "architectures": [_ARCHITECTURES[family][0]],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": _count(reader, f"{family}.embedding_length"),
        "intermediate_size": _count(reader, f"{family}.feed_forward_length"),
        "num_hidden_layers": _count(reader, f"{family}.block_count"),
        "num_attention_heads": _count(reader, f"{family}.attention.head_count"),
        "num_key_value_heads": _count(reader, f"{family}.attention.head_count_kv"),
        "max_position_embeddings": _count(reader, f"{family}.context_length"),
        "rms_norm_eps": round(
            float(_value(reader, f"{family}.attention.layer_norm_rms_epsilon")), 12
        ),
        "rope_theta": float(_value(reader, f"{family}.rope.freq_base")),
        "vocab_size": len(tokens),
        "tie_word_embeddings": "output.weight" not in names,
        "eos_token_id": _end_tokens(reader),
        "rope_scaling": _rope_scaling(reader),
        "torch_dtype": dtype,
        # Without it, transformers takes the folder for an old one and warns of its tokenizer.
        "transformers_version": metadata.version("transformers"),
    }
    if family == "llama":
        parts = ("attn_q", "attn_k", "attn_v", "attn_output")
        biased = [part for part in parts if f"blk.0.{part}.bias" in names]
        if biased and len(biased) < len(parts):
            missing = next(part for part in parts if part not in biased)
            raise ConversionError(
                f"{where} has biases on {biased[0]}, but none on {missing}: mlx-lm's Llama has all four or none. "
                "Convert the model from the Hub."
            )
        config |= {
            f"{part}_bias": f"blk.0.{tensor}.bias" in names
            for part, tensor in (("attention", "attn_q"), ("mlp", "ffn_up"))
        }
    if family != "qwen2" and size is not None:
        config["head_dim"] = size
    if window is not None:
        config |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
        if isinstance(pattern, list):
            kinds = ("full_attention", "sliding_attention")
            config["layer_types"] = [kinds[bool(windowed)] for windowed in pattern]
    config = check_config(config, where)
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        found = contents(reader, f"{family}.{key}")
        if found not in (None, size):
            raise ConversionError(
                f"{family}.{key} is {str(found)[:20]}, expected {size}, the width of a head: mlx-lm has no "
                "other. Convert the model from the Hub."
            )
    return config


def _rope_scaling(reader: "GGUFReader") -> dict[str, object] | None:
    """Return the scaling of which the file has the result: by how much each frequency is divided.

    Raises:
        ConversionError: it is not Llama 3's.
    """
    found = next((tensor.data for tensor in reader.tensors if tensor.name == _ROPE), None)
    if found is None:
        return None
    divisors = np.asarray(found, np.float64).ravel()
    factor = float(divisors.max())
    theta = float(_value(reader, f"{_value(reader, 'general.architecture')}.rope.freq_base"))
    waves = 2 * np.pi * theta ** (np.arange(len(divisors)) / len(divisors))
    low, high, context = _LLAMA3.values()
    smooth = np.clip((context / waves - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(divisors, expected, rtol=1e-3):
        raise ConversionError(
            f"{_ROPE} does not hold Llama 3's stretched rotary embedding. Convert the model from the Hub."
        )
    return {"rope_type": "llama3", "factor": round(factor, 3), **_LLAMA3}


def words_of(document: Mapping[str, Any]) -> str | None:
    """Return the name in ``WORDS`` of the rules of a ``tokenizer.json``; ``None`` for others."""
    cutting = json.dumps(document.get("pre_tokenizer"), ensure_ascii=False).replace("\\\\", "\\")
    for name, words in WORDS.items():
        if words.split is not None and words.split in cutting:
            return name
    steps = (document.get("pre_tokenizer") or {}).get("pretokenizers") or []
    if [step.get("type") for step in steps] != ["Digits", "ByteLevel"]:
        return None
    digits, byte_level = steps
    alike = digits.get("individual_digits") and byte_level.get("use_regex")
    return "smollm" if alike and not byte_level.get("add_prefix_space") else None


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
    words = WORDS[contents(reader, "tokenizer.ggml.pre") or "qwen2"]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=words.whole))
    if words.nfc:
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Digits(individual_digits=True)
    if words.split is not None:
        split = pre_tokenizers.Split(Regex(words.split), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words.split is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for i, token in special.items():
        tokenizer.add_tokens([AddedToken(token, special=kinds[i] == _CONTROL, normalized=False)])
    begin = _token(reader, "bos", tokens)
    named = contents(reader, "tokenizer.ggml.add_bos_token")
    if begin is not None and (words.begins if named is None else named):
        first = processors.TemplateProcessing(
            single=f"{tokens[begin]} $A", special_tokens=[(tokens[begin], begin)]
        )
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, first])
    config: dict[str, object] = {
        "tokenizer_class": "Qwen2Tokenizer" if words.nfc else "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": None if begin is None or words.nfc else tokens[begin],
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[_token(reader, "eos", tokens)],
        "model_max_length": int(
            _value(reader, f"{_value(reader, 'general.architecture')}.context_length")
        ),
    }
    if (padding := _token(reader, "padding", tokens)) is not None:
        config["pad_token"] = tokens[padding]
    if template := contents(reader, "tokenizer.chat_template"):
        config["chat_template"] = template
    return tokenizer, config
