import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_densesteer.errors import DiskError, InputError
from mlx_densesteer.evaluation.journal import Journal

HEADER = {"format": "test 1", "model": "tiny", "tokens": 3, "system": None}


def records(path):
    with Journal(path, HEADER) as journal:
        return journal.records


def test_what_is_written_is_there_again(tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path, HEADER) as journal:
        assert journal.records == []
        journal.append({"text": "ä\n\u2028\ud800", "n": 1})
        journal.append({"n": 2})
    with Journal(path, HEADER) as journal:
        assert [r["n"] for r in journal.records] == [1, 2]
        assert journal.records[0]["text"] == "ä\n\u2028\ufffd"
        journal.append({"n": 3})
    assert [r["n"] for r in records(path)] == [1, 2, 3]


@given(cut=st.integers(0, 400))
def test_a_file_cut_anywhere_keeps_every_whole_record(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    with Journal(path, HEADER) as journal:
        for n in range(8):
            journal.append({"n": n, "text": "x" * 10 + "ü"})
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    whole = max(data[:cut].count(b"\n") - 1, 0)
    with Journal(path, HEADER) as journal:
        assert [r["n"] for r in journal.records] == list(range(whole))
        journal.append({"n": 99})
    assert [r["n"] for r in records(path)] == [*range(whole), 99]


def test_a_killed_process_loses_nothing_it_had_appended(tmp_path):
    path = tmp_path / "a.jsonl"
    code = (
        "import sys\nfrom mlx_densesteer.evaluation.journal import Journal\n"
        f"journal = Journal({str(path)!r}, {HEADER!r})\n"
        "n = 0\nwhile True:\n    journal.append({'n': n})\n    print(n, flush=True)\n    n += 1"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    told = [int(process.stdout.readline()) for _ in range(50)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    found = [r["n"] for r in records(path)]
    assert found[: len(told)] == told
    assert found == list(range(len(found)))


def test_another_run_is_refused_by_what_differs_and_nothing_is_lost(tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path, HEADER) as journal:
        journal.append({"n": 1})
    before = path.read_bytes()
    with pytest.raises(InputError, match=r'has \{"tokens": 3\}, this one \{"tokens": 4\}'):
        Journal(path, HEADER | {"tokens": 4})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"hello\n",
        b"hello",
        b'{"a": 1}',
        b'{"format": "other"}',
        b'[1]\n{"a": 1}\n',
        b"\xff\xfe\x00\n",
    ],
)
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.jsonl"):
        Journal(path, HEADER)
    assert path.read_bytes() == content


def test_one_writer_at_a_time_and_a_folder_that_is_not_there(tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path, HEADER), pytest.raises(DiskError, match="another process"):
        Journal(path, HEADER)
    with pytest.raises(DiskError, match="no folder"):
        Journal(tmp_path / "nowhere" / "a.jsonl", HEADER)
