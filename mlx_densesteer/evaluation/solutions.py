"""Problems with a response: their files. No mlx.

A file has one JSON object a line, in UTF-8: solutions, or pairs (``docs/pairs.md``), whose dense side is
taken.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..files import read_jsonl

# this package's field first, then those of the reference's files
PROMPT = ("prompt", "doc.question")
POSITIVE = ("positive", "pos_response", "resp_after")
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's marks: 48/2 = <<48/2=24>>24


@dataclass(frozen=True)
class Solution:
    """One problem with one response.

    ``prompt`` is the user turn; ``system`` the system message, ``None`` for the template's own.
    """

    prompt: str
    response: str
    system: str | None = None


def read_solutions(path: str | Path) -> list[Solution]:
    """Return the solutions of a JSONL file.

    Of a pairs file these are the dense responses; else ``response`` answers ``prompt``, or ``answer``
    answers ``question`` as in GSM8K, whose calculator marks (``<<48/2=24>>``) are left out.

    Raises:
        InputError: no file, no solutions, or a line that is none; the message has its number.
    """
    solutions = []
    for place, fields, system in records(path):
        prompt = text_of(place, fields, (*PROMPT, "question"))
        response = text_of(place, fields, ("response", *POSITIVE, "answer"))
        solutions.append(Solution(prompt, _CALCULATOR.sub("", response), system))
    return solutions


def records(path: str | Path) -> Iterator[tuple[str, dict[str, object], str | None]]:
    """Yield for each line its place for messages, its fields, and its system message."""
    for number, fields in read_jsonl(Path(path)):
        place = f"{path}: line {number}"
        if isinstance(fields.get("doc"), dict):
            fields = {"doc.question": fields["doc"].get("question")} | fields
        system = fields.get("system")
        if system is not None and not isinstance(system, str):  # "" removes the template's own
            raise InputError(
                f"{place}: system is {type(system).__name__}; expected a text or null."
            )
        yield place, fields, system


def text_of(place: str, fields: Mapping[str, object], names: tuple[str, ...]) -> str:
    """Return the first field of ``names`` that is there: a text, or a list of one.

    Raises:
        InputError: none is there, or it is empty or something else.
    """
    for name in names:
        value = fields.get(name)
        if value is None:
            continue
        while isinstance(value, list) and len(value) == 1:
            value = value[0]
        if not isinstance(value, str):
            kind = f"a list of {len(value)}" if isinstance(value, list) else type(value).__name__
            raise InputError(f"{place}: {name} is {kind}; expected a text or a list of one text.")
        if not value.strip():
            raise InputError(f"{place}: {name} is empty; remove the line or fill it in.")
        return value
    found = ", ".join(fields) or "none"
    raise InputError(f"{place}: expected a field {' or '.join(names)}; found {found}.")
