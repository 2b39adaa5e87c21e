"""Files: the JSON reader and the atomic writers that every room uses."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import disk_of

from mlx_densesteer.errors import DiskError, SessionError, VectorFormatError
from mlx_densesteer.evaluation.journal import Journal
from mlx_densesteer.files import (
    MAX_JSON_DEPTH,
    atomic_file,
    atomic_path,
    move_into_place,
    parse_json,
    read_file,
    scratch_folder,
)
from mlx_densesteer.generation.sampling import GREEDY
from mlx_densesteer.generation.session_file import SavedSession, write_session
from mlx_densesteer.steering.formats import export_vector
from mlx_densesteer.steering.vector import SteeringVector, VectorMeta


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1] 2", "not JSON"),
        (b"NaN", "the number NaN is not finite"),
        (b"[-Infinity]", "the number -Infinity is not finite"),
        (b"[1e999]", "the number 1e999 is not finite"),
        (b"1" * 100_000, "more than 64 bits"),
        (b"18446744073709551616", "more than 64 bits"),
        (b"-9223372036854775809", "more than 64 bits"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * (MAX_JSON_DEPTH + 1) + b"]" * (MAX_JSON_DEPTH + 1), "nested too deeply"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested too deeply"),
        (b'"\\ud800"', "half of a surrogate pair"),
        (b'{"\\uDFFF": 1}', "half of a surrogate pair"),
        (b'{"a": 1, "b": {"%s": 1, "%s": 2}}' % (b"k" * 9999, b"k" * 9999), "is there twice"),
        (b'"\xff"', "not UTF-8 (byte 0xff at 1)"),
        ("{}".encode("utf-16"), "UTF-16"),
        (b'"' + b"x" * 2**20 + b'"', "expected at most 1,048,576"),
    ],
)
def test_json_that_cannot_be_used_is_refused_in_a_few_words(data, found):
    with pytest.raises(SessionError) as caught:
        parse_json(data, "x.json", error=SessionError, limit=2**20, remedy="Save it again.")
    assert found in str(caught.value) and str(caught.value).startswith("x.json: ")
    assert len(str(caught.value)) < 160


@pytest.mark.parametrize(
    "value",
    [
        None,
        "😀 é \u2028",
        2**64 - 1,
        -(2**63),
        [1.5, -0.0, 1e308],
        {"a": [{"b": {}}], "": "\\ud800"},
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_json_is_read_as_it_was_written(value, ascii_only):
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert parse_json(data, "x") == parse_json(data.decode(), "x") == value
    assert parse_json(b"\xef\xbb\xbf" + data, "x") == value


@pytest.fixture(scope="module")
def vector():
    rng = np.random.default_rng(0)
    meta = VectorMeta(model="Qwen/Tiny", hidden_size=512, layer_count=16)
    return SteeringVector({k: rng.normal(size=512) for k in range(1, 16)}, meta)


def write(path, content=b"new"):
    with atomic_file(path) as file:
        file.write(content)


def names(folder):
    return sorted(one.name for one in folder.iterdir())


def test_a_replaced_file_keeps_its_mode(tmp_path):
    path = tmp_path / "private"
    path.write_bytes(b"old")
    path.chmod(0o600)
    write(path)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o600)
    mask = os.umask(0o027)
    try:
        write(tmp_path / "fresh")
    finally:
        os.umask(mask)
    assert (tmp_path / "fresh").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_file_is_replaced(tmp_path, there):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "v.npz"
    if there:
        target.write_bytes(b"old")
    (tmp_path / "second").symlink_to("elsewhere/v.npz")
    (tmp_path / "first").symlink_to(tmp_path / "second")
    write(tmp_path / "first")
    assert (tmp_path / "first").is_symlink() and (tmp_path / "second").is_symlink()
    assert target.read_bytes() == b"new" and not target.is_symlink()
    assert names(tmp_path) == ["elsewhere", "first", "second"] and len(names(target.parent)) == 1


def make_read_only(path):
    path.write_bytes(b"old")
    path.chmod(0o444)


def make_loop(path):
    path.symlink_to(path)


NO_TARGETS = {
    "folder": (Path.mkdir, r"is a folder. Name a file in it\.$"),
    "pipe": (os.mkfifo, "is not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/null"), "is not a regular file"),
    "read-only": (make_read_only, r"is read-only. Make it writable \(chmod u\+w\)"),
    "loop": (make_loop, r"cannot be written .*Choose another place\.$"),
    "nowhere": (lambda path: path.symlink_to("no/such"), "there is no folder .* Make it first"),
    "n" * 300: (lambda path: None, "cannot be written .*too long"),
}


@pytest.mark.parametrize(("kind", "make", "said"), [(k, *v) for k, v in NO_TARGETS.items()])
def test_what_cannot_be_replaced_is_kept_and_named(tmp_path, vector, kind, make, said):
    path = tmp_path / kind
    make(path)
    before = os.lstat(path) if kind[:2] != "nn" else None
    for save in (
        write,
        vector.save,
        lambda path: export_vector(vector, path, to="gguf"),
        lambda path: export_vector(vector, path, to="safetensors"),
        lambda path: write_session(path, SESSION),
    ):
        with pytest.raises((DiskError, SessionError), match=kind) as caught:
            save(path)
        if isinstance(caught.value, DiskError):
            caught.match(said)
        if before:
            assert os.lstat(path) == before
        assert names(tmp_path) == ([kind] if before else [])


def test_a_name_of_the_longest_length_can_be_written(tmp_path):
    for name in ("é" * 127, "n" * 255):
        write(tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"new"


SESSION = SavedSession("f", None, "s" * 2**17, GREEDY, 10, (), None, None, ())
WRITERS = {
    "v.npz": lambda path, vector: vector.save(path),
    "v.gguf": lambda path, vector: export_vector(vector, path),
    "v.safetensors": lambda path, vector: export_vector(vector, path),
    "session.json": lambda path, vector: write_session(path, SESSION),
    "lines": lambda path, vector: write(path, bytes(2**17)),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("size", [0, 1, 4096, 20_000])
@pytest.mark.parametrize("there", [True, False])
def test_every_writer_on_a_full_disk(tmp_path, vector, name, size, there):
    """The failure names file and remedy; the older file is kept; nothing else is left."""
    path = tmp_path / name
    if there:
        WRITERS[name](path, vector)
    old = path.read_bytes() if there else None
    with disk_of(size), pytest.raises(DiskError, match=f"{name}: .*Make room on the disk"):
        WRITERS[name](path, vector)
    assert (path.read_bytes() if there else None) == old
    assert names(tmp_path) == ([name] if there else [])
    WRITERS[name](path, vector)
    assert names(tmp_path) == [name]


def test_a_control_vector_that_did_not_arrive_is_noticed(tmp_path, vector):
    """gguf does not look when it closes a file: 30 kB written, the last buffer lost."""
    WRITERS["v.gguf"](tmp_path / "v.gguf", vector)
    whole = (tmp_path / "v.gguf").stat().st_size
    for missing in (1, 100, 2000):
        with disk_of(whole - missing), pytest.raises(DiskError, match=r"v\.gguf.*Make room"):
            WRITERS["v.gguf"](tmp_path / "v.gguf", vector)
    assert (tmp_path / "v.gguf").stat().st_size == whole


def test_a_journal_on_a_full_disk_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path, {"format": "f 1"}) as journal:
        journal.append({"a": 1})
        before = path.read_bytes()
        with disk_of(len(before) + 10), pytest.raises(DiskError, match=r"j\.jsonl.*Make room"):
            journal.append({"b": "x" * 20_000})
        assert path.read_bytes() == before and journal.records == [{"a": 1}]
        journal.append({"c": 3})
    with Journal(path, {"format": "f 1"}) as journal:
        assert journal.records == [{"a": 1}, {"c": 3}]
    with (
        disk_of(3),
        pytest.raises(DiskError, match=r"new\.jsonl.*Make room"),
        Journal(tmp_path / "new.jsonl", {"format": "f 1"}),
    ):
        pass


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    happened = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (happened.append("sync"), fsync(fd))[1])
    monkeypatch.setattr(
        Path, "replace", lambda old, new: (happened.append("rename"), replace(old, new))[1]
    )
    write(tmp_path / "v")
    assert happened == ["sync", "rename", "sync"]


@pytest.mark.parametrize("works", [True, False])
def test_a_macs_drive_is_told_to_empty_its_cache(tmp_path, monkeypatch, works):
    asked = []

    def control(handle, command):
        asked.append(command)
        if not works:
            raise OSError(errno.ENOTSUP, "not on this file system")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    write(tmp_path / "v")
    assert asked == [51, 51] and (tmp_path / "v").read_bytes() == b"new"


def test_the_next_write_removes_what_a_killed_one_left(tmp_path):
    path = tmp_path / "v.npz"
    path.write_bytes(b"old")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom mlx_densesteer.files import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); print(flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    process.stdout.read(1)
    write(path)  # does not touch what a running process writes
    assert len(names(tmp_path)) == 2 and path.read_bytes() == b"new"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(names(tmp_path)) == 2 and path.read_bytes() == b"new"
    write(path)
    assert names(tmp_path) == ["v.npz"]


def test_two_writers_leave_one_whole_file(tmp_path):
    """Each replaces the other's whole file, or whole folder; neither fails."""

    def work(number):
        content = bytes([number]) * 50_000
        for _ in range(20):
            write(tmp_path / "file", content)
            with scratch_folder(tmp_path / "folder") as scratch:
                (scratch / "made").mkdir()
                (scratch / "made" / str(number)).write_bytes(content)
                move_into_place(scratch / "made", tmp_path / "folder", replace=True)
            done.append(number)

    done = []
    threads = [threading.Thread(target=work, args=[number]) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 60
    content = (tmp_path / "file").read_bytes()
    assert content == content[:1] * 50_000
    assert names(tmp_path) == ["file", "folder"] and len(names(tmp_path / "folder")) == 1


def test_a_file_made_meanwhile_is_kept_on_request(tmp_path):
    with (
        pytest.raises(DiskError, match="another process has made it meanwhile"),
        atomic_path(tmp_path / "f", replace=False) as made,
    ):
        made.write_bytes(b"mine")
        (tmp_path / "f").write_bytes(b"theirs")
    assert names(tmp_path) == ["f"] and (tmp_path / "f").read_bytes() == b"theirs"


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(100))
    for name, said in {
        "pipe": "not a regular file; expected a list",
        ".": "is a folder; expected a list",
        "none": "no such file. Make one",
        "large/x": "no such file",
        "large": "has 100 bytes; a list has at most 99",
        "n" * 300: "cannot be read .* Name a list",
        "zero\0": "cannot be read .* Name a list",
    }.items():
        with pytest.raises(VectorFormatError, match=said):
            read_file(tmp_path / name, "a list", limit=99, make="Make one.")
