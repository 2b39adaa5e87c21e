"""Contrastive pairs: one problem, a dense response and a sparse one; their files. No mlx.

A file has one JSON object a line, in UTF-8. ``docs/pairs.md`` describes the fields.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..files import read_jsonl
from ..text import count

# this package's field first, then those of the reference's files
_PROMPT = ("prompt", "doc.question")
_POSITIVE = ("positive", "pos_response", "resp_after")
_NEGATIVE = ("negative", "neg_response", "resp_before")
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's marks: 48/2 = <<48/2=24>>24


@dataclass(frozen=True)
class Pair:
    """One problem with two responses: ``positive`` is dense, ``negative`` sparse.

    ``prompt`` is the user turn; ``system`` the system message, ``None`` for the template's own.
    """

    prompt: str
    positive: str
    negative: str
    system: str | None = None


@dataclass(frozen=True)
class Solution:
    """One problem with one response; the other fields are as in ``Pair``."""

    prompt: str
    response: str
    system: str | None = None


def pairs_sha256(data: Iterable[Pair] | Iterable[Solution]) -> str:
    """Return the SHA-256 of the texts of pairs or solutions in order, in hexadecimal."""
    rows = [[text for text in vars(one).values() if text is not None] for one in data]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def read_pairs(path: str | Path) -> list[Pair]:
    """Return the pairs of a JSONL file: what ``densesteer pairs`` wrote, or the reference's.

    The prompt is ``prompt`` or ``doc.question``; the dense response ``positive``,
    ``pos_response`` or ``resp_after``; the sparse one ``negative``, ``neg_response`` or
    ``resp_before``. A response may be a list of one text.

    Raises:
        InputError: no file, no pairs, or a line that is none; the message has its number.
    """
    pairs = []
    for place, fields, system in _records(path):
        texts = [text_of(place, fields, names) for names in (_PROMPT, _POSITIVE, _NEGATIVE)]
        pairs.append(Pair(*texts, system=system))
    return pairs


def _records(path: str | Path) -> Iterator[tuple[str, dict[str, object], str | None]]:
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


def read_solutions(path: str | Path) -> list[Solution]:
    """Return the solutions of a JSONL file.

    Of a pairs file these are the dense responses; else ``response`` answers ``prompt``, or ``answer``
    answers ``question`` as in GSM8K, whose calculator marks (``<<48/2=24>>``) are left out.

    Raises:
        InputError: as ``read_pairs``.
    """
    solutions = []
    for place, fields, system in _records(path):
        prompt = text_of(place, fields, (*_PROMPT, "question"))
        response = text_of(place, fields, ("response", *_POSITIVE, "answer"))
        solutions.append(Solution(prompt, _CALCULATOR.sub("", response), system))
    return solutions


def warn_of_other_model(path: str | Path, fingerprint: str) -> str | None:
    """Return one sentence if lines of the file say that another model answered, or ``None``.

    ``fingerprint`` is that of the model at hand (``Model.fingerprint``). Lines without one count as its own.
    """
    others: Counter[str] = Counter()
    for _, fields in read_jsonl(Path(path)):
        maker = fields.get("model")
        if isinstance(maker, dict) and maker.get("fingerprint") not in (None, fingerprint):
            others[str(maker.get("name"))] += 1
    if not others:
        return None
    names = ", ".join(
        f"{count(number, 'line')} of {name}" for name, number in others.most_common(3)
    )
    return (
        f"warning: {path} has answers of another model ({names}). A vector is meant to be the difference "
        "between a model's own answers. Make pairs with this model: densesteer pairs."
    )


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
