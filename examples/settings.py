"""What the Python examples take from the environment; empty is unset. Put your own in its place.

DENSESTEER_MODEL is a folder that `densesteer convert` wrote, DENSESTEER_VECTOR a file, or empty for
the stock model; DENSESTEER_LAYER and DENSESTEER_STRENGTH are numbers. All unset: the embedded toy.
"""

import math
import os
import sys


def number(name: str, otherwise: float, kind: type[float] = float) -> float:
    """Return a variable's finite number; a wrong one ends the program with one line."""
    text = os.environ.get(name) or str(otherwise)
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        whole = "a whole number" if kind is int else "a number"
        sys.exit(f"{name}={text}: expected {whole}, such as {otherwise}")
    return value


MODEL = os.environ.get("DENSESTEER_MODEL") or "demo"
VECTOR = os.environ.get("DENSESTEER_VECTOR", "demo")
LAYER = number("DENSESTEER_LAYER", 5, int)
STRENGTH = number("DENSESTEER_STRENGTH", 4.76)  # 0 is the stock model
QUESTION = "Mia has 7 bags with 4 nuts in each. Later Mia finds 6. How many nuts does Mia have now?"
