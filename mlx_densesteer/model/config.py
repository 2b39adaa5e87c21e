"""Read the configuration of a model folder. No mlx."""

import json
from collections.abc import Mapping
from pathlib import Path

from ..errors import ConversionError, DenseSteerError, ModelError, UnsupportedModelError

FAMILY = "qwen2"
RECORD = "densesteer.json"  # what `convert` and `bake` write beside the weights


def read_config(folder: Path) -> dict[str, object]:
    """Return the ``config.json`` of a model folder of the Qwen2 family.

    The ``rope_parameters`` of transformers 5 become ``rope_theta`` and ``rope_scaling``, which
    mlx-lm reads (see ``rope``).

    Raises:
        ModelError: not a model folder.
        UnsupportedModelError: not of the Qwen2 family; the message names the family.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(
            f"{folder}: no config.json, so no model folder. Expected one that "
            "`densesteer convert` or `hf download` wrote."
        )
    return parse_config(file.read_bytes(), str(folder))


def parse_config(content: bytes, name: str) -> dict[str, object]:
    """Return a parsed ``config.json``; raises as ``read_config`` does."""
    try:
        config = json.loads(content)
    except ValueError as error:
        raise ModelError(f"{name}: config.json is no JSON ({error}). Download it again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(
            f"{name}: its config.json names no model_type, so it is no language model."
        )
    if "densesteer" in config:
        raise UnsupportedModelError(
            f"{name}: has its steering baked in, so it is not run here. Run it with "
            f"`mlx_lm.generate --model {name}`, or steer the model that it was made from."
        )
    if config["model_type"] != FAMILY:
        architectures = config.get("architectures") or ["unknown architecture"]
        raise UnsupportedModelError(
            f"{name}: is a {config['model_type']} model ({', '.join(map(str, architectures))}), but "
            "only the Qwen2 family (Qwen2, Qwen2.5; model_type qwen2) can be steered."
        )
    if "model_file" in config:
        raise UnsupportedModelError(
            f"{name}: has its own model code ({config['model_file']!r}), which is never run. Use the "
            "model's original folder."
        )
    return _without_rope_parameters(config, name)


def rope(config: Mapping[str, object]) -> dict[str, object]:
    """Return the rotary embedding's settings in a ``read_config``, for ``mlx_lm.load(model_config=)``."""
    return {key: config[key] for key in ("rope_theta", "rope_scaling") if key in config}


def _without_rope_parameters(config: dict[str, object], name: str) -> dict[str, object]:
    """Replace ``rope_parameters`` by ``rope_theta`` and ``rope_scaling``.

    As in transformers 5, ``rope_scaling`` takes precedence over ``rope_parameters``, and a
    ``rope_theta`` inside either over the one outside.
    """
    rest = {key: value for key, value in config.items() if key != "rope_parameters"}
    given = config.get("rope_scaling") or config.get("rope_parameters")
    if not given:
        return rest
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise UnsupportedModelError(
            f"{name}: its config.json has rope_parameters {given!r}; expected one rotary embedding for all "
            "layers, as the Qwen2 family has."
        )
    scaling = {key: value for key, value in given.items() if key != "rope_theta"}
    if "rope_theta" in given:
        rest["rope_theta"] = given["rope_theta"]
    default = scaling.get("type", scaling.get("rope_type", "default")) == "default"
    return rest | {"rope_scaling": None if default else scaling}


def recorded(folder: Path) -> dict[str, object]:
    """Return the record that ``densesteer convert`` or ``bake`` wrote; empty for other folders."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def origin(path_or_repo: str | Path) -> str:
    """Return the name of the model that a folder was converted from, or else the folder's name."""
    path = Path(path_or_repo).expanduser()
    if not path.is_dir():
        return str(path_or_repo)
    return str(recorded(path).get("source") or path.resolve().name)


def check_target(
    folder: Path, source: str | Path, force: bool, error: type[DenseSteerError] = ConversionError
) -> None:
    """Raise ``error`` if ``folder`` may not be written: only ``force`` replaces a folder of densesteer's."""
    if not folder.name or folder.is_symlink():
        raise error(f"{folder}: expected the name of a folder, found none or a link. Name it (-o).")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    there = Path(source).expanduser().resolve()
    # samefile, because a Mac's disk ignores case: two spellings may name one folder.
    if any(folder.samefile(place) for place in (there, *there.parents) if place.exists()):
        raise error(f"{folder}: holds the source itself. Choose another name (-o).")
    if not folder.is_dir() or not (folder / RECORD).is_file():
        raise error(
            f"{folder}: is no model that densesteer wrote, so it is not replaced. "
            "Choose another name (-o), or remove it yourself."
        )
    if not force:
        raise error(
            f"{folder}: exists already. Use it, choose another name (-o), or replace it (--force)."
        )


def is_hub_id(text: str) -> bool:
    """Tell whether ``text`` can only be a Hub id (``ORG/NAME``), not a mistyped path."""
    path = Path(text)
    is_path = text.startswith((".", "~", "/")) or path.parts[:1] == ("converted",)
    return len(path.parts) == 2 and not is_path and path.suffix not in (".gguf", ".npz", ".pt")
