"""A steering baked into an ordinary checkpoint, which stock programs run.

The source's weights are written bit for bit, with the biases of ``llama.py``. A chat template's end of
turn that the source's end tokens lack (``Model.end_of_turn``) is added to them. Stock mlx-lm then runs
the result, and its logits must be those of run-time steering before the folder gets its name.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import mlx.core as mx
import mlx_lm

from .._version import __version__
from ..errors import ExportError, InputError
from ..files import (
    check_disk,
    full_disk,
    move_into_place,
    parse_object,
    scratch_folder,
)
from ..model.block import additions
from ..model.config import BAKED, RECORD, check_target, is_hub_id, origin, read_config
from ..model.model import ModelInfo, find, load_folder
from ..model.weights import weight_files
from ..steering.request import format_dose
from ..steering.steering import Steering
from ..steering.vector import format_layers
from ..text import cause
from . import gguf as llama_gguf
from .closeness import Closeness, Reference, compare, differing, judge, reference
from .llama import llama_config, llama_shards, read_weights

Format = Literal["mlx", "hf", "gguf"]
Progress = Callable[[str], None]
# The files of a Qwen2 folder beside its weights and configuration.
_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
)


@dataclass(frozen=True)
class Baked:
    """What was baked into what, and how close the result is to run-time steering.

    ``dose`` is a fraction of the residual stream. ``closeness`` is ``None`` for a GGUF file, which
    mlx-lm does not run.
    """

    path: Path
    source: ModelInfo
    steering: Steering
    dose: float
    format: Format
    closeness: Closeness | None = None

    @property
    def quantization(self) -> str:
        """The quantisation of the result, or the one that was undone."""
        undone = self.format != "mlx" and self.source.quantization != "none"
        return f"undone ({self.source.quantization})" if undone else self.source.quantization

    def record(self) -> dict[str, object]:
        """Return ``densesteer.json``; a converted folder's has no ``baked``."""
        vector_sha256 = self.steering.vector.sha256()
        return {
            "source": self.source.name,
            "fingerprint": self.source.fingerprint,
            "format": self.format,
            "quantization": self.quantization,
            "dtype": self.source.dtype,
            "baked": self.steering.describe() | {"vector_sha256": vector_sha256, "dose": self.dose},
            "checked": self.closeness.describe() if self.closeness else None,
            "created_by": f"mlx-densesteer {__version__}",
        }


@dataclass(frozen=True)
class _Plan:
    """What to write, and the logits that it must give."""

    folder: Path  # of the source
    config: Mapping[str, object]  # of the source
    target: Mapping[str, object]  # of the result: ``llama_config``, and ``end_of_turn``
    deltas: Mapping[int, mx.array]  # ``lambda * v`` of each steered layer
    expected: Reference
    baked: Baked
    end_of_turn: int | None  # the chat template's, where the source's files name another

    def shards(self) -> Iterable[dict[str, mx.array]]:
        """Return the tensors; the biases of a GGUF file are float32."""
        return llama_shards(
            self.folder,
            self.config,
            self.deltas,
            dequantize=self.baked.format != "mlx",
            bias_dtype=mx.float32 if self.baked.format == "gguf" else None,
        )

    def folder_config(self) -> dict[str, object]:
        """Return the ``config.json`` of a folder."""
        undone = ("quantization", "quantization_config") if self.baked.format == "hf" else ()
        return {key: value for key, value in self.target.items() if key not in undone}

    def beside(self, name: str) -> bytes | None:
        """Return the content of one of the files ``_BESIDE``, ``None`` if the source has none."""
        file = self.folder / name
        if not file.is_file():
            return None
        if name == "generation_config.json" and self.end_of_turn is not None:
            settings = {"error": ExportError, "remedy": "Repair or remove it."}
            document = parse_object(file.read_bytes(), str(file), **settings)
            return _json(document | {"eos_token_id": self.target["eos_token_id"]})
        return file.read_bytes()


def bake(
    source: str | Path,
    steering: Steering,
    out: str | Path,
    *,
    format: Format = "mlx",
    force: bool = False,
    progress: Progress = lambda what: None,
) -> Baked:
    """Write a checkpoint that computes in stock programs what ``steering`` computes at run time.

    Args:
        source: a Hub id, an MLX folder (quantised or not), or ``"demo"``.
        steering: at positions ``"all"``; a bias is added everywhere.
        out: the folder to write; for ``"gguf"`` the file.
        format: ``"mlx"``, quantised as the source is; ``"hf"``, a Hugging Face folder, dequantised
            to the source's dtype; ``"gguf"``, a file for llama.cpp, also dequantised (extra ``gguf``).
        force: replace ``out``.

    Raises:
        ExportError: positions other than ``"all"``, ``out`` exists, or the logits differ from those
            of run-time steering (see ``closeness.judge``).
        VectorMismatchError, SteeringError: the steering does not fit the model.
        ModelError, HubError, DiskError: the source cannot be read, or the disk is full.
    """
    out = Path(out).expanduser()
    if steering.budget is not None:
        raise ExportError(
            "a thinking budget cannot be baked: a bias is added at every token alike."
        )
    if not steering.calls:
        raise ExportError("a gate at tool calls cannot be baked: a bias is added everywhere.")
    if steering.positions != "all":
        raise ExportError(
            f"positions {steering.positions!r} cannot be baked: a bias is added at every position. "
            'Expected positions "all".'
        )
    check_out(out, source, format, force)
    progress("running the steered model for comparison")
    plan = _plan(source, steering, out, format)
    size = sum(array.nbytes for shard in plan.shards() for array in shard.values())
    check_disk(out.parent, size, "the baked model")
    progress(f"writing {out}")
    if format == "gguf":
        setting = json.dumps(plan.baked.record())
        name = plan.baked.source.name
        llama_gguf.write(
            plan.folder, plan.target, plan.shards, out, name, setting, plan.end_of_turn
        )
        return plan.baked
    with scratch_folder(out) as work, full_disk(out):
        made = work / "baked"
        _write_folder(plan, made)
        progress("comparing every tensor, and running it with stock mlx-lm")
        _refuse(made, _tensor_differences(made, plan))
        baked = replace(plan.baked, closeness=_run_stock(made, plan.expected, str(out)))
        _describe(made, baked)
        move_into_place(made, out, replace=force)
    return baked


def check(baked: str | Path, source: str | Path, steering: Steering) -> Closeness | None:
    """Compare a baked checkpoint with its source: every tensor, and the logits of a folder.

    Returns ``None`` for a GGUF file, which mlx-lm does not run.

    Raises:
        ExportError: a tensor that is missing, unexpected or different, each named; another
            configuration; or logits that are not those of run-time steering.
    """
    path = Path(baked).expanduser()
    format = baked_record(path)["format"]
    plan = _plan(source, steering, path, format)  # type: ignore[arg-type]
    if path.is_file():
        wanted = plan.folder, plan.target, plan.shards, plan.end_of_turn
        _refuse(path, llama_gguf.differences(path, *wanted))
        return None
    problems = _config_differences(path, plan) + _beside_differences(path, plan)
    _refuse(path, problems + _tensor_differences(path, plan))
    return _run_stock(path, plan.expected, str(path))


def baked_record(path: Path) -> dict[str, object]:
    """Return what ``bake`` recorded in a folder or GGUF file.

    Raises:
        ExportError: ``bake`` did not write it.
    """
    if not path.exists():
        raise ExportError(f"{path}: no such file or folder.")
    record: dict[str, object] | None = None
    if path.is_file():
        record = llama_gguf.recorded(path)
    elif (path / RECORD).is_file():
        content, where = (path / RECORD).read_bytes(), str(path / RECORD)
        record = parse_object(content, where, error=ExportError, remedy="Bake it again.")
    setting = record and record.get("baked")
    if (
        not isinstance(setting, dict)
        or record.get("format") not in get_args(Format)
        or type(setting.get("strength")) not in (int, float)
        or not isinstance(setting.get("layers"), list)
        or not all(type(layer) is int for layer in setting["layers"])
    ):
        raise ExportError(f"{path}: expected a checkpoint that `densesteer bake` wrote.")
    return record


def check_out(out: Path, source: str | Path, format: Format, force: bool) -> None:
    """Raise ``ExportError`` unless the checkpoint may be written to ``out``. Loads nothing."""
    if format not in get_args(Format):
        raise ExportError(f"format {format!r}: expected one of {', '.join(get_args(Format))}.")
    if (out.suffix == ".gguf") != (format == "gguf"):
        raise ExportError(
            f"{out}: expected a name that ends in .gguf for the format gguf, and for no other."
        )
    if format == "gguf":
        llama_gguf.check_target(out, force)
        return
    check_target(out, source, force, ExportError)
    there = sorted(file.name for file in out.iterdir()) if out.is_dir() else []
    if foreign := [name for name in there if not _is_baked_file(name)]:
        raise ExportError(
            f"{out}: holds {foreign[0]}, which densesteer did not write. Replacing the folder would "
            "remove it: move it, or choose another name."
        )


def _is_baked_file(name: str) -> bool:
    weights = name.startswith("model") and ".safetensors" in name
    return weights or name in (*_BESIDE, "config.json", "README.md", RECORD)


def _plan(source: str | Path, steering: Steering, out: Path, format: Format) -> _Plan:
    """Run the source steered, and free it: two models need not fit in memory."""
    folder = find(source)
    config = read_config(folder)
    if BAKED in config:
        raise ExportError(
            f"{source}: has its steering baked in. Bake the model that it was made from, with another strength."
        )
    target = llama_config(config, str(source))  # refuses before anything is computed
    model = load_folder(folder, name=origin(source))
    added = {layer: what.delta for layer, what in additions(model.network, steering).items()}
    mx.eval(added)
    tokens, _ = model.solutions()[0]
    expected = reference(model.network, tokens, steering)
    baked = Baked(out, model.info, steering, model.dose(steering), format)
    if model.end_of_turn is not None:
        target["eos_token_id"] = sorted({*model.tokenizer.eos_token_ids, model.end_of_turn})
    return _Plan(folder, config, target, added, expected, baked, model.end_of_turn)


def _write_folder(plan: _Plan, out: Path) -> None:
    out.mkdir()
    count = len(weight_files(plan.folder))
    index: dict[str, str] = {}
    total = 0
    kind = "mlx" if plan.baked.format == "mlx" else "pt"  # transformers refuses other names
    for number, shard in enumerate(plan.shards(), start=1):
        name = f"model-{number:05d}-of-{count:05d}" if count > 1 else "model"
        mx.save_safetensors(str(out / f"{name}.safetensors"), shard, metadata={"format": kind})
        index |= dict.fromkeys(shard, f"{name}.safetensors")
        total += sum(array.nbytes for array in shard.values())
    if count > 1:
        document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        _write_json(out / "model.safetensors.index.json", document)
    for name in _BESIDE:
        if (content := plan.beside(name)) is not None:
            (out / name).write_bytes(content)
    _write_json(out / "config.json", plan.folder_config())


def _describe(folder: Path, baked: Baked) -> None:
    record = baked.record()
    config = json.loads((folder / "config.json").read_bytes())
    _write_json(folder / "config.json", config | {BAKED: record["baked"]})
    _write_json(folder / RECORD, record)
    (folder / "README.md").write_text(model_card(baked), "utf-8")


def _write_json(file: Path, document: object) -> None:
    file.write_bytes(_json(document))


def _json(document: object) -> bytes:
    return f"{json.dumps(document, indent=1, ensure_ascii=False)}\n".encode()


def _run_stock(folder: Path, expected: Reference, name: str) -> Closeness:
    try:
        with (
            tempfile.TemporaryDirectory() as place
        ):  # mlx-lm finds no files below a name in brackets
            link = Path(place, "baked")
            link.symlink_to(folder.absolute())
            network = mlx_lm.load(str(link))[0]
    except Exception as error:  # of mlx-lm, transformers or mlx
        raise ExportError(f"{name}: stock mlx-lm does not load it ({cause(error)}).") from error
    found = compare(expected, network)
    judge(found, name)
    return found


def _config_differences(path: Path, plan: _Plan) -> list[str]:
    try:
        found = parse_object((path / "config.json").read_bytes(), "it")
        found.pop(BAKED, None)
    except (OSError, InputError) as error:
        return [f"config.json is damaged ({error})"]
    wanted = json.loads(json.dumps(plan.folder_config()))
    return [
        f"config.json has {key} {found.get(key)!r}, expected {wanted.get(key)!r}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]


def _beside_differences(path: Path, plan: _Plan) -> list[str]:
    """Compare the tokenizer and the other files beside the weights."""
    found = {name: (path / name).read_bytes() for name in _BESIDE if (path / name).is_file()}
    wanted = [(name, content) for name in _BESIDE if (content := plan.beside(name)) is not None]
    return differing(found, wanted, lambda a, b: a == b)


def _tensor_differences(path: Path, plan: _Plan) -> list[str]:
    found: dict[str, mx.array] = {}
    for file in weight_files(path):
        found |= read_weights(file)
    wanted = ((name, shard.pop(name)) for shard in plan.shards() for name in list(shard))
    return differing(found, wanted, lambda a, b: a.dtype == b.dtype and mx.array_equal(a, b).item())


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ExportError(
            f"{path}: is not this model with this steering: {'; '.join(problems[:8])}{more}. "
            "Bake it again, or name the model, vector, strength and layer that it was made from."
        )


def model_card(baked: Baked) -> str:
    """Return the ``README.md`` of the folder, with front matter for the Hub."""
    steering, name = baked.steering, baked.source.name
    layers, strength = format_layers(steering.layers), f"{steering.strength:.4g}"
    sign = "-" if steering.strength < 0 else ""
    base = f"base_model: {name}\n" if is_hub_id(name) else ""
    library = "mlx" if baked.format == "mlx" else "transformers"
    run = (
        'mlx_lm.generate --model FOLDER --prompt "What is 17 * 24?"'
        if baked.format == "mlx"
        else 'transformers.AutoModelForCausalLM.from_pretrained("FOLDER")'
    )
    return f"""---
{base}library_name: {library}
pipeline_tag: text-generation
tags:
- steering-vectors
- densesteer
---

# {name}, steered

`{name}` with a steering vector baked in: layer {layers}, {sign}{format_dose(baked.dose)} of the residual
stream (strength {strength}). Positive strength is towards denser reasoning: fewer steps that each carry more
(arXiv 2605.29247). The weights are those of the source; only biases were added.

    {run}

It is an ordinary `llama` checkpoint: Qwen2's architecture with biases on every projection. The new biases are
zero, except `mlp.down_proj.bias` of layer {layers}, which is strength times vector.

| | |
| --- | --- |
| made from | `{name}`, fingerprint `{baked.source.fingerprint}` |
| vector | `{steering.vector.name}`, made for `{steering.vector.meta.model}`, SHA-256 `{steering.vector.sha256()}` |
| layer | {layers} |
| dose | {sign}{format_dose(baked.dose)} of the residual stream, strength {strength} |
| positions | all, prompt and response |
| quantisation | {baked.quantization} |
| checked | {baked.closeness} |
| made by | mlx-densesteer {__version__} |

Limits: the strength is fixed; every position is steered; the licence is that of `{name}`. Whether its answers
are better was not measured.
"""
