"""The chat's parts, and the chat in a pipe; tests/chat/test_chat_terminal.py runs it in a terminal."""

import io
import os
import subprocess
import sys
from os import terminal_size
from pathlib import Path

import pytest

from mlx_densesteer.chat.blocks import Blocks
from mlx_densesteer.chat.commands import COMMANDS, Call, help_lines, markdown_table, nearest, parse
from mlx_densesteer.chat.dial import read_strength, sweep_strengths
from mlx_densesteer.text import one_line, printable
from mlx_densesteer.chat.state import history_file
from mlx_densesteer.chat.status import Status
from mlx_densesteer.errors import InputError

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
    page = Path(__file__).parents[2] / "docs/chat.md"
    assert markdown_table() in page.read_text("utf-8")


# The dial


def test_strengths_are_numbers_or_doses():
    def relative(dose):
        return 20 * dose

    assert read_strength("1.5", relative) == 1.5
    assert read_strength("-10%", relative) == -2.0
    for wrong in ("", "much", "nan", "inf", "%", "1.5r"):
        with pytest.raises(InputError, match="expected a number"):
            read_strength(wrong, relative)
    assert sweep_strengths("2, 10% -1 2", 5.0, relative) == [-1.0, 2.0]
    assert sweep_strengths("", 4.0, relative) == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert sweep_strengths("", -4.0, relative) == [-8.0, -6.0, -4.0, -2.0, 0.0]
    assert sweep_strengths("", 0.0, relative) == [-2.0, 0.0, 2.0, 4.0, 8.0]
    assert str(sweep_strengths("-0", 1.0, relative)[0]) == "0.0"


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_the_settings_are_always_whole(width):
    name = "a-very-long-name-of-a-model-that-somebody-has-chosen"
    status = Status(name, "dense.npz", "3-5,9", -1.5, "generated", 123, 32768)
    lines = status.lines(width)
    assert all(len(line) <= width for line in lines)
    for part in ("dense.npz", "layer 3-5,9", "strength -1.5", "123/32768"):
        assert any(part in line for line in lines), part
    assert status.prompt == "-1.5> "


# What reaches the screen


def test_control_characters_become_visible():
    evil = "a\x1b[2J\x07\x9b5n\x7f\r\n\tb\x00\ud800"
    shown = printable(evil)
    assert shown == "a\u241b[2J\u2407\ufffd5n\u2421\n\tb\u2400\ufffd"
    assert "".join(printable(character) for character in evil) == shown
    assert one_line("a  b\n" + 100 * "c", 10) == "a b ccc..."


def test_blocks_end_where_nothing_can_change_them_any_more():
    text = (
        "One\ntwo.\n\n\n1. item\n\n   its second paragraph\n\n2. item\n \n```py\na\n\nb\n```\n\n"
        "~~~\n```\n\n~~~\n\nlast\n"
    )
    blocks, found = Blocks(), []
    for character in text:  # whatever the pieces are
        found += blocks.feed(character)
    assert [*found, blocks.current] == [
        "One\ntwo.", "1. item\n\n   its second paragraph", "2. item\n ", "```py\na\n\nb\n```",
        "~~~\n```\n\n~~~", "last\n",
    ]  # fmt: skip
    at_once = Blocks()
    assert at_once.feed(text) == found


def lines_of(text: str, width: int = 60) -> list[str]:
    pytest.importorskip("rich")
    import click
    from rich.console import Console

    from mlx_densesteer.chat.markdown import render

    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    return [click.unstyle(line).rstrip() for line in render(text, console, width)]


def test_markdown_as_models_write_it():
    assert lines_of("2*3*4=24 and 5*6*7\nnext **line**") == ["2*3*4=24 and 5*6*7", "next line"]
    assert lines_of(r"so \(x^2\) and \[ a \\ b \]") == [r"so \(x^2\) and \[ a \\ b \]"]
    assert lines_of("<think> a < b </think> &#27; &lt;") == ["<think> a < b </think> &#27; &lt;"]
    assert lines_of("[x]: http://a.b") == ["[x]: http://a.b"], "no text vanishes"
    assert lines_of("Kim buys 5.\n#### 34") == ["Kim buys 5.", "34"], "one step looks like one"
    assert lines_of("a\n\nb\n#### 3") == ["a", "", "b", "3"]
    assert all(
        len(line) <= 20 for line in lines_of("| a | b |\n|-|-|\n| 1 | " + 40 * "x" + " |", 20)
    )


def test_the_painter_writes_from_where_lines_differ():
    pytest.importorskip("rich")
    pyte = pytest.importorskip("pyte")
    from mlx_densesteer.chat.painter import Painter

    screen = pyte.HistoryScreen(20, 5, ratio=1)
    terminal, out = pyte.Stream(screen), io.StringIO()
    painter = Painter(out, lambda: terminal_size((20, 5)))

    def after(action, lines):
        out.seek(0)
        out.truncate()
        action(lines)
        terminal.feed(out.getvalue().replace("\n", "\r\n"))
        return [line.rstrip() for line in screen.display]

    assert after(painter.show, ["one", "two", "foot"])[:3] == ["one", "two", "foot"]
    assert after(painter.show, ["one", "two three", "foot"])[:3] == ["one", "two three", "foot"]
    assert "one" not in out.getvalue(), "what is the same is not written again"
    after(painter.show, ["one", "two three", "foot"])
    assert out.getvalue() == ""
    long = [f"line {n}" for n in range(8)]
    assert after(painter.show, [*long, "foot"]) == [*long[-4:], "foot"]
    after(painter.keep, long)
    assert after(painter.show, ["next", "foot"])[-2:] == ["next", "foot"]
    after(lambda _: painter.close(), None)
    gone = ["".join(row[x].data for x in sorted(row)).rstrip() for row in screen.history.top]
    kept = [*gone, *(line.rstrip() for line in screen.display)]
    assert [line for line in kept if line] == long, "every line once, no foot"


def test_an_answer_on_a_terminal_holds_no_escape_codes_of_the_model():
    pytest.importorskip("rich")
    code = (
        "from mlx_densesteer.chat.terminal_screen import TerminalScreen\n"
        "from mlx_densesteer.chat.status import Status\n"
        "view = TerminalScreen().answer(lambda: Status('m', None, '', 0.0, '', 1, 2))\n"
        "for piece in ('a\\x1b]0;ti', 'tle\\x07\\n\\n# b\\x1b[2J\\x9b5n'): view.feed(piece)\n"
        "view.finish(); TerminalScreen().warn('c\\x1b[2J')"
    )
    pexpect = pytest.importorskip("pexpect")
    shown = pexpect.run(f'{sys.executable} -c "{code}"', timeout=60)
    assert "a\u241b]0;title\u2407".encode() in shown
    assert b"\x1b]" not in shown and b"\x1b[2J" not in shown and b"\x07" not in shown
    assert shown.endswith(b"\r\n") and b"\x1b[?25h" in shown, "the cursor is back"


# Files


def test_the_history_is_the_users_own(tmp_path, monkeypatch):
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
def demo():
    from mlx_densesteer.demo import VECTOR
    from mlx_densesteer.model.model import load
    from mlx_densesteer.steering.steering import Steering
    from mlx_densesteer.steering.vector import SteeringVector

    model, tokenizer = load("demo")
    return model, tokenizer, Steering(SteeringVector.load(VECTOR), 4.756, (5,))


def answer(session, text):
    reply = session.send(text)
    for _ in reply:
        pass
    return reply.result


def test_rows_equal_the_answers_of_the_session(demo):
    from mlx_densesteer.chat.rows import Asked, Rows, context_tokens, last_question
    from mlx_densesteer.generation.session import Session

    model, tokenizer, steering = demo
    session = Session(model, tokenizer, steering, max_tokens=80)
    answer(session, EGGS)
    second = answer(session, COINS)
    assert context_tokens(session) == second.prompt_tokens + second.tokens
    rows = Rows(session, last_question(session), [None, steering])
    for _ in rows:
        pass
    unsteered, steered = rows.stop()
    assert steered.token_ids == second.token_ids
    assert [state.text for state in rows.states] == [unsteered.text, steered.text]
    session.set_strength(0)
    again = session.regenerate()
    assert "".join(again) == unsteered.text
    rows = Rows(session, Asked(EGGS, session.turns), [steering])
    for _ in rows:
        pass
    session.steer(steering)
    assert answer(session, EGGS).token_ids == rows.stop()[0].token_ids
    assert len(session.turns) == 3


def test_rows_that_are_stopped_keep_what_they_said(demo):
    from mlx_densesteer.chat.rows import Asked, Rows
    from mlx_densesteer.errors import ContextError
    from mlx_densesteer.generation.session import Session

    model, tokenizer, steering = demo
    session = Session(model, tokenizer, steering)
    rows = Rows(session, Asked(COINS, ()), [None, steering])
    for _, _ in zip(range(12), rows, strict=False):
        pass
    results = rows.stop()
    assert [result.finish_reason for result in results] == ["interrupted"] * 2
    assert all(state.text == state.result.text != "" for state in rows.states)
    assert rows.stop() == results
    with pytest.raises(ContextError, match="no room"):
        Rows(Session(model, tokenizer, context=20), Asked(COINS, ()), [None])


def script(demo, lines, **options):
    """Run a chat over ``lines``; a line may be an exception to raise."""
    from mlx_densesteer.chat.keyboard import Keyboard
    from mlx_densesteer.chat.loop import Chat
    from mlx_densesteer.chat.screen import Screen
    from mlx_densesteer.generation.session import Session
    from mlx_densesteer.model.model import inspect

    class Script(Keyboard):
        interactive = True
        given_back: str | None = None

        def read(self, status):
            if not lines:
                raise EOFError
            line = lines.pop(0)
            if isinstance(line, BaseException):
                raise line
            return line() or "" if callable(line) else line

        def give_back(self, text):
            self.given_back = text

    model, tokenizer, steering = demo
    session = Session(model, tokenizer, steering, max_tokens=80, **options)
    chat = Chat(session, inspect(model, "demo"), Script(), Screen())
    chat.failures = chat.run()
    return chat


def test_ctrl_c_while_the_question_is_read_gives_it_back(demo, monkeypatch, capsys):
    from mlx_densesteer.model.prefix import Prefix

    fill = Prefix.fill

    def interrupted(*_, **__):
        monkeypatch.setattr(Prefix, "fill", fill)
        raise KeyboardInterrupt

    chat = script(
        demo, [EGGS, lambda: monkeypatch.setattr(Prefix, "fill", interrupted), COINS, "/retry"]
    )
    assert chat.keyboard.given_back == COINS
    assert [turn.user for turn in chat.session.turns] == [EGGS]
    assert "does not count" in capsys.readouterr().err
    assert chat.failures == 0


def test_errors_are_shown_and_the_chat_goes_on(demo, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    lines = [
        "/compare", "/stats", "/strength much", "/layer 77", f"/save {tmp_path}/folder", "/save",
        f"/load {tmp_path}/none", "/drop 3", "/drop x", "/sweep " + "1 " * 3 + " ".join(map(str, range(20))),
        "/vector /dev/null", KeyboardInterrupt(), EGGS,
    ]  # fmt: skip
    chat = script(demo, lines)
    said = capsys.readouterr()
    assert chat.failures == 11 == said.err.count("error: ")
    assert said.out.startswith("Tom finds 6: 4+6=10.")
    assert len(chat.session.turns) == 1


def test_a_full_context_says_what_to_do(demo, capsys):
    chat = script(demo, [EGGS, COINS, "/drop", COINS], context=90)
    assert chat.failures == 1
    assert "Here that is /drop" in capsys.readouterr().err
    assert [turn.user for turn in chat.session.turns] == [COINS]


def test_the_unsteered_run_of_the_stats_is_remembered(demo, monkeypatch, capsys):
    from mlx_densesteer.chat import actions

    made = []
    rows = actions.Rows
    monkeypatch.setattr(actions, "Rows", lambda *a: made.append(a) or rows(*a))
    script(demo, [COINS, "/stats", "/stats", "/retry", "/stats", "/strength 0", "/retry", "/stats"])
    tables = capsys.readouterr().out.split("  steered  ")[1:]
    assert len(tables) == 3
    assert len(made) == 2, "once for each of the two steered answers"
    assert tables[0].startswith(tables[1].partition("Kim")[0]), "the same figures"


def test_another_vector_keeps_the_strength(demo, tmp_path):
    import numpy as np

    from mlx_densesteer.steering.vector import SteeringVector

    _, _, steering = demo
    arrays = {
        2: np.ones_like(steering.vector.layers[5]),
        3: np.ones_like(steering.vector.layers[5]),
    }
    SteeringVector(arrays, steering.vector.meta).save(tmp_path / "other.npz")
    chat = script(demo, ["/positions generated", f"/vector {tmp_path}/other.npz"])
    now = chat.session.steering
    assert (now.strength, now.layers, now.positions) == (4.756, (3,), "generated")
    chat = script(demo, ["/vector off", "/vector demo"])
    assert chat.session.steering.layers == (5,)
    assert chat.session.strength == pytest.approx(4.756, abs=1e-3)


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
        [sys.executable, "-m", "mlx_densesteer", "chat", "-m", "demo", "-v", "demo", "-n", "40"],
        input="\n".join(lines).encode() + b"\n\xff\n", capture_output=True, timeout=120, check=False,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
    )  # fmt: skip
    out, err = run.stdout.decode(), run.stderr.decode()
    assert out.startswith(
        "Kim buys 5: 12+5=17. The number doubles: 17*2=34.\n#### 34\n"
        "Kim buys 5: 12+5=17.\n\nThe number doubles: 17*2=34.\n#### 34\n"
    )
    assert "--- unsteered\n" in out and "\n--- strength 0\n" in out
    assert f"+4.76> {COINS}\n(31 tokens, 1 step, density 31.0" in err
    assert "0> Kim has \\\n . 3 coins.\n" in err
    assert "/nothing: no such command" in err and "not UTF-8" in err
    assert "\x1b" not in out + err
    assert run.returncode == 1
    assert not (tmp_path / "mlx-densesteer").exists(), "no history of what comes from a pipe"


def test_without_the_extra_it_says_how_to_get_it(monkeypatch, capsys):
    import importlib.util

    from mlx_densesteer.chat.screen import Screen
    from mlx_densesteer.cli.chat import _faces
    from mlx_densesteer.errors import install_command

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _, screen = _faces(False)
    assert type(screen) is Screen
    assert install_command("chat") in capsys.readouterr().err
