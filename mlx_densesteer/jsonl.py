"""Reading a JSONL file that a person made: one JSON object a line, in UTF-8. No mlx."""

import codecs
import json
from pathlib import Path

from .errors import InputError

_OTHER_ENCODINGS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_jsonl(path: Path) -> list[tuple[int, dict[str, object]]]:
    """Return the objects of a JSONL file with their line numbers, counted from 1.

    A byte order mark, CRLF and blank lines are no obstacle.

    Raises:
        InputError: no such file, not UTF-8, a line that is no JSON object, or no line at all.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}). Name a JSONL file."
        ) from error
    if content.startswith(_OTHER_ENCODINGS):
        raise InputError(f"{path}: is UTF-16, expected UTF-8; convert it first.")
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    records = [
        (number, _parse(f"{path}: line {number}", line))
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not records:
        raise InputError(f"{path}: is empty, expected one JSON object a line.")
    return records


def _parse(where: str, line: bytes) -> dict[str, object]:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: is not UTF-8 (byte 0x{line[error.start]:02x} at {error.start}); "
            "convert the file to UTF-8 first."
        ) from error
    try:
        record = json.loads(text)
        json.dumps(record, ensure_ascii=False).encode()  # no lone surrogates
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON ({error}). Repair or remove the line.") from error
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: is {type(record).__name__}, expected a JSON object with named fields."
        )
    return record
