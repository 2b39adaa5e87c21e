"""One question, one steered answer, in one process.

    python examples/library_call.py
    python examples/library_call.py "What is 17 * 24?"

It runs on the embedded toy model. For your own model set DENSESTEER_MODEL (a folder that
`densesteer convert` wrote), DENSESTEER_VECTOR (a file), DENSESTEER_LAYER and DENSESTEER_STRENGTH.
"""

import os
import sys

from mlx_densesteer import DenseSteerError, Steering, SteeringVector, demo, generate, load

MODEL = os.environ.get("DENSESTEER_MODEL", "demo")
VECTOR = os.environ.get("DENSESTEER_VECTOR", demo.VECTOR)
LAYER = int(os.environ.get("DENSESTEER_LAYER", "5"))
STRENGTH = float(os.environ.get("DENSESTEER_STRENGTH", "4.76"))  # 0 is the stock model
QUESTION = "Mia has 7 bags with 4 nuts in each. Later Mia finds 6. How many nuts does Mia have now?"


def main() -> None:
    question = sys.argv[1] if len(sys.argv) > 1 else QUESTION
    try:
        model, tokenizer = load(MODEL)
        steering = Steering(SteeringVector.load(VECTOR), STRENGTH, layers=(LAYER,))
        answer = generate(model, tokenizer, question, steering=steering, max_tokens=400)
    except DenseSteerError as error:  # says what is wrong and what helps; anything else is a bug
        sys.exit(f"library_call: {error}")
    print(answer.text)
    print(f"{answer.tokens} tokens, {answer.steps} steps, {answer.finish_reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
