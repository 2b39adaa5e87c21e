"""Write a tiny random Qwen2 as a GGUF file, as llama.cpp's converter does."""

import numpy as np
import pytest
from mlx.utils import tree_flatten

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem == "model.embed_tokens":
        return f"token_embd.{kind}"
    if stem == "lm_head":
        return f"output.{kind}"
    if stem == "model.norm":
        return f"output_norm.{kind}"
    _, _, number, part = stem.split(".", 3)
    return f"blk.{number}.{GGUF_NAMES[part]}.{kind}"


def vocabulary():
    """Bytes, two merges, specials, and an unused slot: as llama.cpp writes it."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "he", "hel"]
    kinds = [1] * len(tokens)
    tokens += ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "[PAD262]"]
    return tokens, [*kinds, 3, 3, 3, 4, 5], ["h e", "he l"]


def write_gguf(
    path, model, *, architecture="qwen2", quantised=False, leave_out=(), extra=(), also=None
):
    writer = gguf.GGUFWriter(path, architecture)
    args = model.args
    tokens, kinds, merges = vocabulary()
    fields = {
        "block_count": lambda: writer.add_block_count(args.num_hidden_layers),
        "context": lambda: writer.add_context_length(512),
        "hidden": lambda: writer.add_embedding_length(args.hidden_size),
        "mlp": lambda: writer.add_feed_forward_length(args.intermediate_size),
        "heads": lambda: writer.add_head_count(args.num_attention_heads),
        "kv heads": lambda: writer.add_head_count_kv(args.num_key_value_heads),
        "rope": lambda: writer.add_rope_freq_base(args.rope_theta),
        "eps": lambda: writer.add_layer_norm_rms_eps(args.rms_norm_eps),
        "model": lambda: writer.add_tokenizer_model("gpt2"),
        "tokens": lambda: writer.add_token_list(tokens),
        "kinds": lambda: writer.add_token_types(kinds),
        "merges": lambda: writer.add_token_merges(merges),
        "eos": lambda: writer.add_eos_token_id(tokens.index("<|im_end|>")),
        "pad": lambda: writer.add_pad_token_id(tokens.index("<|endoftext|>")),
        "template": lambda: writer.add_chat_template(TEMPLATE),
    }
    for name, add in fields.items():
        if name not in leave_out:
            add()
    if also:
        also(writer)
    for name, array in [*tree_flatten(model.parameters()), *extra]:
        values = np.array(array)
        kind = gguf.GGMLQuantizationType.Q8_0
        if quantised and values.ndim == 2:
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name) if "." in name else name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
