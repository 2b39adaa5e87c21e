"""Find known test problems in data that a vector is made from: it must not be judged by them. No mlx.

``test_sets/NAME.npy`` holds the hashes of one test set's questions, sorted uint64; no question can be read
from them. ``scripts/make-test-problem-hashes`` makes the files. GSM8K's has the first 659 of 1,319 test
problems.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np

from ..text import count

HASHES = Path(__file__).parent / "test_sets"
# Letters and digits of any script, and what tells one formula from another.
_KEPT = re.compile(r"[^\w+\-*/=<>^|!]|_")
_BLOCKS = re.compile(r"\n\s*\n")
_LONGEST = 8  # blocks of a question that is looked for among others


def question_hash(question: str) -> int:
    """Return the first 64 bits of the SHA-256 of a question without spaces, punctuation and case."""
    text = _KEPT.sub("", question.casefold())
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "little")


def known_test_problem(question: str) -> str | None:
    """Return the name of the test set (``tasks.TASKS``) that has this question, or ``None``.

    White space, case and punctuation do not matter, nor does what precedes or follows the question
    after a blank line, such as the request for a box that tasks add. A question in other words is not
    found.
    """
    blocks = [block for block in _BLOCKS.split(question) if block.strip()]
    parts = [blocks]
    for length in range(1, min(len(blocks), _LONGEST + 1)):
        parts += [blocks[:length], blocks[-length:]]
    found = (_known().get(question_hash(" ".join(part))) for part in parts)
    return next(filter(None, found), None)


def warn_of_test_problems(questions: Iterable[str]) -> str | None:
    """Return one sentence if some of the questions are known test problems, or ``None``."""
    found = Counter(filter(None, map(known_test_problem, questions)))
    if not found:
        return None
    sets = ", ".join(f"{number} of {name}" for name, number in found.items())
    return (
        f"warning: {count(sum(found.values()), 'problem')} of known test sets in the data ({sets}): a result "
        "on these sets would count what was seen. Take others, such as gsm8k's split train."
    )


@cache
def _known() -> dict[int, str]:
    return {
        number: path.stem
        for path in sorted(HASHES.glob("*.npy"))
        for number in np.load(path, allow_pickle=False).tolist()
    }
