"""Other people's vector files, one module each. No torch."""

from pathlib import Path

from ..errors import VectorFormatError
from ..vector import SteeringVector
from .pt import load_pt


def import_vector(path: str | Path, *, model: str) -> SteeringVector:
    """Read another project's vector file; its ending says which project's.

    ``model`` names the model that the vector was made for; such files do not say.

    Raises:
        VectorFormatError: an ending that is not known, or see the reader's own module.
    """
    if Path(path).suffix.lower() != ".pt":
        raise VectorFormatError(f"{path}: cannot tell what it is by its ending; known are .pt.")
    return load_pt(path, model=model)
