"""Text to token ids and back, as `densesteer generate` does it.

python tokens.py encode MODEL "What is 17 * 24?"     ids in the chat template
python tokens.py decode MODEL < ids                  text
"""

import sys

from mlx_lm.utils import load_tokenizer

from mlx_densesteer.model import find
from mlx_densesteer.prompt import encode_prompt


def main() -> None:
    match sys.argv[1:]:
        case ["encode", model, text]:
            print(*encode_prompt(load_tokenizer(find(model)), text))
        case ["decode", model]:
            print(
                load_tokenizer(find(model)).decode([int(one) for one in sys.stdin.read().split()])
            )
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
