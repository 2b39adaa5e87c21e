"""A baked checkpoint as a GGUF file of the architecture ``llama``, for llama.cpp.

Matrices keep the model's dtype; norms and biases are float32. llama.cpp's ``llama`` rotates
neighbouring pairs where Hugging Face rotates halves, so the rows of q and k, and their biases, are
reordered.

Format: the GGUF specification of ggml. Tensor names and the order of rows are those of llama.cpp's
``convert_hf_to_gguf``; its loader reads the biases as optional tensors.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import ExportError
from ..files import atomic_path, parse_object
from ..model.gguf import BAKED_KEY, WORDS, gguf_name, words_of
from ..steering.formats.gguf import check_header, complete, contents, damage, gguf_package
from .closeness import differing

if TYPE_CHECKING:
    import gguf

ARCHITECTURE = "llama"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # token types of the GGUF specification
_DTYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}
Shards = Callable[[], Iterable[dict[str, mx.array]]]


def write(
    folder: Path,
    config: Mapping[str, object],
    shards: Shards,
    out: Path,
    name: str,
    record: str,
    end_of_turn: int | None = None,
) -> None:
    """Write the file; ``out`` changes only once the new file is complete.

    Args:
        folder: the source's folder, for its tokenizer.
        config: what ``llama.llama_config`` returns.
        shards: returns the tensors of ``llama.llama_shards``, dequantised; called twice.
        name: the model's name.
        record: JSON that ``recorded`` returns.
        end_of_turn: the chat template's, where the tokenizer's end token is another.

    Raises:
        ExportError: the extra ``gguf`` is missing, or the tokenizer is not Qwen2's.
    """
    gguf = gguf_package(out, ExportError)
    if config["model_type"] != ARCHITECTURE:  # llama.cpp would rotate every layer of a SmolLM3
        raise ExportError(
            f"{name}: a baked {config['model_type']} model cannot be written to GGUF. Use the format hf."
        )
    with atomic_path(out) as made:
        writer = _writer(gguf, made, folder, config, end_of_turn)
        writer.add_name(f"{name}, steered")
        writer.add_string(BAKED_KEY, record)
        for tensor, array in _tensors(shards, config):
            dtype = gguf.GGMLQuantizationType[_DTYPES[array.dtype]]
            writer.add_tensor_info(tensor, array.shape, np.dtype("f4"), array.nbytes, dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, array in _tensors(shards, config):  # again, so that one at a time is in memory
            writer.write_tensor_data(_numpy(array))
        writer.close()
        with complete(made, out):
            check_header(made, ExportError)
            gguf.GGUFReader(made)  # refuses a file without all its tensors


def differences(
    path: Path,
    folder: Path,
    config: Mapping[str, object],
    shards: Shards,
    end_of_turn: int | None = None,
) -> list[str]:
    """Compare every tensor and field of a file with what ``write`` would write, bit for bit."""
    gguf = gguf_package(path, ExportError)
    fields = _writer(gguf, None, folder, config, end_of_turn).kv_data[0]
    with damage(path, ExportError):
        reader = gguf.GGUFReader(path)
        found = {tensor.name: tensor for tensor in reader.tensors}
        problems = [
            f"{key} is another"
            for key, wanted in fields.items()
            if not _same(contents(reader, key), wanted.value)
        ]
    return problems + differing(
        found,
        _tensors(shards, config),
        lambda tensor, array: tensor.data.tobytes() == _numpy(array).tobytes(),
    )


def _same(found: object, wanted: object) -> bool:
    return found == (float(np.float32(wanted)) if isinstance(wanted, float) else wanted)


def recorded(path: Path) -> dict[str, object] | None:
    """Return the record of a file that ``write`` wrote, ``None`` for another file.

    Raises:
        ExportError: no complete GGUF file.
    """
    check_header(path, ExportError)
    with damage(path, ExportError):
        text = contents(gguf_package(path, ExportError).GGUFReader(path), BAKED_KEY)
        if text is None:
            return None
        return parse_object(text, f"{path}: {BAKED_KEY}", error=ExportError)


def check_target(out: Path, force: bool) -> None:
    """Refuse to replace a file without ``force``, and any file that ``write`` did not write."""
    gguf_package(out, ExportError)
    if not out.exists():
        return
    if not force:
        raise ExportError(f"{out}: exists already. Choose another name, or replace it (force).")
    record = None
    with contextlib.suppress(ExportError, OSError):  # a folder, another file, or a damaged one
        record = recorded(out)
    if record is None:
        raise ExportError(
            f"{out}: is no file that densesteer baked, so it is not replaced. Choose another name, "
            "or remove the file yourself."
        )


def _writer(
    gguf: Any, out: Path | None, folder: Path, config: Mapping[str, object], end_of_turn: int | None
) -> "gguf.GGUFWriter":
    """Return a writer that has the fields of the model and its tokenizer."""
    writer = gguf.GGUFWriter(out, ARCHITECTURE)
    _add_shape(writer, config)
    _add_tokenizer(writer, folder, int(config["vocab_size"]), end_of_turn)
    return writer


def _add_shape(writer: "gguf.GGUFWriter", config: Mapping[str, object]) -> None:
    if config.get("rope_scaling"):
        raise ExportError(
            f"rope_scaling {config['rope_scaling']!r}: cannot be written to GGUF. Use a model without a "
            "stretched context, or the format hf."
        )
    heads = int(config["num_attention_heads"])
    writer.add_context_length(int(config.get("max_position_embeddings", 32768)))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config["num_key_value_heads"]))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(float(config["rope_theta"]))
    size = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(int(config["vocab_size"]))


def _add_tokenizer(
    writer: "gguf.GGUFWriter", folder: Path, size: int, end_of_turn: int | None
) -> None:
    tokens, kinds, merges, words, begins = _vocabulary(folder, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(begins)
    settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    adders = {
        "bos_token": writer.add_bos_token_id,
        "eos_token": writer.add_eos_token_id,
        "pad_token": writer.add_pad_token_id,
    }
    for key, add in adders.items():
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token in tokens:
            add(tokens.index(token))
    if end_of_turn is not None:
        writer.add_eot_token_id(end_of_turn)
    file = folder / "chat_template.jinja"
    template = file.read_text("utf-8") if file.is_file() else settings.get("chat_template")
    if isinstance(template, str):
        writer.add_chat_template(template)


def _vocabulary(folder: Path, size: int) -> tuple[list[str], list[int], list[str], str, bool]:
    """Return what ``tokenizer.json`` says: tokens, their types, merges, llama.cpp's name for its rules, and whether
    every text begins with a token.
    """
    document = json.loads((folder / "tokenizer.json").read_bytes())
    words = words_of(document)
    if words is None:
        raise ExportError(
            f"{folder}: its tokenizer cuts text into words by a rule that is not known here "
            f"({', '.join(WORDS)} are), so llama.cpp might cut it otherwise. Use the format hf."
        )
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [_UNUSED] * size
    for token, i in document["model"]["vocab"].items():
        tokens[i], kinds[i] = token, _NORMAL
    for added in document["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]]
    return tokens, kinds, merges, words, _begins(document.get("post_processor"))


def _begins(step: Mapping[str, Any] | None) -> bool:
    """Return whether a post-processor of ``tokenizer.json`` puts a token before every text."""
    if not step:
        return False
    if step.get("type") == "Sequence":
        return any(map(_begins, step["processors"]))
    return step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0]


def _tensors(shards: Shards, config: Mapping[str, object]) -> Iterator[tuple[str, mx.array]]:
    """Yield the tensors under llama.cpp's names, one after the other."""
    heads = {
        "q_proj": int(config["num_attention_heads"]),
        "k_proj": int(config["num_key_value_heads"]),
    }
    for shard in shards():
        for name in list(shard):
            array = shard.pop(name)
            part = name.split(".")[-2]
            if part in heads:
                array = _neighbours(array, heads[part])
            if array.ndim == 1:
                array = array.astype(mx.float32)
            yield gguf_name(name), array


def _neighbours(array: mx.array, heads: int) -> mx.array:
    """Reorder rows so that two that rotate together are neighbours."""
    rows = array.shape[0]
    return array.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)


def _numpy(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
