"""One question, one steered answer, in one process.

    python examples/library_call.py
    python examples/library_call.py "Tom has 3 boxes with 5 pens in each. How many pens does Tom have?"

It runs on the embedded toy model; settings.py says how to take your own.
"""

import signal
import sys

from settings import MODEL, QUESTION, steering

from mlx_densesteer import DenseSteerError, generate, load


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly in `... | head`
    question = sys.argv[1] if len(sys.argv) > 1 else QUESTION
    try:
        model = load(MODEL)
        answer = generate(model, question, steering=steering(model), max_tokens=400)
    except DenseSteerError as error:  # says what is wrong and what helps; anything else is a bug
        sys.exit(f"library_call: {error}")
    print(answer.text)
    print(
        f"tokens: {answer.tokens}, steps: {answer.steps}, {answer.finish_reason}", file=sys.stderr
    )


if __name__ == "__main__":
    main()
