"""A model that thinks, made by hand: each token has one successor, and a vector leads out of the thought.

It is a real Qwen2 whose blocks add nothing: the stream is the embedding of the last token and what is added,
and the row of the output layer for a token is the embedding of its predecessor. In a thought it writes ``tabc``
and a blank line for ever. After ``</think>`` it answers ``51``. The vector is the embedding of ``)``, whose
successor is ``</think>``: at strength 2 that is what follows any token.
"""

import json

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mlx_densesteer.cli.doctor import tiny_model
from mlx_densesteer.steering.vector import SteeringVector, VectorMeta

HIDDEN, LAYERS = 256, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")

# How three families behave: what begins an answer, and whether its thought is opened by the template. All
# leave the thoughts of earlier answers out. Written for these tests.
_EARLIER = (
    "{%- for m in messages %}{%- set said = m.content %}"
    "{%- if m.role == 'assistant' and '</think>' in said %}{%- set said = said.split('</think>')[-1].lstrip('\\n') %}"
    "{%- endif %}{{ '<|im_start|>' + m.role + '\\n' + said + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
)
TEMPLATES = {
    "R1": _EARLIER + "{{ '<think>\\n' }}{%- endif %}",
    "Qwen3": _EARLIER
    + "{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}",
    "SmolLM3": _EARLIER
    + "{%- if not (enable_thinking | default(true)) %}{{ '<think>\\n\\n</think>\\n' }}{%- endif %}{%- endif %}",
}


def make_folder(folder, template: str, *, keeps=False):
    """Write the model as an MLX folder in float32; return the folder. ``keeps`` earlier thoughts."""
    after = {
        "t": "a", "a": "b", "b": "c", "c": "ĊĊ", "ĊĊ": "t",
        ")": "</think>", "</think>": "5", "5": "1", "1": "<|im_end|>",
    }  # fmt: skip
    # The prompt ends with a line break: within the thought, or before the model opens it.
    after |= {"Ċ": "t"} if template == "R1" else {"Ċ": "<think>", "<think>": "t"}
    text = TEMPLATES[template]
    text = text.replace("'</think>' in said", "false") if keeps else text
    return make_clockwork(folder, text, SPECIAL[3:], after)


def make_clockwork(folder, template: str, words, after: dict[str, str], pieces=(), context=512):
    """Write a model whose tokens have successors, and the vector of the token ``)``; return the folder.

    ``words`` are further added tokens, no special ones; ``pieces`` further ordinary ones, with Ċ and Ġ.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "ĊĊ", *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    for token in SPECIAL[:3]:
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    for token in words:  # as Qwen3's, no special tokens
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "chat_template": template,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = tokenizer.get_vocab()
    size = len(ids)
    network = tiny_model(layers=LAYERS, hidden=HIDDEN, vocabulary=size)
    embedding = np.random.default_rng(0).normal(size=(size, HIDDEN)).astype(np.float32)
    head = 0.01 * np.random.default_rng(1).normal(size=(size, HIDDEN)).astype(np.float32)
    for token, next_one in after.items():
        head[ids[next_one]] += embedding[ids[token]] / HIDDEN
    weights = {}
    for name, array in tree_flatten(network.parameters()):
        silent = name.endswith(("o_proj.weight", "down_proj.weight"))
        weights[name] = mx.zeros_like(array) if silent else array
    weights["model.embed_tokens.weight"] = mx.array(embedding)
    weights["lm_head.weight"] = mx.array(head)
    weights["model.norm.weight"] = mx.ones((HIDDEN,))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "intermediate_size": 2 * HIDDEN, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "vocab_size": size, "rope_theta": 1000000.0,
        "tie_word_embeddings": False, "torch_dtype": "float32", "eos_token_id": ids["<|im_end|>"],
        "max_position_embeddings": context,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    vector = SteeringVector(
        dict.fromkeys(range(LAYERS), embedding[ids[")"]]),
        VectorMeta("Clockwork", HIDDEN, LAYERS),
        name="out",
    )
    vector.save(folder / "out.npz")
    return folder
