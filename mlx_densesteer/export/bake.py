"""A steering baked into an ordinary checkpoint, which stock software runs; and its check.

The source's weights are written again bit for bit, with the biases of ``llama.py``; the result is
loaded by stock mlx-lm and compared with run-time steering before it gets its name.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import mlx.core as mx
import mlx_lm

from ..errors import ExportError
from ..files import check_disk, move_into_place, scratch_folder
from ..model.block import deltas
from ..model.config import RECORD, check_target, read_config
from ..model.dose import mean_norms, solutions
from ..model.model import find, inspect, load_folder
from ..steering.steering import Steering
from . import gguf as llama_gguf
from .card import Baked, model_card
from .closeness import Closeness, Reference, compare, differing, judge, reference
from .llama import llama_config, llama_shards, read_weights, weight_files

Format = Literal["mlx", "hf", "gguf"]
Progress = Callable[[str], None]
# What a folder of Qwen2 has beside its weights; chat templates are in one or the other.
_BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "LICENSE",
)  # fmt: skip


@dataclass(frozen=True)
class _Plan:
    """What is written: of which folder, under which names, with which ``lambda * v``."""

    folder: Path
    config: Mapping[str, object]
    target: Mapping[str, object]  # of ``llama_config``
    deltas: Mapping[int, mx.array]
    format: Format

    def shards(self) -> Iterable[dict[str, mx.array]]:
        """The tensors; a GGUF file keeps biases in float32, a folder in the model's dtype."""
        return llama_shards(
            self.folder, self.config, self.deltas, dequantize=self.format != "mlx",
            bias_dtype=mx.float32 if self.format == "gguf" else None,
        )  # fmt: skip


def bake(
    source: str | Path,
    steering: Steering,
    out: str | Path,
    *,
    format: Format = "mlx",
    force: bool = False,
    progress: Progress = lambda what: None,
) -> Baked:
    """Write a checkpoint that gives, without us, what ``steering`` gives at run time.

    Args:
        source: a Hub id, an MLX folder (quantised or not), or ``"demo"``.
        steering: at positions ``"all"``; a bias knows no others.
        out: the folder to write; for ``"gguf"`` the file.
        format: ``"mlx"``, quantised as the source is; ``"hf"``, a Hugging Face folder, dequantised in
            the source's dtype; ``"gguf"``, a file for llama.cpp, likewise (extra ``gguf``).
        force: replace ``out``.

    Raises:
        ExportError: positions other than ``"all"``, ``out`` exists, or the result is not run-time
            steering (see ``closeness.judge``).
        VectorMismatchError, SteeringError: the steering does not fit the model.
        ModelError, HubError, DiskError: the source cannot be read, or there is no room.
    """
    out = Path(out).expanduser()
    _check_request(source, steering, out, format, force)
    folder = find(source)
    config = read_config(folder)
    target = llama_config(config, str(source))  # refuses before anything is computed
    progress("running the steered model for comparison")
    check_disk(
        out.parent, sum(file.stat().st_size for file in weight_files(folder)), "the baked model"
    )
    expected, plan, baked = _run_source(source, folder, config, target, steering, format)
    size = sum(a.nbytes for shard in plan.shards() for a in shard.values())
    check_disk(out.parent, size, "the baked model")
    progress(f"writing {out}")
    if format == "gguf":
        setting = json.dumps(baked.record())
        llama_gguf.write(folder, target, plan.shards, out, baked.source.name, setting)
        return baked.at(out, None)
    with scratch_folder(out) as work:
        made = work / "baked"
        _write_folder(plan, made)
        progress("comparing every tensor, and running it with stock mlx-lm")
        _refuse(made, _differences(made, plan))
        closeness = _run_stock(made, expected, str(out))
        finished = baked.at(out, closeness)
        _describe(made, finished)
        move_into_place(made, out, replace=force)
    return finished


def check(baked: str | Path, source: str | Path, steering: Steering) -> Closeness | None:
    """Compare a baked checkpoint with its source: every tensor, and the logits of a folder.

    Returns ``None`` for a GGUF file: its tensors are compared, but nothing here runs it.

    Raises:
        ExportError: a tensor that is missing, unexpected or different, each named; another
            configuration; or logits that are not those of run-time steering.
    """
    path = Path(baked).expanduser()
    record = baked_record(path)
    folder = find(source)
    config = read_config(folder)
    target = llama_config(config, str(source))
    expected, plan, _ = _run_source(source, folder, config, target, steering, record["format"])
    if path.is_file():
        _refuse(path, llama_gguf.differences(path, folder, target, plan.shards))
        return None
    _refuse(path, [
        *_config_differences(path, plan), *_beside_differences(path, folder),
        *_differences(path, plan),
    ])  # fmt: skip
    return _run_stock(path, expected, str(path))


def baked_record(path: Path) -> dict[str, object]:
    """Return what ``bake`` recorded in a folder or GGUF file.

    Raises:
        ExportError: it is nothing that ``bake`` wrote.
    """
    record: object = None
    if not path.exists():
        raise ExportError(f"{path}: no such file or folder.")
    if path.is_file():
        record = llama_gguf.recorded(path)
    elif (path / RECORD).is_file():
        try:
            record = json.loads((path / RECORD).read_bytes())
        except ValueError as error:
            raise ExportError(f"{path / RECORD}: is damaged ({error}). Bake it again.") from error
    setting = record.get("baked") if isinstance(record, dict) else None
    if (
        not isinstance(setting, dict)
        or record.get("format") not in get_args(Format)
        or type(setting.get("strength")) not in (int, float)
        or not isinstance(setting.get("layers"), list)
        or not all(type(layer) is int for layer in setting["layers"])
    ):
        raise ExportError(f"{path}: expected a checkpoint that `densesteer bake` wrote.")
    return record


def _check_request(
    source: str | Path, steering: Steering, out: Path, format: Format, force: bool
) -> None:
    if steering.positions != "all":
        raise ExportError(
            f"positions {steering.positions!r} cannot be baked: a bias is added at every position. "
            'Expected positions "all".'
        )
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
    foreign = sorted(p.name for p in out.iterdir() if not _is_ours(p.name)) if out.is_dir() else []
    if foreign:
        raise ExportError(
            f"{out}: holds {foreign[0]}, which densesteer did not write; replacing the folder would "
            "remove it. Move it, or choose another name (-o)."
        )


def _is_ours(name: str) -> bool:
    weights = name.startswith("model") and ".safetensors" in name
    return weights or name in (*_BESIDE, "config.json", "README.md", RECORD)


def _run_source(
    source: str | Path,
    folder: Path,
    config: Mapping[str, object],
    target: Mapping[str, object],
    steering: Steering,
    format: Format,
) -> tuple[Reference, _Plan, Baked]:
    """Load the source, steer it at run time, and let it go: two models need not fit in memory."""
    model, tokenizer = load_folder(folder)
    tokens, _ = solutions(tokenizer)[0]
    added = deltas(model, steering)
    mx.eval(added)
    doses = steering.relative_dose(
        mean_norms(model, tokenizer, steering.vector, steering.layers or ())
    )
    baked = Baked(folder, inspect(model, source), steering, doses, format, closeness=None)
    plan = _Plan(folder, config, target, added, format)
    return reference(model, tokens, steering), plan, baked


def _write_folder(plan: _Plan, out: Path) -> None:
    out.mkdir()
    count = len(weight_files(plan.folder))
    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(plan.shards(), start=1):
        name = f"model-{number:05d}-of-{count:05d}" if count > 1 else "model"
        kind = "mlx" if plan.format == "mlx" else "pt"  # transformers refuses other names
        mx.save_safetensors(str(out / f"{name}.safetensors"), shard, metadata={"format": kind})
        index |= dict.fromkeys(shard, f"{name}.safetensors")
        total += sum(array.nbytes for array in shard.values())
    if count > 1:
        document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        _write_json(out / "model.safetensors.index.json", document)
    for name in _BESIDE:
        if (plan.folder / name).is_file():
            shutil.copyfile(plan.folder / name, out / name)
    _write_json(out / "config.json", _folder_config(plan))


def _folder_config(plan: _Plan) -> dict[str, object]:
    undone = ("quantization", "quantization_config") if plan.format == "hf" else ()
    return {key: value for key, value in plan.target.items() if key not in undone}


def _describe(folder: Path, baked: Baked) -> None:
    setting = baked.record()["baked"]
    config = json.loads((folder / "config.json").read_bytes())
    _write_json(folder / "config.json", config | {"densesteer": setting})
    _write_json(folder / RECORD, baked.record())
    (folder / "README.md").write_text(model_card(baked), "utf-8")


def _write_json(file: Path, document: object) -> None:
    file.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _run_stock(folder: Path, expected: Reference, name: str) -> Closeness:
    try:
        model = mlx_lm.load(str(folder))[0]
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise ExportError(f"{name}: stock mlx-lm does not load it ({error}).") from error
    found = compare(expected, model)
    judge(found, name)
    return found


def _config_differences(path: Path, plan: _Plan) -> list[str]:
    try:
        found = json.loads((path / "config.json").read_bytes())
        found.pop("densesteer", None)
    except (OSError, ValueError, AttributeError) as error:
        return [f"config.json is damaged ({error})"]
    wanted = json.loads(json.dumps(_folder_config(plan)))
    return [
        f"config.json has {key} {found.get(key)!r}, expected {wanted.get(key)!r}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]


def _beside_differences(path: Path, source: Path) -> list[str]:
    """Compare the tokenizer and what else lies beside the weights, before anything loads it."""
    problems = []
    for name in _BESIDE:
        ours, theirs = path / name, source / name
        if theirs.is_file() and not ours.is_file():
            problems.append(f"{name} is missing")
        elif theirs.is_file() and ours.read_bytes() != theirs.read_bytes():
            problems.append(f"{name} is another")
    return problems


def _differences(path: Path, plan: _Plan) -> list[str]:
    found: dict[str, mx.array] = {}
    for file in weight_files(path):
        found |= read_weights(file)
    wanted = ((name, shard.pop(name)) for shard in plan.shards() for name in list(shard))
    return differing(found, wanted, _equal)


def _equal(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and mx.array_equal(a, b).item()


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ExportError(
            f"{path}: is not this model with this steering: {'; '.join(problems[:8])}{more}. "
            "Bake it again, or name the model, vector, strength and layer that it was made from."
        )
