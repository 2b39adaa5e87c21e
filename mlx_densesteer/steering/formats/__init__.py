"""Vector files of other programs, one module each. Nothing in a file is executed; torch is not needed."""

from pathlib import Path

from ...errors import VectorFormatError
from ..vector import SteeringVector
from .gguf import load_control_vector, save_control_vector
from .pt import Towards, load_pt
from .safetensors import load_safetensors, save_safetensors

_WRITERS = {"gguf": save_control_vector, "safetensors": save_safetensors}


def import_vector(
    path: str | Path,
    *,
    model: str | None = None,
    layer_offset: int | None = None,
    layer: int | None = None,
    towards: Towards | None = None,
) -> SteeringVector:
    """Read another program's vector file: ``.pt``, ``.gguf`` or ``.safetensors``.

    Args:
        model: the model that the vector was made for, if the file does not name it.
        layer_offset: number N in the file is layer ``N - layer_offset``; by default what the file says,
            else 0. Files of llama.cpp's ``cvector-generator`` need 1.
        layer: of a ``.pt`` file with a bare tensor: the layer to whose output it is added. Of a table it takes
            that row; where row 0 is the embedding's, as in Hugging Face's ``hidden_states``, row ``L + 1`` is layer L's:
            cut the table first.
        towards: of such a file: where the tensor points, towards ``"dense"`` or ``"sparse"`` reasoning. Towards
            sparse it is negated: positive strength is towards dense here.

    Raises:
        VectorFormatError: an unknown ending, ``model`` is missing, or the file is not what its ending says.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending != ".pt" and not (layer is None and towards is None):
        raise VectorFormatError(
            f"{path}: layer and direction can be said of a .pt file with a bare tensor only. Leave them out."
        )
    if ending == ".gguf":
        return load_control_vector(path, model=model, layer_offset=layer_offset)
    if ending == ".safetensors":
        return load_safetensors(path, model=model, layer_offset=layer_offset)
    if ending == ".npz":
        raise VectorFormatError(f"{path}: is a vector of this project already. Use it as it is.")
    if ending != ".pt":
        raise VectorFormatError(
            f"{path}: unknown ending {ending!r}, expected .pt, .gguf or .safetensors."
        )
    if not model:
        raise VectorFormatError(
            f"{path}: a .pt file does not say which model it was made for: name the model."
        )
    if layer_offset:
        raise VectorFormatError(
            f"{path}: the layers of a .pt file are counted from 0, as here. Leave the layer offset out."
        )
    return load_pt(path, model=model, layer=layer, towards=towards)


def export_vector(
    vector: SteeringVector, path: str | Path, *, to: str | None = None, layer_offset: int = 0
) -> list[str]:
    """Write a vector for other programs; return, in words, what they do differently with it.

    ``import_vector`` gives the same vector back: its layers bit for bit, and all metadata.

    Args:
        path: the file, written whole or not at all; an older one is replaced.
        to: ``"gguf"``, llama.cpp's control vector (extra ``gguf``), or ``"safetensors"``; by default
            the ending of ``path``.
        layer_offset: layer L gets the number ``L + layer_offset`` in the file.

    Raises:
        VectorFormatError: an unknown format, a layer number that it cannot hold, or no layer left.
        DiskError: the folder is missing.
    """
    path = Path(path)
    kind = to or path.suffix.lower().removeprefix(".")
    if kind not in _WRITERS:
        raise VectorFormatError(f"{path}: format {kind!r}, expected {' or '.join(_WRITERS)}.")
    return _WRITERS[kind](vector, path, layer_offset=layer_offset)
