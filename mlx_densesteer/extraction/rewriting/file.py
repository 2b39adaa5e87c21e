"""Rewrites that were made elsewhere, in a JSONL file."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import InputError
from ...evaluation.solutions import POSITIVE, text_of
from ...files import read_jsonl, whole_characters
from . import Original, Rewrite, Rewriter

_REWRITE = ("rewrite", *POSITIVE)


class FileRewriter(Rewriter):
    """Looks rewrites up by problem id, then by the text of the question.

    A line has ``id`` or ``question`` (or ``prompt``, ``doc.question``), and the rewrite as
    ``rewrite``, ``positive``, ``pos_response`` or ``resp_after``. The rewriter's name holds a
    digest of all rewrites, so those of a corrected file are taken anew.

    Raises:
        InputError: an unreadable line, or two different rewrites of one problem.
    """

    def __init__(self, path: str | Path):
        path = Path(path).expanduser()
        self._rewrites: dict[tuple[str, str], str] = {}
        for number, fields in read_jsonl(path):
            place = f"{path}: line {number}"
            text = text_of(place, fields, _REWRITE)
            for key in _keys(place, fields):
                if self._rewrites.setdefault(key, text) != text:
                    raise InputError(
                        f"{place}: another rewrite of the problem with {key[0]} {key[1][:60]!r} "
                        "stands above. Keep one of them."
                    )
        held = json.dumps(sorted([*key, text] for key, text in self._rewrites.items()))
        digest = hashlib.sha256(held.encode()).hexdigest()[:12]
        self.name = f"file:{whole_characters(path.name)} {digest}"

    def rewrite(self, originals: Sequence[Original]) -> Iterator[tuple[int, Rewrite | None]]:
        for index, original in enumerate(originals):
            keys = ("id", original.id), ("question", original.question.strip())
            found = next((self._rewrites[key] for key in keys if key in self._rewrites), None)
            yield index, None if found is None else Rewrite(found.strip())


def _keys(place: str, fields: dict[str, object]) -> list[tuple[str, str]]:
    """Return what names the problem of a line."""
    doc = fields.get("doc")
    question = fields.get("question") or fields.get("prompt")
    if not question and isinstance(doc, dict):
        question = doc.get("question")
    keys = [("id", str(fields["id"]))] if fields.get("id") is not None else []
    if isinstance(question, str):
        keys.append(("question", question.strip()))
    if not keys:
        raise InputError(
            f"{place}: expected a field id or question that names the problem; found "
            f"{', '.join(fields)}."
        )
    return keys
