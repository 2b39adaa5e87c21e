"""A journal: results as they come, one JSON line each, so that a killed run loses none.

The first line says what the run is. A run that goes on must be the same run. A line that was
cut off when the process was killed is dropped; every whole line is kept. No mlx.
"""

import fcntl
import json
import os
from pathlib import Path

from ..errors import DiskError, InputError
from ..files import disk_errors, parse_object
from ..text import cause, one_line


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
        with disk_errors(self.path):
            if not (folder := self.path.parent).is_dir():
                raise DiskError(f"{self.path}: there is no folder {folder}. Make it first.")
            self._file = self.path.open("a+b", buffering=0)  # a full disk is noticed at once
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
        with disk_errors(self.path):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DiskError(
                    f"{self.path}: another process is writing it. Wait for it, or name another file."
                ) from error

    def _write(self, record: dict) -> None:
        with disk_errors(self.path):
            end = self._file.seek(0, os.SEEK_END)
            line = _line(record)
            try:
                while line:
                    line = line[self._file.write(line) :]
            except OSError:
                self._file.truncate(end)  # the next line must not follow half of one
                raise

    def _read(self, header: dict) -> list[dict]:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        lines = [self._parse(n, line) for n, line in enumerate(data[:whole].splitlines(), 1)]
        # Without a whole line, a killed run may have left the beginning of this very header.
        there = lines[0] if lines else header if _line(header).startswith(data) else {}
        if there.get("format") != header.get("format"):
            raise InputError(f"{self.path}: is not a journal of this program. Name another file.")
        if len(lines) == 1 and there != header:  # a run that ended before its first record
            with disk_errors(self.path):
                self._file.truncate(0)
            lines, there, whole = [], header, len(data)
        if differing := sorted(k for k in {*header, *there} if header.get(k) != there.get(k)):
            found, wanted = (
                one_line(json.dumps({k: one.get(k) for k in differing}, ensure_ascii=False), 200)
                for one in (there, header)
            )
            raise InputError(
                f"{self.path}: belongs to another run: it has {found}, this one {wanted}. Use the same "
                "settings to go on, or name another place."
            )
        if whole < len(data):
            with disk_errors(self.path):
                self._file.truncate(whole)
        if not lines:
            self._write(header)
        return lines[1:]

    def _parse(self, number: int, line: bytes) -> dict:
        remedy = "Damaged, or not a journal of this program: move it away and start again."
        return parse_object(line, f"{self.path}: line {number}", remedy=remedy, repair=True)


def not_a_record(journal: Journal, number: int, what: str, error: Exception) -> InputError:
    """Return the error for line ``number`` of a journal, which is no ``what``."""
    return InputError(
        f"{journal.path}: line {number} is no {what} ({cause(error)}): damaged. Remove the line, "
        "or move the file away and start again."
    )


def _line(record: dict) -> bytes:
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"
