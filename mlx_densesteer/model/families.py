"""Which of mlx-lm's models can be steered, and how: found out from their code, not from a list of names.

A network can be steered if it is a stack of blocks ``h = block(h, mask, cache)`` between embeddings and
a final norm, and every block keeps keys and values. A block is ``plain`` if mlx-lm's code for it is that of Qwen2:

    h = x + attention(norm(x));  h + mlp(norm(h))

Then its last addition takes the vector along. Llama, Mistral, Qwen3, SmolLM3, Phi-3 and some thirty others are
plain. Any other block is computed by its own code, and the vector is added to what it returns.

Not covered: blocks with a recurrent state (Mamba, gated linear attention), and models of text with images.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from types import CodeType

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import BatchKVCache, KVCache, RotatingKVCache
from mlx_lm.utils import _get_classes

from ..errors import ModelError, UnsupportedModelError
from ..text import cause
from .config import COMPARED, RULES, for_batches

_PARTS = ("embed_tokens", "norm")
# Keys that change no number, whatever class reads them
_NEUTRAL = frozenset((
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "initializer_range", "use_cache",
    "router_aux_loss_coef", "quantization", "quantization_config", "rope_parameters", "rope_scaling", "layer_types",
    "max_position_embeddings", "tie_word_embeddings", "num_local_experts", "_sliding_window_pattern", "_name_or_path",
    "sliding_window_pattern", "rope_local_base_freq", "num_experts", "id2label", "label2id", "task_specific_params", "auto_map", "attn_implementation", "return_dict", "chunk_size_feed_forward",
))  # fmt: skip
_NEUTRAL_ENDS = ("_token_id", "_dropout", "_pdrop", "_loss_coef", "_jitter_noise")
# Keys that mlx-lm's classes do not read, with the values that they compute with
_AS_COMPUTED = {
    "hidden_act": ("silu",), "hidden_activation": ("gelu_pytorch_tanh",), "decoder_sparse_step": (1,),
    "pretraining_tp": (1,), "qkv_bias": (True,), "partial_rotary_factor": (1, 1.0),
}  # fmt: skip
_ROWS = 7  # as many as no model has heads
_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")


def _named(self, x, mask=None, cache=None):
    r = self.self_attn(self.input_layernorm(x), mask, cache)
    h = x + r
    r = self.mlp(self.post_attention_layernorm(h))
    out = h + r
    return out  # noqa: RET504


def _unnamed(self, x, mask=None, cache=None):
    r = self.self_attn(self.input_layernorm(x), mask, cache)
    h = x + r
    r = self.mlp(self.post_attention_layernorm(h))
    return h + r


@cache
def is_plain(block: type[nn.Module]) -> bool:
    """Tell whether the code of a block's class is that of Qwen2's."""
    code = getattr(block.__call__, "__code__", None)
    return code is not None and _does(code) in (_does(_named.__code__), _does(_unnamed.__code__))


def _does(code: CodeType) -> tuple:
    """Return what two functions that do the same have in common; docstrings and annotations do not count."""
    constants = tuple(one for one in code.co_consts if not isinstance(one, str))
    return code.co_code, code.co_names, code.co_varnames, code.co_argcount, constants


def decoder_blocks(network: nn.Module) -> dict[int, nn.Module]:
    """Return the blocks by layer number; under pipeline parallelism only this rank's own.

    Raises:
        ModelError: a network without ``model.layers``.
    """
    # mlx-lm's network.layers may be a slice copy; network.model.layers is the list itself.
    layers = getattr(getattr(network, "model", None), "layers", None)
    if not layers:
        raise ModelError(
            f"{type(network).__module__}.{type(network).__name__} has no model.layers; "
            "expected a text model as mlx_lm.load returns it."
        )
    return {i: block for i, block in enumerate(layers) if block is not None}


def empty_network(config: Mapping[str, object], name: str) -> nn.Module:
    """Return the stock network of a configuration if it can be steered. Needs no weights, and makes none.

    Args:
        config: what ``config.read_config`` returns.
        name: of the model, in errors.

    Raises:
        UnsupportedModelError: mlx-lm has no such model, or its blocks cannot steer; the message says why.
        ModelError: mlx-lm refuses the configuration.
    """
    kind = str(config["model_type"])[:60]
    try:
        model, arguments = _get_classes(dict(config))
    except (
        ValueError,
        AttributeError,
        SystemExit,
    ) as error:  # none such, no model, or it ends the process
        raise UnsupportedModelError(
            f"{name}: is a {kind} model, which mlx-lm does not have."
        ) from error
    try:
        network = model(arguments.from_dict(for_batches(config)))  # lazy: no weight is made
    except Exception as error:  # whatever a class of mlx-lm raises
        raise ModelError(
            f"{name}: mlx-lm refuses its config.json ({cause(error)}). Download it again."
        ) from error
    if reason := _obstacle(network):
        raise UnsupportedModelError(
            f"{name}: is a {kind} model, which cannot be steered: {reason}."
        )
    if config.get("max_position_embeddings") is None:
        raise ModelError(
            f"{name}: config.json has no max_position_embeddings, expected the length of the context. "
            "Download it again."
        )
    return network


def unlike(config: Mapping[str, object]) -> str | None:
    """Return a remark if mlx-lm may compute a model otherwise than transformers; ``None`` if it was compared.

    Families with rules (``config.RULES``) have none: what mlx-lm would compute otherwise is refused.
    """
    kind = str(config["model_type"])
    if kind in RULES:
        return None
    known = inspect.signature(_get_classes(dict(config))[1]).parameters
    windowed = config.get("use_sliding_window") is not False
    strange = [
        key
        for key, value in config.items()
        if value not in (None, False, [], {})
        and not (key in known or key.endswith(_NEUTRAL_ENDS) or key in _NEUTRAL)
        and not (key in _AS_COMPUTED and value in _AS_COMPUTED[key])
        and not (key in ("sliding_window", "max_window_layers") and not windowed)
    ]
    kinds = config.get("layer_types")
    if "layer_types" not in known and kinds is not None:
        full = isinstance(kinds, list) and all(one == "full_attention" for one in kinds)
        pattern = "sliding_window_pattern" in known and config.get("sliding_window_pattern")
        if not (full or pattern):
            strange.append("layer_types")
    if config.get("rope_scaling"):
        strange.append("a stretched context")
    if strange:
        return f"{', '.join(strange)} of its config.json may mean something else to mlx-lm than to transformers"
    return None if kind in COMPARED else f"mlx-lm's {kind} was not compared with transformers here"


def check_network(network: nn.Module) -> None:
    """Raise ``UnsupportedModelError`` unless a stock network can be steered; the message says why not."""
    if reason := _obstacle(network):
        kind = getattr(network, "model_type", type(network).__module__)
        raise UnsupportedModelError(f"a {kind} model cannot be steered: {reason}.")


def _obstacle(network: nn.Module) -> str | None:
    stack, args = getattr(network, "model", None), getattr(network, "args", None)
    if not getattr(stack, "layers", None):
        return "it is no single stack of text blocks (no model.layers)"
    if missing := [name for name in _PARTS if not hasattr(stack, name)]:
        return f"its stack of blocks has no {missing[0]}"
    if missing := [name for name in _SIZES if not hasattr(args, name)]:
        return f"its arguments name no {missing[0]}"
    if _parameters(type(stack).__call__)[1:2] != ["cache"]:
        return "its stack of blocks takes no cache after the tokens"
    for layer, block in decoder_blocks(network).items():
        if _parameters(type(block).__call__)[1:] != ["mask", "cache"]:
            wants = ", ".join(_parameters(type(block).__call__))
            return f"block {layer} takes ({wants}), expected (x, mask, cache)"
    caches = network.make_cache() if hasattr(network, "make_cache") else []
    if caches and len(caches) != len(decoder_blocks(network)):
        return f"it keeps {len(caches)} caches for {len(decoder_blocks(network))} blocks"
    for layer, one in enumerate(caches):
        if type(one) not in (KVCache, RotatingKVCache):
            return f"layer {layer} keeps a {type(one).__name__}, expected keys and values"
    rows = [BatchKVCache(list(range(_ROWS))) for _ in decoder_blocks(network)]
    try:
        network(mx.zeros((_ROWS, _ROWS), mx.int32), rows)  # lazy: only the shapes are worked out
    except Exception as error:  # whatever a class of mlx-lm raises
        return f"mlx-lm cannot compute rows of different lengths with it ({cause(error)})"
    return None


def _parameters(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)[1:]


def window_of(network: nn.Module) -> int | None:
    """Return how many tokens the blocks of a stock network attend to that attend to a window."""
    caches = network.make_cache() if hasattr(network, "make_cache") else []
    sizes = [one.max_size for one in caches if type(one) is RotatingKVCache]
    return min(sizes, default=None)


def parallel_ways(network: nn.Module) -> list[str]:
    """Return how mlx-lm can spread a network over several machines: ``tensor``, ``pipeline``."""
    ways = (("tensor", network, "shard"), ("pipeline", network.model, "pipeline"))
    return [way for way, owner, method in ways if hasattr(owner, method)]


def last_bias(block: nn.Module) -> mx.array | None:
    """Return the bias on a block's output, where ``bake`` writes a steering; an adapter may wrap its layer."""
    last = block.get("mlp", {}).get("down_proj", {})
    return getattr(last, "linear", last).get("bias")


def stream_dtype(network: nn.Module) -> mx.Dtype:
    """Return the dtype of the residual stream: that of the final norm."""
    return network.model.norm.weight.dtype


def head_of(network: nn.Module) -> Callable[[mx.array], mx.array]:
    """Return the function from the normed stream ``(..., hidden)`` to logits ``(..., vocabulary)``.

    It is what the network's own code does after its stack of blocks: tied embeddings, a scale, a cap.
    """

    def head(h: mx.array) -> mx.array:
        return type(network).__call__(_With(network, model=_With(network.model, output=h)), h)

    return head


class _With:
    """A module seen with one attribute replaced; called, it returns ``output``."""

    def __init__(self, module: nn.Module, **replaced: object):
        self.__dict__.update(replaced, _module=module)

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)

    def __call__(self, *_: object, **__: object) -> mx.array:
        return self.output


def cache_shapes(network: nn.Module) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the shapes of each layer's keys and values of one token, ``(1, heads, 1, width)``.

    Nothing is computed: mlx knows the shapes of what it would compute.
    """
    seen = [_Shapes() for _ in decoder_blocks(network)]
    network.model(mx.array([[0]]), seen)
    return [one.shapes for one in seen]


class _Shapes:
    """In place of a block's cache: notes the shapes of its keys and values."""

    offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.shapes = keys.shape, values.shape
        return keys, values
