"""Contrastive pairs: one problem, a dense response and a sparse one; their files. No mlx.

A file has one JSON object a line, in UTF-8. ``docs/pairs.md`` describes the fields.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..evaluation.solutions import POSITIVE, PROMPT, Solution, records, text_of
from ..files import read_jsonl
from ..text import count

_NEGATIVE = ("negative", "neg_response", "resp_before")  # as POSITIVE


@dataclass(frozen=True)
class Pair:
    """One problem with two responses: ``positive`` is dense, ``negative`` sparse.

    ``prompt`` is the user turn; ``system`` the system message, ``None`` for the template's own.
    """

    prompt: str
    positive: str
    negative: str
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
    for place, fields, system in records(path):
        texts = [text_of(place, fields, names) for names in (PROMPT, POSITIVE, _NEGATIVE)]
        pairs.append(Pair(*texts, system=system))
    return pairs


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
