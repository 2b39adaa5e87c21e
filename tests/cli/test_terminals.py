"""What reaches a terminal: no control character but our own, whoever wrote the text. Pipes get all of it."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mlx_densesteer.steering.vector import SteeringVector, VectorMeta
from mlx_densesteer.text import printable

pytest.importorskip("pexpect")
pytest.importorskip("pyte")
from pty_terminal import Terminal

SIZES = {
    "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 9, "max_position_embeddings": 9,
}  # fmt: skip
EVIL = "\x1b]0;title\x07\x9b2J\u202eevil\u2066\x7f\u061c\r\u200f"
FORBIDDEN = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))} - set("\r\n\t")
FORBIDDEN |= set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@pytest.fixture
def evil(tmp_path, hf_folder):
    """A folder in which every name and every text is hostile: a model, a vector, problems, a config."""
    model = tmp_path / f"model{EVIL}"
    shutil.copytree(hf_folder, model)
    meta = VectorMeta(
        model=f"other {EVIL}", hidden_size=64, layer_count=4, method=EVIL, source=EVIL,
        fingerprint=EVIL, extra={EVIL: EVIL, "a": {EVIL: [EVIL]}},
        recommended={"layers": [1], "strength": 1.0, "text": EVIL},
    )  # fmt: skip
    vector = SteeringVector({1: np.ones(64), 2: np.ones(64)}, meta)
    vector.save(tmp_path / f"v{EVIL}.npz")
    (tmp_path / f"bad{EVIL}.npz").write_bytes(b"no archive " + EVIL.encode())
    (tmp_path / f"t{EVIL}.jsonl").write_text(json.dumps({EVIL: EVIL}) + "\n")
    (tmp_path / f"s{EVIL}.json").write_text(json.dumps({EVIL: EVIL}))
    other = tmp_path / f"other{EVIL}"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(SIZES | {"model_type": EVIL}))
    return tmp_path


def started(folder, *arguments, **options):
    command = [sys.executable, "-m", "mlx_densesteer", *arguments]
    return Terminal(command, {**os.environ, "XDG_STATE_HOME": str(folder)}, **options)


def clean(shown: bytes) -> str:
    """Return what a terminal got; it must hold no control character."""
    text = shown.decode()
    assert not set(text) & FORBIDDEN, repr(text)
    assert "\r" not in text.replace("\r\n", "")
    return text


MODEL, VECTOR = ("-m", f"model{EVIL}"), ("-v", f"v{EVIL}.npz")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["vector", "show", f"v{EVIL}.npz"], "residual|norm"),
        (["vector", "show", f"bad{EVIL}.npz"], "Error: bad"),
        (["vector", "show", "a", EVIL], "unexpected extra argument"),
        (["vector", f"show{EVIL}"], "No such command"),
        (["vector", "show", f"--json{EVIL}"], "No such option"),
        (["vector", "show", f"v{EVIL}.gguf"], "another program's file"),
        (["vector", "export", f"v{EVIL}.npz", "-o", f"w{EVIL}.safetensors"], "w\u241b"),
        (["vector", "import", f"s{EVIL}.json", "-o", f"w{EVIL}.npz"], "Error: s"),
        (["generate", "-m", f"nowhere{EVIL}", "Hi"], "no such folder"),
        (["generate", "-m", f"other{EVIL}", "Hi"], "no model.safetensors"),
        (["doctor", "-m", f"other{EVIL}"], "which mlx-lm does not have"),
        (["generate", *MODEL, *VECTOR, "-l", EVIL, "Hi"], "expected a number"),
        (["generate", *MODEL, *VECTOR, "-s", EVIL, "Hi"], "expected a number"),
        (["generate", *MODEL, "Hi", EVIL], "quote it"),
        (["chat", *MODEL, "--load", f"x{EVIL}.json"], "does not exist"),
        # these import mlx
        pytest.param(["generate", *MODEL, *VECTOR, "-n", "4", "Hi"], "using v", marks=pytest.mark.slow),
        pytest.param(["convert", f"other{EVIL}"], "no model.safetensors", marks=pytest.mark.slow),
        pytest.param(["eval", *MODEL, f"t{EVIL}.jsonl"], "Error: t", marks=pytest.mark.slow),
        pytest.param(["pairs", *MODEL, "-o", f"p{EVIL}.jsonl", f"t{EVIL}.jsonl"], "Error", marks=pytest.mark.slow),
        pytest.param(["extract", *MODEL, "-o", f"w{EVIL}.npz", f"t{EVIL}.jsonl"], "Error: t", marks=pytest.mark.slow),
        pytest.param(["bake", *MODEL, *VECTOR, "-o", f"other{EVIL}"], "Error: other", marks=pytest.mark.slow),
        pytest.param(["chat", *MODEL, "--load", f"s{EVIL}.json"], "not a session file", marks=pytest.mark.slow),
        pytest.param(["serve", *MODEL, "--port", "0", *VECTOR], "vector name", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_no_control_character_of_a_name_or_a_text_reaches_a_terminal(
    evil, monkeypatch, arguments, said
):
    monkeypatch.chdir(evil)
    plain = {"term": "dumb"} if arguments[0] == "chat" else {}  # without the editor's own sequences
    terminal = started(evil, *arguments, columns=200, **plain)
    terminal.end()
    text = clean(terminal.raw)
    assert any(part in " ".join(text.split()) for part in said.split("|")), text
    assert "]0;title" in text


def test_text_of_a_model_is_printable_on_a_terminal_and_unchanged_in_a_pipe(evil, monkeypatch):
    """The tiny model writes random bytes; with this seed escape is among them."""
    monkeypatch.chdir(evil)
    options = ("-n", "100", "--temp", "2", "--seed", "3", "--raw", "Hi")
    command = [sys.executable, "-m", "mlx_densesteer", "generate", *MODEL, *options]
    piped = subprocess.run(command, capture_output=True, timeout=60)
    assert piped.stdout.count(b"\x1b") > 0 and piped.returncode == 0
    asked = subprocess.run([*command[:-1], "--json", "Hi"], capture_output=True, timeout=60)
    assert piped.stdout.decode() == json.loads(asked.stdout)["text"] + "\n"
    terminal = started(evil, "generate", *MODEL, *options)
    terminal.end()
    assert "\u241b" in clean(terminal.raw)


def test_a_file_name_that_is_no_text_is_a_result_too(evil, monkeypatch):
    monkeypatch.chdir(evil)
    name = b"w\xff.safetensors"
    command = [sys.executable, "-m", "mlx_densesteer", "vector", "export", f"v{EVIL}.npz", "-o"]
    done = subprocess.run([*command, name], capture_output=True, timeout=60)
    assert (done.stdout, done.returncode) == (name + b"\n", 0), done.stderr


def test_the_chat_without_editing_shows_no_control_character(evil, monkeypatch):
    monkeypatch.chdir(evil)
    terminal = started(
        evil, "chat", *MODEL, "--temp", "2", "--seed", "20", "-n", "100", term="dumb"
    )
    terminal.wait("unsteered>")
    terminal.send("/vector \x1b]0;x.npz\n")
    terminal.wait("error: \u241b]0;x.npz")
    terminal.send("Hi\n")
    terminal.wait("100 tokens")
    terminal.send("/quit\n")
    terminal.end()
    assert clean(terminal.raw).count("\u241b") > 1


def test_all_of_python_writes_through_the_guard(tmp_path):
    code = (
        "import sys, warnings\n"
        "from mlx_densesteer.text import guard_terminals\n"
        f"guard_terminals(); guard_terminals(); evil = {EVIL!r}\n"
        "print(evil, end=''); sys.stdout.writelines([evil, '\\n']); warnings.warn(evil)\n"
        "raise ValueError(evil)"
    )
    terminal = Terminal([sys.executable, "-c", code], os.environ, columns=200)
    assert terminal.end() == 1
    text = clean(terminal.raw)
    assert text.count(printable(EVIL)) >= 4 and "Traceback" in text


def test_a_download_shows_the_names_of_its_files_as_text(monkeypatch, capsys):
    from mlx_densesteer.model.hub import _Bar

    with _Bar(desc=EVIL, total=1, disable=False) as bar:
        bar.update()
    assert printable(EVIL) in capsys.readouterr().err


@pytest.mark.slow
def test_the_chat_with_editing_shows_no_control_character(evil, monkeypatch):
    """An answer as Markdown, a saved question that is given back, the names of files in the menu."""
    pytest.importorskip("prompt_toolkit")
    pytest.importorskip("rich")
    from mlx_densesteer import Session, load

    monkeypatch.chdir(evil)
    session = Session(load(f"model{EVIL}"), max_tokens=1)
    for _ in session.send(f"Hi{EVIL}"):
        pass
    session.save("saved.json")
    terminal = started(
        evil, "chat", *MODEL, "--load", "saved.json", "--temp", "2", "--seed", "20", "-n", "100"
    )
    terminal.wait("unsteered>")
    terminal.send("Hi\r")
    terminal.wait("tokens, 1 step")
    terminal.send("/undo\r")
    terminal.wait("1 turn left: Hi")
    terminal.send("\x15/undo\r")
    terminal.wait("0 turns left: Hi")
    terminal.wait("unsteered> Hi\u241b")
    terminal.send("\x15/load \t")
    terminal.wait("bad\u241b")
    terminal.send("\x15\x1b\r\x04")
    terminal.pump(1)
    terminal.process.close(force=True)
    own = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|(?<!title)\x07|\x08|\r")
    text = clean(own.sub(b"", terminal.raw))
    assert "]0;title" in text
