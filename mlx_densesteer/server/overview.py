"""Lists for clients: models as OpenAI lists them, and the vectors for the page."""

import time

from .. import demo
from .._version import __version__
from ..demo.problems import held_out
from ..steering.places import POSITIONS
from ..steering.steering import LARGE_DOSE
from .vectors import Vectors

EXAMPLES = (
    "Anna picks 48 apples in the morning, and in the afternoon half as many. How many apples does she "
    "pick altogether?",
    "A train leaves at 14:40 and arrives at 17:15. It stops three times, for 5 minutes each. How long "
    "does it move?",
    "A shirt costs 40 euros. The price falls by 25%, then rises by 10%. What does the shirt cost now?",
)

CREATED = int(time.time())  # of every model: no folder tells when its model was made


def models(vectors: Vectors) -> list[dict[str, object]]:
    """Return a model, then each of its vectors at its default, as models."""
    return [entry(vectors.base), *(entry(one["id"], one["steering"]) for one in _presets(vectors))]


def model(vectors: Vectors, name: str) -> dict[str, object]:
    """Return one model, listed or not.

    Raises:
        Fault: no such model or vector, or a steering that cannot be applied.
    """
    asked = vectors.asked(name, None)
    steers = asked is not None and not asked.steering.is_zero
    return entry(name, vectors.describe(asked.steering) if steers else None)


def steering(vectors: Vectors, *, max_tokens: int, toy: bool) -> dict[str, object]:
    """Return a model, its presets and its vectors, as the page needs them; ``toy``: it is the embedded demo."""
    served = vectors.model
    return {
        "model": {
            "id": vectors.base,
            "layers": served.layer_count,
            "hidden_size": served.hidden_size,
            "context": served.context,
            "max_tokens": max_tokens,
            "fingerprint": served.fingerprint,
            "dtype": served.info.dtype,
            "quantization": served.info.quantization,
        },
        "version": __version__,
        "note": demo.ABOUT if toy else None,
        "examples": [p.question for p in held_out(3)] if toy else list(EXAMPLES),
        "presets": _presets(vectors),
        "vectors": [vectors.listing(one) for one in vectors.all()],
        "large_dose": LARGE_DOSE,
        "positions": [
            one for one in POSITIONS[:-1] if served.thinks or one not in ("think", "answer")
        ],
    }


def _presets(vectors: Vectors) -> list[dict[str, object]]:
    presets = [vectors.preset(one) for one in vectors.all()]
    return [
        {
            "id": preset.model,
            "label": preset.model.partition("@")[2].replace("=", " "),
            "steering": vectors.describe(preset.steering),
        }
        for preset in presets
    ]


def entry(name: object, steering: object = None, *, loaded: bool = True) -> dict[str, object]:
    """Return a model as OpenAI lists it, with its steering, and whether it is in memory."""
    return {
        "id": name,
        "object": "model",
        "created": CREATED,
        "owned_by": "mlx-densesteer",
        "steering": steering,
        "loaded": loaded,
    }
