"""A journal: results as they come, one JSON line each, so that a killed run loses none.

The first line says what the run is. A run that goes on must be the same run. A line that was
cut off when the process was killed is dropped; every whole line is kept. No mlx.
"""

import fcntl
import json
import os
from pathlib import Path

from ..errors import DiskError, InputError


class Journal:
    """Append-only JSONL with a header. A context manager; one process at a time.

    Args:
        path: the file; made if it is not there.
        header: settings that identify the run, plain JSON values.

    Attributes:
        records: what the file holds, without the header.

    Raises:
        InputError: the file holds another run, or is no journal.
        DiskError: it cannot be written, or another process is writing it.
    """

    records: list[dict]

    def __init__(self, path: str | Path, header: dict):
        self.path = Path(path)
        if not self.path.absolute().parent.is_dir():
            raise DiskError(f"{self.path}: there is no folder {self.path.parent}. Make it first.")
        try:
            self._file = self.path.open("a+b")
        except OSError as error:
            raise DiskError(f"{self.path}: cannot be written ({error.strerror}).") from error
        try:
            self._lock()
            self.records = self._read(json.loads(json.dumps(header)))
        except BaseException:
            self._file.close()
            raise

    def append(self, record: dict) -> None:
        """Write one record; from here on it is kept, whatever ends the process."""
        self._write(record)
        self.records.append(record)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DiskError(
                f"{self.path}: another process is writing it. Wait for it, or name another file (-o)."
            ) from error

    def _write(self, record: dict) -> None:
        self._file.write(_line(record))
        self._file.flush()

    def _read(self, header: dict) -> list[dict]:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        lines = [self._parse(n, line) for n, line in enumerate(data[:whole].splitlines(), 1)]
        if not lines:
            if not _line(header).startswith(data):  # what a killed run left of this very line
                raise InputError(
                    f"{self.path}: is not a journal of this program. Name another file (-o)."
                )
            self._file.truncate(0)
            self._write(header)
            return []
        if lines[0].get("format") != header.get("format"):
            raise InputError(
                f"{self.path}: is not a journal of this program. Name another file (-o)."
            )
        if differing := sorted(
            key for key in {*header, *lines[0]} if header.get(key) != lines[0].get(key)
        ):
            there = {key: lines[0].get(key) for key in differing}
            wanted = {key: header.get(key) for key in differing}
            raise InputError(
                f"{self.path}: belongs to another run: it has {_brief(there)}, this one "
                f"{_brief(wanted)}. Use the same settings to go on, or name another place (-o)."
            )
        if whole < len(data):
            os.truncate(self.path, whole)
        return lines[1:]

    def _parse(self, number: int, line: bytes) -> dict:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{self.path}: line {number} is not JSON ({error}): damaged, or not a journal "
                "of this program. Move it away and start again."
            ) from error
        if not isinstance(record, dict):
            raise InputError(
                f"{self.path}: line {number} is no JSON object. Name another file (-o)."
            )
        return record


def _line(record: dict) -> bytes:
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _brief(values: dict) -> str:
    text = json.dumps(values, ensure_ascii=False)
    return text if len(text) <= 200 else text[:197] + "..."
