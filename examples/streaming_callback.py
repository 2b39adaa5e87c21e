"""A callback for each piece of text as it comes; it ends the answer by returning False.

    python examples/streaming_callback.py [QUESTION]

Here it shows the first step and leaves the others out. The settings are in settings.py.
"""

import contextlib
import signal
import sys
from collections.abc import Callable

from settings import MODEL, QUESTION, STRENGTH, steering

from mlx_densesteer import DenseSteerError, Generation, Model, Steering, load, stream


def answer(
    model: Model,
    question: str,
    on_piece: Callable[[str], bool | None],
    steering: Steering | None = None,
) -> Generation:
    """Call ``on_piece`` with every piece of the answer until it returns False."""
    pieces = stream(model, question, steering=steering, max_tokens=400)
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
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly in `... | head`
    question = sys.argv[1] if len(sys.argv) > 1 else QUESTION
    model = load(MODEL)
    sparse = steering(model, STRENGTH or "-30%")  # towards sparse: many steps
    result = answer(model, question, FirstStep(), sparse)
    print()
    print(f"tokens: {result.tokens}, {result.finish_reason}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except DenseSteerError as error:  # says what is wrong and what helps
        sys.exit(f"streaming_callback: {error}")
