"""The chat's parts, and the chat in a pipe; tests/chat/test_chat_terminal.py runs it in a terminal."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_densesteer as ds
from mlx_densesteer.chat.commands import COMMANDS, Call, help_lines, nearest, parse
from mlx_densesteer.chat.loop import Chat
from mlx_densesteer.chat.plain import Keyboard, Screen
from mlx_densesteer.chat.rows import Rows
from mlx_densesteer.chat.status import Status
from mlx_densesteer.demo import VECTOR
from mlx_densesteer.errors import ContextError, InputError
from mlx_densesteer.generation.session import Session
from mlx_densesteer.steering.request import resolve
from mlx_densesteer.steering.steering import Steering
from mlx_densesteer.steering.vector import SteeringVector
from mlx_densesteer.text import one_line, printable

COINS = (
    "Kim has 12 coins. Then Kim buys 5. Next the number doubles. How many coins does Kim have now?"
)
EGGS = "Tom has 4 eggs. Then Tom finds 6. How many eggs does Tom have now?"


# Commands


def test_commands_are_parsed():
    assert parse("  hello\nthere ") == "hello\nthere"
    assert parse("//etc/hosts") == "/etc/hosts"
    call = parse("/Strength  1.5 ")
    assert isinstance(call, Call)
    assert (call.command.name, call.argument) == ("strength", "1.5")
    assert parse("/system two\nlines").argument == "two\nlines"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("strenght", "strength"), ("comp", "compare"), ("lod", "load"), ("s", "strength")],
)
def test_the_nearest_commands_are_named_and_nothing_is_sent(typed, meant):
    assert meant in nearest(typed)
    with pytest.raises(InputError, match=f"nothing was sent. Did you mean .*/{meant}"):
        parse(f"/{typed} 1")


@pytest.mark.parametrize("text", ["/", "/ strength", "/xyzzy", "/\x1b[2J"])
def test_what_is_like_no_command_is_refused(text):
    with pytest.raises(InputError, match="no such command"):
        parse(text)


@pytest.mark.parametrize("width", [30, 40, 80, 160])
def test_help_fits_the_screen_and_names_everything(width):
    lines = help_lines(width)
    assert all(len(line) < width for line in lines)
    assert all(any(line.startswith(command.usage) for line in lines) for command in COMMANDS)


def test_the_documentation_has_the_table_of_the_help():
    page = (Path(__file__).parents[2] / "docs/chat.md").read_text("utf-8")
    rows = [("command", "what it does"), ("---", "---")]
    rows += [(f"`{command.usage}`", command.help) for command in COMMANDS]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    assert "\n".join(lines) in page


# What reaches the screen


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_the_settings_are_always_whole(width, make_vector):
    vector = make_vector(range(10), layer_count=10)
    steering = Steering(vector, -1.5, (3, 4, 5, 9), "generated")
    status = Status("a-very-long-name-of-a-model-that-was-chosen", steering, -0.125, 123, 32768)
    lines = status.lines(width)
    assert all(len(line) <= width for line in lines)
    wanted = ["vector", "layer 3-5, 9", "dose -12.5%", "positions gen", "123/32768"]
    for part in wanted:
        assert any(part in line for line in lines), part
    assert width == 20 or any("dose -12.5% (strength -1.5)" in line for line in lines)
    assert status.prompt == "-12.5%> "
    assert Status("m", None, 0.0, 0, 9).prompt == "unsteered> "


def test_control_characters_become_visible():
    evil = "a\x1b[2J\x07\x9b5n\x7f\r\n\tb\x00\ud800"
    shown = printable(evil)
    assert shown == "a\u241b[2J\u2407\ufffd5n\u2421\n\tb\u2400\ufffd"
    assert "".join(printable(character) for character in evil) == shown
    assert one_line("a  b\n" + 100 * "c", 10) == "a b ccc..."


def test_only_the_last_block_can_still_change():
    blocks = pytest.importorskip("mlx_densesteer.chat.terminal_screen").blocks
    text = (
        "One\ntwo.\n\n\n- item\n\n   its second paragraph\n\n- item\n \n1. a\n2. b\n```py\na\n\nb\n```\n\n"
        "~~~\n```\n\n~~~\n\nlast\n"
    )
    finished, rest = [], ""
    for character in text:  # whatever the pieces are
        *more, rest = blocks(rest + character)
        finished += more
    assert [*finished, rest] == [
        "One\ntwo.\n\n\n",
        "- item\n\n   its second paragraph\n\n",
        "- item\n \n",
        "1. a\n",
        "2. b\n",
        "```py\na\n\nb\n```\n\n",
        "~~~\n```\n\n~~~\n\n",
        "last\n",
    ]
    assert blocks(text) == [*finished, rest]
    assert blocks("") == [""]


def lines_of(text: str, width: int = 60) -> list[str]:
    markdown = pytest.importorskip("mlx_densesteer.chat.terminal_screen").markdown
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, markup=False, emoji=False)
    console.print(markdown(text), end="")
    return console.file.getvalue().splitlines()


def test_markdown_as_models_write_it():
    assert lines_of("2*3*4=24 and 5*6*7\nnext **line**") == ["2*3*4=24 and 5*6*7", "next line"]
    assert lines_of(r"so \(x^2\) and \[ a \\ b \]") == [r"so \(x^2\) and \[ a \\ b \]"]
    assert lines_of(r"5 \* 6 \_ 7") == ["5 * 6 _ 7"]
    assert lines_of("<think> a < b </think> &#27; &lt;") == ["<think> a < b </think> &#27; &lt;"]
    assert lines_of("<div>\na\n</div>") == ["<div>", "a", "</div>"], "no text vanishes"
    assert lines_of("[x]: http://a.b") == ["[x]: http://a.b"]
    assert lines_of("Kim buys 5.\n#### 34") == ["Kim buys 5.", "34"], "one step looks like one"
    assert lines_of("a\n\nb\n#### 3") == ["a", "", "b", "3"]
    assert lines_of("so:\n- a\n- b\n\n```\nx\n```") == ["so:", " • a", " • b", "", " x"]
    assert lines_of("1. a\n\n2. b\n3. c") == [" 1 a", "", " 2 b", " 3 c"], "two steps look like two"
    assert all(
        len(line) <= 20 for line in lines_of("| a | b |\n|-|-|\n| 1 | " + 40 * "x" + " |", 20)
    )


def test_an_answer_on_a_terminal_holds_no_escape_codes_of_the_model():
    pytest.importorskip("rich")
    code = (
        "from mlx_densesteer.chat.terminal_screen import TerminalScreen\n"
        "from mlx_densesteer.chat.status import Status\n"
        "view = TerminalScreen().answer(lambda: Status('m', None, 0.0, 1, 2))\n"
        "for piece in ('a\\x1b]0;ti', 'tle\\x07\\n\\n# b\\x1b[2J\\x9b5n'): view.feed(piece)\n"
        "view.finish(); TerminalScreen().warn('c\\x1b[2J')"
    )
    pexpect = pytest.importorskip("pexpect")
    shown = pexpect.run(f'{sys.executable} -c "{code}"', timeout=60)
    assert "a\u241b]0;title\u2407".encode() in shown
    assert b"\x1b]" not in shown and b"\x1b[2J" not in shown and b"\x07" not in shown
    assert shown.endswith(b"\r\n") and b"\x1b[?25h" in shown, "the cursor is back"


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, whatever earlier tests of this process have set."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_the_middle_of_a_painting_leaves_nothing_behind(monkeypatch, interruptible):
    pytest.importorskip("rich")
    pyte = pytest.importorskip("pyte")
    from mlx_densesteer.chat.terminal_screen import TerminalScreen

    class Terminal(io.StringIO):
        """Ctrl-C comes in the middle of the write that is numbered ``at``."""

        def __init__(self, at: int):
            super().__init__()
            self.at, self.picture = at, pyte.Screen(80, 24)
            self.stream = pyte.Stream(self.picture)

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            self.stream.feed(text[: len(text) // 2].replace("\n", "\r\n"))
            self.at -= 1
            if self.at == 0:
                signal.raise_signal(signal.SIGINT)
            self.stream.feed(text[len(text) // 2 :].replace("\n", "\r\n"))
            return len(text)

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("mlx_densesteer.chat.terminal_screen.OFTEN", 0)
    monkeypatch.setattr("mlx_densesteer.chat.terminal_screen.SHARE", 0)
    for at in range(1, 20):
        terminal = Terminal(at)
        monkeypatch.setattr(sys, "stdout", terminal)
        view, said, interrupted = None, "", False
        try:
            view = TerminalScreen().answer(lambda: Status("m", None, 0.0, 1, 2))
            for piece in ("one\n\n", "two", " words\n\n", "three"):
                said += piece
                view.feed(piece)
        except KeyboardInterrupt:
            interrupted = True
        terminal.at = 0
        if view is not None:
            view.finish()
        shown = [line.rstrip() for line in terminal.picture.display]
        assert [line for line in shown if line] == [line for line in said.split("\n") if line], at
        if not interrupted:
            break
    assert at > 5, "hardly a painting was hit"


# Files


def test_the_history_is_the_users_own(tmp_path, monkeypatch):
    history_file = pytest.importorskip("mlx_densesteer.chat.terminal_keyboard").history_file
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = history_file()
    assert path == tmp_path / "state/mlx-densesteer/chat-history"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    assert history_file().stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_file().is_relative_to(tmp_path / ".local/state")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert history_file().is_relative_to(tmp_path / "Library/Application Support")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert history_file() is None


# The rows of one batch, and the loop


@pytest.fixture(scope="module")
def steering(demo_model):
    """A dose of 20 % at layer 5: answers of one step, whatever the demo's default layer is."""
    return resolve(demo_model, "demo", "20%", [5])


def answer(session, text):
    reply = session.send(text)
    for _ in reply:
        pass
    return reply.result


def test_rows_equal_the_answers_of_the_session(demo_model, steering):
    session = Session(demo_model, steering, max_tokens=80)
    assert session.tokens == 0
    answer(session, EGGS)
    second = answer(session, COINS)
    assert session.tokens == second.prompt_tokens + second.tokens
    rows = Rows(session, [None, steering])
    for _ in rows:
        pass
    unsteered, steered = rows.stop()
    assert steered.token_ids == second.token_ids
    assert [row.text for row in rows.rows] == [unsteered.text, steered.text]
    session.set_strength(0)
    assert "".join(session.regenerate()) == unsteered.text
    rows = Rows(session, [steering], EGGS)
    for _ in rows:
        pass
    session.steer(steering)
    assert answer(session, EGGS).token_ids == rows.stop()[0].token_ids
    assert len(session.turns) == 3


def test_rows_end_where_the_templates_turn_does(demo_model, steering, monkeypatch):
    """Of a base model; the conversation is encoded once for all rows, up to the question asked again."""
    base = ds.Model(demo_model.network, demo_model.tokenizer, "base")
    whole = ds.generate(demo_model, EGGS, steering=steering, max_tokens=8).token_ids
    base.__dict__["end_of_turn"] = whole[5]
    session = Session(base, steering, max_tokens=8)
    result = answer(session, EGGS)
    asked, prompt = [], Session.prompt
    monkeypatch.setattr(
        Session, "prompt", lambda *a, **options: asked.append(prompt(*a, **options)) or asked[-1]
    )
    rows = Rows(session, [None, steering])
    list(rows)
    assert rows.stop()[1].token_ids == result.token_ids == whole[: whole.index(whole[5])]
    assert [len(tokens) for tokens in asked] == [result.prompt_tokens]


def test_rows_that_are_stopped_keep_what_they_said(demo_model, steering):
    session = Session(demo_model, steering)
    rows = Rows(session, [None, steering], COINS)
    for _, _ in zip(range(12), rows, strict=False):
        pass
    results = rows.stop()
    assert [result.finish_reason for result in results] == ["interrupted"] * 2
    assert all(row.text == row.result.text != "" for row in rows.rows)
    assert rows.stop() == results
    with pytest.raises(ContextError, match="context is 20"):
        Rows(Session(demo_model, context=20), [None], COINS)


@pytest.fixture
def script(demo_model, steering):
    """Return a function that runs a chat over lines; a line may be an exception to raise."""

    class Script(Keyboard):
        interactive = True
        given_back: str | None = None

        def __init__(self, lines):
            self.lines = lines

        def read(self, status):
            if not self.lines:
                raise EOFError
            line = self.lines.pop(0)
            if isinstance(line, BaseException):
                raise line
            return line() or "" if callable(line) else line

        def give_back(self, text):
            self.given_back = text

    def run(lines, **options):
        session = Session(demo_model, steering, max_tokens=80, **options)
        chat = Chat(session, Script(list(lines)), Screen())
        chat.failures = chat.run()
        return chat

    return run


def test_ctrl_c_while_the_question_is_read_gives_it_back(script, monkeypatch, capsys):
    from mlx_densesteer.model.prefix import Prefix

    fill = Prefix.fill

    def interrupted(*_, **__):
        monkeypatch.setattr(Prefix, "fill", fill)
        raise KeyboardInterrupt

    chat = script([EGGS, lambda: monkeypatch.setattr(Prefix, "fill", interrupted), COINS, "/retry"])
    assert chat.keyboard.given_back == COINS
    assert [turn.user for turn in chat.session.turns] == [EGGS]
    assert "does not count" in capsys.readouterr().err
    assert chat.failures == 0


def test_errors_are_shown_and_the_chat_goes_on(script, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    lines = [
        "/compare", "/stats", "/strength much", "/layer 77", f"/save {tmp_path}/folder", "/save",
        f"/load {tmp_path}/none", "/drop 3", "/drop x", "/sweep " + "1 " * 3 + " ".join(map(str, range(20))),
        "/vector /dev/null", KeyboardInterrupt(), EGGS,
    ]  # fmt: skip
    chat = script(lines)
    said = capsys.readouterr()
    assert chat.failures == 11 == said.err.count("error: ")
    assert "error: /strength 'much': expected a number" in said.err  # as it was typed
    assert said.out.startswith("Tom finds 6: 4+6=10.")
    assert len(chat.session.turns) == 1


def test_a_full_context_says_what_to_do(script, capsys):
    chat = script([EGGS, COINS, "/drop", COINS], context=90)
    assert chat.failures == 1
    assert "forget old turns: /drop or /drop all" in capsys.readouterr().err
    assert [turn.user for turn in chat.session.turns] == [COINS]


def test_the_unsteered_run_of_the_stats_is_remembered(script, monkeypatch, capsys):
    from mlx_densesteer.chat import loop

    made = []
    monkeypatch.setattr(loop, "Rows", lambda *a: made.append(a) or Rows(*a))
    script([COINS, "/stats", "/stats", "/retry", "/stats", "/strength 0", "/retry", "/stats"])
    tables = capsys.readouterr().out.split("  steered  ")[1:]
    assert len(tables) == 3
    assert len(made) == 2, "once for each of the two steered answers"
    assert tables[0].startswith(tables[1].partition("Kim")[0]), "the same figures"


def test_a_sweep_takes_strengths_and_doses(script, capsys):
    chat = script(
        [EGGS, "/sweep 2, 10% -1 2", "/sweep", "/strength -10%", "/sweep", "/strength 0", "/sweep"]
    )
    assert not chat.failures
    tables = capsys.readouterr().out.split("ending  answer\n")[1:]
    doses = [
        [line.split()[0] for line in table.splitlines() if "%" in line.split()[0]]
        for table in tables
    ]
    assert doses.pop(0) == ["-4.21%", "+8.41%", "+10%"], "each once, the lowest first"
    assert doses == [
        ["0%", "+10%", "+20%", "+30%", "+40%"],
        ["-20%", "-15%", "-10%", "-5%", "0%"],
        ["-10%", "0%", "+10%", "+20%", "+40%"],
    ]


def test_another_vector_comes_with_its_own_layer_and_strength(script, tmp_path, capsys):
    import dataclasses

    vector = SteeringVector.load(VECTOR)
    best = {"layers": [3], "strength": 2.5, "positions": "generated"}
    meta = dataclasses.replace(vector.meta, recommended=best, fingerprint="0" * 16, model="another")
    SteeringVector(vector.layers, meta).save(tmp_path / "other.npz")
    chat = script(["/strength -9", f"/vector {tmp_path}/other.npz"])
    now = chat.session.steering
    assert (now.strength, now.layers, now.positions) == (2.5, (3,), "generated")
    assert "extracted from other weights (another, fingerprint 0000" in capsys.readouterr().err
    chat = script(["/vector off", "/vector demo"])
    assert chat.session.model.dose(chat.session.steering) == pytest.approx(0.2)
    script(["/strength 100%"])
    assert "a large dose" in capsys.readouterr().err


def test_a_pipe_is_a_conversation(tmp_path):
    lines = [
        COINS,
        "/strength 0",
        "/retry",
        "Kim has \\",
        "3 coins.",
        "/compare",
        "/nothing",
        "last",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "mlx_densesteer", "chat", "-m", "demo", "-v", "demo", "-l", "5", "-n", "40"],
        input="\n".join(lines).encode() + b"\n\xff\n", capture_output=True, timeout=120, check=False,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
    )  # fmt: skip
    out, err = run.stdout.decode(), run.stderr.decode()
    assert out.startswith(
        "Kim buys 5: 12+5=17. The number doubles: 17*2=34.\n#### 34\n"
        "Kim buys 5: 12+5=17.\n\nThe number doubles: 17*2=34.\n#### 34\n"
    )
    assert "--- unsteered\n" in out and "\n--- 0%\n" in out
    assert f"+20%> {COINS}\n(31 tokens, 1 step, density 31.0" in err
    assert "0%> Kim has \\\n  . 3 coins.\n" in err
    assert "/nothing: no such command" in err and "not UTF-8" in err
    assert "\x1b" not in out + err
    assert run.returncode == 1
    assert not (tmp_path / "mlx-densesteer").exists(), "no history of what comes from a pipe"


def test_without_the_extra_it_says_how_to_get_it(monkeypatch, capsys):
    import importlib.util

    from mlx_densesteer.cli.chat import _terminal
    from mlx_densesteer.errors import install_command

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _, screen = _terminal(False)
    assert type(screen) is Screen
    assert install_command("chat") in capsys.readouterr().err
