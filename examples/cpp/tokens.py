"""Text to token ids and back, as `densesteer generate` does it.

python tokens.py encode MODEL "What is 17 * 24?"     ids in the chat template
python tokens.py decode MODEL < ids                  text
"""

import sys
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from mlx_densesteer.errors import DenseSteerError, InputError
from mlx_densesteer.model.config import read_config
from mlx_densesteer.model.model import find, loading
from mlx_densesteer.model.prompt import decode, encode_prompt


def load(folder: Path) -> tuple[TokenizerWrapper, int]:
    """Return the tokenizer of a model, and how many ids the model knows."""
    with loading(folder):
        return load_tokenizer(folder), int(read_config(folder)["vocab_size"])


def read_ids(text: str, count: int) -> list[int]:
    for word in text.split():
        if not (word.isascii() and word.isdecimal() and len(word) < 10 and int(word) < count):
            raise InputError(f"token id {word[:40]!r}: expected 0 to {count - 1}.")
    return [int(word) for word in text.split()]


def main() -> None:
    match sys.argv[1:]:
        case ["encode", model, text]:
            tokenizer, _ = load(find(model))
            print(*encode_prompt(tokenizer, text))
        case ["decode", model]:
            tokenizer, count = load(find(model))
            text = sys.stdin.buffer.read().decode(errors="replace")
            print(decode(tokenizer, read_ids(text, count)))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main()
    except DenseSteerError as error:
        sys.exit(f"tokens.py: {error}")
