"""What the Python examples take from the environment; empty is unset. Put your own in its place.

DENSESTEER_MODEL is a folder that `densesteer convert` wrote, DENSESTEER_VECTOR a vector's file, or empty
for the stock model. DENSESTEER_STRENGTH (20%, 1.5, 0) and DENSESTEER_LAYER (14) are the vector's own
unless they are set. All unset: the embedded toy.
"""

import os

from mlx_densesteer import Model, Steering, resolve
from mlx_densesteer.errors import InputError

MODEL = os.environ.get("DENSESTEER_MODEL") or "demo"
VECTOR = os.environ.get("DENSESTEER_VECTOR", "demo")
STRENGTH = os.environ.get("DENSESTEER_STRENGTH") or None
LAYER = os.environ.get("DENSESTEER_LAYER") or None
QUESTION = "Mia has 7 bags with 4 nuts in each. Later Mia finds 6. How many nuts does Mia have now?"


def steering(model: Model, strength: str | None = STRENGTH) -> Steering | None:
    """Return the steering that the environment asks for, in the grammar of every other door."""
    if not VECTOR:
        return None
    if LAYER and not LAYER.isdecimal():
        raise InputError(f"DENSESTEER_LAYER={LAYER}: expected a whole number, such as 14.")
    return resolve(model, VECTOR, strength, layers=[int(LAYER)] if LAYER else None)
