"""Read the configuration of a model folder as transformers does. No mlx.

transformers is the reference: what a key means, and what its absence means, is what its
``Qwen2Config`` and ``modeling_qwen2`` make of it, and those of the other families of ``RULES``. mlx-lm
reads fewer keys and has other defaults, so ``read_config`` returns a form that both read alike, and
refuses what mlx-lm cannot compute. The configuration of any other family is left to mlx-lm.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import (
    ConversionError,
    DenseSteerError,
    InputError,
    ModelError,
    UnsupportedModelError,
)
from ..files import parse_object
from ..text import cause
from .weights import Tensor, read_tensors, same_bytes

RECORD = "densesteer.json"  # what `convert` and `bake` write beside the weights
BAKED = "densesteer"  # the key of a baked folder's config.json that holds its steering

_COUNTS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class _Rules:
    """How transformers reads the ``config.json`` of a family, where mlx-lm would read it otherwise.

    Args:
        name: of the family, in errors.
        defaults: of transformers' configuration; the other counts it lacks are refused.
        head: whether ``head_dim`` may differ from ``hidden_size / num_attention_heads``.
        unrotated: whether a window is that of the layers without a rotary embedding (``no_rope_layers``).
        window: whether transformers attends to a window: never, always, or with ``use_sliding_window``.
        unread: keys that transformers honours and mlx-lm does not, with the value that changes nothing.
    """

    name: str
    defaults: Mapping[str, object]
    head: bool = True
    window: Literal["never", "always", "asked"] = "never"
    unrotated: bool = False
    unread: Mapping[str, object] = field(default_factory=dict)


_USUAL = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
RULES = {
    "qwen2": _Rules(
        "Qwen2",
        {**_USUAL, "max_position_embeddings": 32768, "num_key_value_heads": 32},
        head=False,
        window="asked",
    ),
    "qwen3": _Rules(
        "Qwen3",
        {**_USUAL, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
        window="asked",
        unread={"attention_bias": False},
    ),
    "llama": _Rules(
        "Llama", {**_USUAL, "max_position_embeddings": 2048, "num_key_value_heads": None}
    ),
    "mistral": _Rules(
        "Mistral",
        {
            **_USUAL,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        window="always",
        unread={"attention_bias": False, "mlp_bias": False},
    ),
    "smollm3": _Rules(
        "SmolLM3",
        {
            **_USUAL,
            "rope_theta": 2000000.0,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
        },
        window="asked",
        unrotated=True,
    ),
}
_SIZES = {"hidden_size", "num_hidden_layers", "max_position_embeddings"}
# Families without rules of which a configuration as transformers 5 writes it was compared with transformers, without a
# stretched context (tests/model/test_stock_families.py)
COMPARED = frozenset(
    [
        "cohere",
        "cohere2",
        "ernie4_5",
        "gemma3_text",
        "glm4",
        "granite",
        "granitemoe",
        "helium",
        "hunyuan_v1_dense",
        "mixtral",
        "olmo2",
        "olmo3",
        "olmoe",
        "phi3",
        "qwen2_moe",
        "qwen3_moe",
    ]
)
_IGNORED = ("rope_parameters", "rope_traditional", "partial_rotary_factor")
_REMEDY = "Correct it, or download it again."
_FILES = {  # hints for files that users mistake for a model
    ".gguf": "is a GGUF file. Convert it with `densesteer convert {}`.",
    ".npz": "is a steering vector's file. A model is a folder.",
    ".mlxfn": "is a function file, which programs run (docs/export-function.md). Name the model's folder.",
    ".safetensors": "is one file of a model. Name its folder.",
}
_FLOATS = ("BF16", "F16", "F32")
_shown = reprlib.Repr()
_shown.maxstring = 60


def read_config(folder: Path) -> dict[str, object]:
    """Return the ``config.json`` of a model folder, as mlx-lm has to read it.

    Of a family of ``RULES`` every key that changes what the model computes has the value that transformers uses:
    defaults are filled in, the ``rope_parameters`` of transformers 5 become ``rope_theta`` and
    ``rope_scaling``, and ``tie_word_embeddings`` says what the weight files say.

    Raises:
        ModelError: not a model folder, or its configuration or weight files are damaged.
        UnsupportedModelError: it computes something that mlx-lm cannot; the message names the key.
    """
    return read_folder(folder)[0]


def read_folder(folder: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Return what ``read_config`` and ``read_tensors`` return; raises as they do."""
    try:
        config = parse_config(read_file(folder), str(folder))
        _check_generation(folder, config["vocab_size"])
        tensors = read_tensors(folder)
        head = tensors.get("lm_head.weight")
        embedding = tensors.get("model.embed_tokens.weight")
        tied = config.get("tie_word_embeddings", head is None)
        if tied and head is not None and embedding is not None:
            tied = same_bytes(head, embedding)  # transformers ties no matrices that differ
    except OSError as error:
        raise ModelError(
            f"{folder}: cannot be read ({error.strerror}). Check the folder's permissions."
        ) from error
    if not config.get("quantization") and not config.get("quantization_config"):
        for name, tensor in tensors.items():
            if tensor.dtype not in _FLOATS:
                raise UnsupportedModelError(
                    f"{folder}: {name[:80]} is {tensor.dtype}, expected one of {', '.join(_FLOATS)}. "
                    "Get the model's original weights."
                )
    return config | {"tie_word_embeddings": tied}, tensors


def _check_generation(folder: Path, vocabulary: int) -> None:
    """Raise ``ModelError`` for end tokens that are none: mlx-lm prefers them to those of config.json."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return
    where = f"{folder}: {file.name}"
    given = parse_object(file.read_bytes(), where, error=ModelError, remedy=_REMEDY)
    if not _are_ids(given.get("eos_token_id"), vocabulary):
        found = f"eos_token_id {_shown.repr(given['eos_token_id'])}"
        raise _wrong(where, found, f"ids below {vocabulary}")


def read_file(folder: Path) -> bytes:
    """Return the ``config.json`` of a model folder; raise ``ModelError`` if it has none, and say what it is."""
    file = folder / "config.json"
    if file.is_file():
        return file.read_bytes()
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        try:
            base = parse_object(adapter.read_bytes(), "").get("base_model_name_or_path")
        except InputError:
            base = None
        raise ModelError(
            f"{folder}: is a LoRA adapter (adapter_config.json), no model. Merge it into its model"
            f"{f' {_shown.repr(base)}' if isinstance(base, str) else ''} (PEFT: merge_and_unload and "
            "save_pretrained; mlx-lm: mlx_lm.fuse) and name the merged folder."
        )
    raise ModelError(
        f"{folder}: no config.json, so no model folder. Expected one that "
        "`densesteer convert` or `hf download` wrote."
    )


def check_adapter(folder: Path) -> None:
    """Raise ``ModelError`` unless the ``adapter_config.json`` of a folder is one of mlx-lm's."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise ModelError(
            f"{folder}: no adapter_config.json, so no adapter. Expected a folder that mlx_lm.lora wrote."
        )
    config = parse_object(file.read_bytes(), str(file), error=ModelError, remedy=_REMEDY)
    if "peft_type" in config:
        found = f"is an adapter of PEFT (peft_type {_shown.repr(config['peft_type'])})"
    elif config.get("fine_tune_type") != "full" and "num_layers" not in config:
        found = "has no num_layers in its adapter_config.json"
    else:
        return
    raise ModelError(
        f"{folder}: {found}, expected an adapter that mlx_lm.lora wrote. Merge another one into its model "
        "(PEFT: merge_and_unload and save_pretrained), and load the merged folder instead."
    )


def parse_config(content: bytes, name: str) -> dict[str, object]:
    """Return a parsed ``config.json``, as ``read_config`` but for what only the weight files say."""
    where = f"{name}: config.json"
    config = parse_object(content, where, error=ModelError, remedy="Download it again.")
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise ModelError(
            f"{name}: its config.json names no model_type, so it is no language model."
        )
    if "model_file" in config:
        raise UnsupportedModelError(
            f"{name}: has its own model code ({_shown.repr(config['model_file'])}), which is never run. "
            "Use the model's original folder."
        )
    return check_config(config, where)


def check_config(given: Mapping[str, object], where: str) -> dict[str, object]:
    """Return a model's configuration in the form that ``read_config`` describes.

    Args:
        where: names the file in errors.

    Raises:
        ModelError: a value of a wrong type or size.
        UnsupportedModelError: a value that mlx-lm does not compute with.
    """
    rules = RULES.get(given["model_type"])
    config = {**rules.defaults, **given} if rules else dict(given)
    if rules and config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = config.get("num_attention_heads")

    def check(key: str, right: bool, expected: str) -> None:
        if not right:
            found = f"{key} {_shown.repr(config[key])}" if key in config else f"no {key}"
            raise _wrong(where, found, expected)

    for key in _COUNTS if rules else ("vocab_size", *(_SIZES & config.keys())):
        value = config.get(key)
        check(key, type(value) is int and 0 < value < 2**31, "a whole number above 0")
    for key in ("tie_word_embeddings", "use_sliding_window", "attention_bias", "mlp_bias"):
        check(key, type(config.get(key, False)) is bool, "true or false")
    check("architectures", all(type(v) is str for v in _list(config.get("architectures"))), "names")
    known = config["vocab_size"]
    check("eos_token_id", _are_ids(config.get("eos_token_id"), known), f"ids below {known}")
    method = config.get("quantization")
    sizes = [method.get(k) if isinstance(method, dict) else None for k in ("bits", "group_size")]
    right = method is None or all(type(size) is int and size > 0 for size in sizes)
    check("quantization", right, "bits and group_size, as mlx-lm writes them")
    for key in ("torch_dtype", "dtype"):
        check(key, isinstance(config.get(key), str | None), "a name such as bfloat16")
    _check_quantization(config, where)
    absent = [key for key in ("quantization", "quantization_config") if config.get(key) is None]
    config = {key: value for key, value in config.items() if key not in absent}
    if rules is None:
        return _old_names(config)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    check("num_hidden_layers", config["num_hidden_layers"] <= 10_000, "at most 10000")
    check("num_key_value_heads", heads % kv_heads == 0, f"a divisor of the {heads} attention heads")
    size = config["hidden_size"] // heads
    if rules.head and config.get("head_dim") is not None:
        size = config["head_dim"]
        check("head_dim", type(size) is int and 0 < size < 2**16, "a whole number above 0")
    check("num_attention_heads", size > 0 and size % 2 == 0, "heads of an even size")
    check("rms_norm_eps", _is_number(config["rms_norm_eps"]), "a number")
    if rules.unrotated and config.get("no_rope_layers") is not None:
        turned = config["no_rope_layers"]
        right = isinstance(turned, list) and len(turned) == config["num_hidden_layers"]
        right = right and all(one in (0, 1) for one in turned)
        check("no_rope_layers", right, "0 or 1 for each layer")
    _check_arithmetic(config, rules, where)
    config = {k: v for k, v in config.items() if k not in _IGNORED} | _rope(config, where)
    if rules.head:
        config["head_dim"] = size
    if rules.window != "asked":  # checked to hide nothing; mlx-lm's Llama would obey these
        config = {k: v for k, v in config.items() if k not in ("layer_types", "sliding_window")}
    return config


def _wrong(where: str, found: str, expected: str) -> ModelError:
    return ModelError(f"{where} has {found}, expected {expected}. {_REMEDY}")


def _unsupported(where: str, key: str, value: object, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where} has {key} {_shown.repr(value)}, which mlx-lm does not compute; expected {expected}."
    )


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _are_ids(value: object, vocabulary: int) -> bool:
    return all(type(one) is int and 0 <= one < vocabulary for one in _list(value))


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _check_arithmetic(config: Mapping[str, object], rules: _Rules, where: str) -> None:
    """Raise ``UnsupportedModelError`` for a key that transformers honours and mlx-lm ignores."""
    size = config["hidden_size"] // config["num_attention_heads"]
    wanted: list[tuple[str, tuple, str]] = [
        ("hidden_act", ("silu", "swish"), "silu"),
        ("is_causal", (None, True), "true: every token sees only those before it"),
        ("per_layer_config", (None, {}), "one configuration for all layers"),
    ]
    if not rules.head:
        heads = f"hidden_size / num_attention_heads, which is {size}"
        wanted.append(("head_dim", (None, size), heads))
    wanted += [(k, (None, value), str(value).lower()) for k, value in rules.unread.items()]
    for key, values, expected in wanted:
        if config.get(key) not in values:
            raise _unsupported(where, key, config[key], expected)
    _check_window(config, rules, where)


def _check_quantization(config: Mapping[str, object], where: str) -> None:
    method = config.get("quantization_config")
    if method and config.get("quantization") is None:
        kind = method.get("quant_method") if isinstance(method, dict) else method
        if kind != "awq" or str(method.get("version", "gemm")).lower() != "gemm":
            raise UnsupportedModelError(
                f"{where} has weights quantised with {_shown.repr(kind)}, which mlx-lm does not read. Convert "
                "the model's original weights (densesteer convert)."
            )


def _check_window(config: Mapping[str, object], rules: _Rules, where: str) -> None:
    """Raise ``UnsupportedModelError`` if a layer attends to less than the whole context."""
    if rules.window == "never":
        return
    layers, context = config["num_hidden_layers"], config["max_position_embeddings"]
    asked = rules.window == "always" or config.get("use_sliding_window")
    window = config.get("sliding_window", 4096) if asked else None
    kinds, first = config.get("layer_types"), config.get("max_window_layers", 28)
    if rules.window == "always" or (rules.unrotated and kinds is None):
        windowed = window is not None
    elif kinds is None:
        windowed = window is not None and not (type(first) is int and first >= layers)
    else:
        known = isinstance(kinds, list) and len(kinds) == layers
        if not known or any(k not in ("full_attention", "sliding_attention") for k in kinds):
            raise _unsupported(where, "layer_types", kinds, f"full_attention {layers} times")
        windowed = "sliding_attention" in kinds
    if windowed and not (type(window) is int and window >= context):
        raise UnsupportedModelError(
            f"{where} has sliding-window attention (sliding_window {_shown.repr(window)}), but "
            f"mlx-lm's {rules.name} has full attention only, so it would compute something else. Use a model "
            "without it, or set max_position_embeddings to at most sliding_window: in so short a "
            "context the window hides nothing."
        )


def _rope(config: Mapping[str, object], where: str) -> dict[str, object]:
    """Return ``rope_theta`` and ``rope_scaling`` in a form that transformers and mlx-lm read alike.

    As in transformers 5, ``rope_scaling`` takes precedence over ``rope_parameters``, a ``rope_theta``
    inside either over the one outside, and ``original_max_position_embeddings`` outside over one
    inside.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise UnsupportedModelError(
            f"{where} has rope_parameters {_shown.repr(given)}; expected one rotary embedding "
            "for all layers."
        )
    kind = given.get("rope_type", given.get("type", "default"))

    def number(key: str, otherwise: float | None = None) -> float:
        value = given.get(key)
        value = otherwise if value is None else value
        if not _is_number(value) or not value:
            found = (
                f"a rotary embedding of type {_shown.repr(kind)} with {key} {_shown.repr(value)}"
            )
            raise _wrong(where, found, "a number above 0")
        return value

    theta = number("rope_theta", config["rope_theta"])
    for place in (given, config):
        if place.get("partial_rotary_factor") not in (None, 1):
            found = place["partial_rotary_factor"]
            raise _unsupported(where, "partial_rotary_factor", found, "1: whole heads are rotated")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        expected = "default, linear, dynamic, llama3 or yarn"
        raise _unsupported(where, "a rotary embedding of type", kind, expected)
    scaling = {"type": kind, "rope_type": kind, "factor": number("factor")}
    if kind in ("llama3", "yarn"):
        outside = config.get("original_max_position_embeddings")
        given = given if outside is None else given | {"original_max_position_embeddings": outside}
        scaling["original_max_position_embeddings"] = number(
            "original_max_position_embeddings", config["max_position_embeddings"]
        )
    if kind == "llama3":
        scaling |= {key: number(key) for key in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        scaling |= {key: number(key, n) for key, n in (("beta_fast", 32), ("beta_slow", 1))}
        if given.get("truncate", True) is not True:
            raise _unsupported(where, "truncate of yarn", given["truncate"], "true")
        factor = scaling["factor"]
        attention = number("attention_factor", _yarn_attention(given, factor))
        if factor <= 1 and attention != 1:
            raise _unsupported(where, "attention_factor of yarn", attention, "1 at factor 1")
        # mlx-lm takes the attention factor from mscale alone; transformers takes it as it is.
        scaling["attention_factor"] = attention
        scaling["mscale"] = (attention - 1) / (0.1 * math.log(factor)) if factor > 1 else 1.0
    return {"rope_theta": theta, "rope_scaling": scaling}


def _old_names(config: Mapping[str, object]) -> dict[str, object]:
    """Return a configuration as transformers 5 writes it under the names of transformers 4, which mlx-lm reads.

    Without them mlx-lm would take its own defaults for a family that has no rules here.
    """
    given = config.get("rope_parameters")
    given = given if isinstance(given, dict) else {}
    local = given.get("sliding_attention")
    own = given.get("full_attention", given)
    found: dict[str, object] = {}
    if isinstance(local, dict):
        found["rope_local_base_freq"] = local.get("rope_theta")
    if isinstance(own, dict):
        for key in ("rope_theta", "partial_rotary_factor"):
            found[key] = own.get(key)
        if own.get("rope_type", "default") != "default":
            found["rope_scaling"] = own
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and "full_attention" in kinds:
        period = kinds.index("full_attention") + 1
        regular = all(
            (k == "full_attention") == ((i + 1) % period == 0) for i, k in enumerate(kinds)
        )
        found["sliding_window_pattern"] = period if regular else None
    found["num_experts"] = config.get("num_local_experts")
    given = {key: value for key, value in config.items() if value is not None}
    return dict(config) | {k: v for k, v in found.items() if v is not None} | given


def for_batches(config: Mapping[str, object]) -> dict[str, object]:
    """Return a configuration without a ``dynamic`` rotary embedding.

    It changes nothing within ``max_position_embeddings``, and mlx-lm's cannot serve a batch.
    """
    scaling = config.get("rope_scaling")
    dynamic = isinstance(scaling, dict) and scaling.get("type") == "dynamic"
    return dict(config) | ({"rope_scaling": None} if dynamic else {})


def _yarn_attention(given: Mapping[str, object], factor: float) -> float | None:
    """Return the attention factor that transformers derives, ``None`` if the numbers are none."""
    own, shared = given.get("mscale") or 0, given.get("mscale_all_dim") or 0
    if not _is_number(own) or not _is_number(shared):
        return None
    if not (own and shared):
        own, shared = 1, 0
    scale = 0.1 * math.log(max(factor, 1))
    return (scale * own + 1) / (scale * shared + 1)


def recorded(folder: Path) -> dict[str, object]:
    """Return the record that ``densesteer convert`` or ``bake`` wrote; empty for other folders."""
    try:
        return parse_object((folder / RECORD).read_bytes(), "")
    except (OSError, InputError):
        return {}


def origin(path_or_repo: str | Path) -> str:
    """Return the name of the model that a folder was converted from, or else the folder's name.

    A baked folder keeps its own name: it is another model.
    """
    path = Path(path_or_repo).expanduser()
    if not path.is_dir():
        return str(path_or_repo)
    record = recorded(path)
    return str((not record.get("baked") and record.get("source")) or path.resolve().name)


def check_target(
    folder: Path, source: str | Path, force: bool, error: type[DenseSteerError] = ConversionError
) -> None:
    """Raise ``error`` if ``folder`` may not be written: only ``force`` replaces a folder of densesteer's."""
    if not folder.name or folder.is_symlink():
        raise error(f"{folder}: expected the name of a folder, found none or a link. Name it.")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    there = Path(source).expanduser().resolve()
    # samefile, because a Mac's disk ignores case: two spellings may name one folder.
    if any(folder.samefile(place) for place in (there, *there.parents) if place.exists()):
        raise error(f"{folder}: holds the source itself. Choose another name.")
    if not folder.is_dir() or not (folder / RECORD).is_file():
        raise error(
            f"{folder}: is no model that densesteer wrote, so it is not replaced. "
            "Choose another name, or remove it yourself."
        )
    if not force:
        raise error(
            f"{folder}: exists already. Use it, choose another name, or replace it (force)."
        )


def local_folder(path_or_repo: str | Path) -> Path | None:
    """Return the folder of a model on this machine; ``None`` if only the Hub can have it.

    Raises:
        ModelError: neither a folder nor a Hub id.
    """
    path = local_path(path_or_repo)
    if path.is_dir():
        return path
    if path.is_file():
        found = _FILES.get(path.suffix, "is a file, expected a folder.")
        raise ModelError(f"{path}: {found.format(path)}")
    if not is_hub_id(str(path_or_repo)):
        raise ModelError(
            f"{path_or_repo}: no such folder. Expected one that `densesteer convert` wrote, or a Hub id "
            "such as Qwen/Qwen2.5-1.5B-Instruct."
        )
    return None


def local_path(path_or_repo: str | Path) -> Path:
    """Return a path that can be looked up; raise ``ModelError`` for a name that the system refuses."""
    try:
        path = Path(path_or_repo).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # too long, or the home folder of no user
        shown = str(path_or_repo)[:100]
        raise ModelError(f"{shown}: is no path ({cause(error)}). Name a model's folder.") from error
    return path


def is_hub_id(text: str) -> bool:
    """Tell whether ``text`` can only be a Hub id (``ORG/NAME``), not a mistyped path."""
    path = Path(text)
    is_path = text.startswith((".", "~", "/")) or path.parts[:1] == ("converted",)
    return len(path.parts) == 2 and not is_path and path.suffix not in (".gguf", ".npz", ".pt")
