"""A callback for each piece of text as it comes; it ends the answer by returning False.

    python examples/streaming_callback.py [QUESTION]

Here it shows the first step and leaves the others out. The settings are those of library_call.py.
"""

import contextlib
import os
import sys
from collections.abc import Callable

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_densesteer import Generation, Steering, SteeringVector, demo, load, stream

MODEL = os.environ.get("DENSESTEER_MODEL", "demo")
VECTOR = os.environ.get("DENSESTEER_VECTOR", demo.VECTOR)
LAYER = int(os.environ.get("DENSESTEER_LAYER", "5"))
STRENGTH = float(os.environ.get("DENSESTEER_STRENGTH", "-7.13"))  # towards sparse: many steps
QUESTION = "Mia has 7 bags with 4 nuts in each. Later Mia finds 6. How many nuts does Mia have now?"


def answer(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    question: str,
    on_piece: Callable[[str], bool | None],
    steering: Steering | None = None,
) -> Generation:
    """Call ``on_piece`` with every piece of the answer until it returns False."""
    pieces = stream(model, tokenizer, question, steering=steering, max_tokens=400)
    with contextlib.closing(pieces):  # an exception in the callback ends the answer as well
        for piece in pieces:
            if on_piece(piece) is False:
                break
    return pieces.result


class FirstStep:
    """Print text up to the first blank line."""

    text = ""

    def __call__(self, piece: str) -> bool:
        before = len(self.text)
        self.text, more, _ = (self.text + piece).partition("\n\n")
        print(self.text[before:], end="", flush=True)
        return not more


def main() -> None:
    question = sys.argv[1] if len(sys.argv) > 1 else QUESTION
    model, tokenizer = load(MODEL)
    steering = Steering(SteeringVector.load(VECTOR), STRENGTH, layers=(LAYER,))
    result = answer(model, tokenizer, question, FirstStep(), steering)
    print()
    print(f"{result.tokens} tokens, {result.finish_reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
