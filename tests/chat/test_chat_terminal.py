"""The chat in a real pseudo-terminal, with the demo model."""

import os
import re
import signal
import sys

import pytest

pytest.importorskip("prompt_toolkit")
pytest.importorskip("rich")
from pty_terminal import Terminal

pytestmark = pytest.mark.slow

COINS = (
    "Kim has 12 coins. Then Kim buys 5. Next the number doubles. How many coins does Kim have now?"
)
ALT_ENTER = "\x1b\r"
STEERED = ("-v", "demo", "-l", "5")  # the answers below, whatever the demo's default layer is


@pytest.fixture
def chat(tmp_path):
    """Return a function that starts a chat in a terminal; it is ready for a question."""
    started = []

    def start(*options: str, columns=80, lines=24, **env: str) -> Terminal:
        command = [sys.executable, "-m", "mlx_densesteer", "chat", "-m", "demo", *options]
        settings = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state"), **env}
        terminal = Terminal(command, settings, columns=columns, lines=lines)
        started.append(terminal)
        terminal.wait(r"(?m)^(unsteered|[+-]?[0-9.]+%)>")
        return terminal

    yield start
    for terminal in started:
        terminal.process.close(force=True)


def ask(terminal: Terminal, text: str, until: str, count: int = 1) -> str:
    terminal.send(text + "\r")
    return terminal.wait(until, count=count)


def test_a_conversation(chat, tmp_path):
    terminal = chat(*STEERED)
    assert "Ask it this:\nZoe has 7 rows" in terminal.text
    settings = "demo | vector demo | layer 5 | dose +20% (strength +4.76) | 0/1024 tokens"
    terminal.wait(re.escape(settings))
    assert terminal.screen[-1] == settings
    text = ask(terminal, COINS, r"density 31\.0")
    assert "Kim buys 5: 12+5=17. The number doubles: 17*2=34.\n34\n31 tokens, 1 step" in text
    terminal.wait(r"65/1024 tokens")
    ask(terminal, "/strength 0", r"(?m)^0%>$")
    terminal.wait(r"layer 5 \| dose 0% \(strength 0\) \|")
    assert "Kim buys 5: 12+5=17.\n\nThe number doubles: 17*2=34." in ask(
        terminal, "/retry", "2 steps"
    )
    ask(terminal, "/strength 100%", r"a large dose(.|\n)*\+100%>")
    ask(terminal, "/retry", r"began to repeat itself")  # the brake is told, and lowers the strength
    terminal.wait(r"(?m)^(\+(50|25|12\.5)|0)%>$")
    history = tmp_path / "state/mlx-densesteer/chat-history"
    assert COINS in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600
    terminal.send("\x04")
    assert terminal.end() == 0
    assert terminal.raw.rstrip().endswith(b"\x1b[?25h") or b"\x1b[?25l" not in terminal.raw[-40:]


def test_several_lines_and_editing(chat):
    terminal = chat()
    first, second, third, fourth = (
        "Kim has 12 coins.",
        "Then Kim buys 5.",
        "Later Kim loses 3.",
        "How many?",
    )
    terminal.send(first + ALT_ENTER + second + "\\\r" + f"\x1b[200~{third}\n{fourth}\x1b[201~")
    terminal.wait(f"unsteered> {first}\n {{11}}{second}\n {{11}}{third}\n {{11}}How many\\?")
    assert "token" not in terminal.screen[-8]  # nothing was sent yet
    terminal.send("\x03")  # Ctrl-C clears the line
    terminal.wait(r"(?m)^unsteered>$\n(.*\n)*.*0/1024")
    terminal.send("/sy")
    terminal.wait(r"/system \[TEXT\|off\]")
    terminal.send("\t Solve\r")
    terminal.wait("system: Solve")
    terminal.send("\x1b[A")  # the history
    terminal.wait(r"unsteered> /system Solve", count=2)
    terminal.process.kill(signal.SIGTERM)  # leaves the terminal in order
    assert terminal.end() == 143


def test_ctrl_c_keeps_what_was_said_and_the_settings_stay_in_sight(chat):
    terminal = chat(*STEERED, "-s", "100%", "--no-brake", "-n", "900")
    ask(terminal, COINS, r"strength \+23\.8\)[^>]*Ctrl-C stops")
    columns = 160
    terminal.resize(columns, 24)
    terminal.wait(r"\+23\.8\) \| \d+/1024 tokens \| Ctrl-C stops")
    terminal.send("\x03")
    text = terminal.wait(r", interrupted")
    assert "Kim" in text.rsplit("now?", 1)[1]
    terminal.wait(
        r"(?s)interrupted.*\n\+100%>\n.*\d+/1024 tokens"
    )  # the prompt, and the line below
    assert all(len(line) <= columns for line in terminal.screen)
    tokens = int(terminal.text.rsplit("/1024 tokens", 1)[0].rsplit(None, 1)[-1])
    assert 34 < tokens < 900, "the turn stays"
    assert terminal.text.count("Ctrl-C stops") == 0, "the line below an answer is gone"
    ask(terminal, "/undo", "forgot this question and its answer")
    terminal.wait(r"(?s)\+100%> Kim has 12 coins\..*0/1024")  # and can be edited
    terminal.send("\x03\x04")
    assert terminal.end() == 0


def test_every_command(chat, tmp_path):
    terminal = chat(*STEERED, columns=100, lines=50, NO_COLOR="1")
    ask(terminal, COINS, r"density 31\.0")
    ask(
        terminal,
        "/compare",
        r"unsteered: 31 tokens, 2 steps(.|\n)*\+20%: 31 tokens, 1 step",
    )
    assert "│ Kim buys 5: 12+5=17. The number doubles" in terminal.text
    ask(terminal, "/sweep", r"\+40% +\+9\.51 +1 +31 +31\.0 +end  Kim")
    ask(
        terminal,
        "/sweep 0 10%",
        r"(?s)strength  steps.*?\n0% +0 +2.*?\n\+10% +\+2\.38 +2.*?\n\n.*>",
    )
    ask(terminal, "/stats", r"density +31\.0 +15\.5(.|\n)*ending +end +end")
    ask(terminal, "/strength -1.5", r"(?m)^-6\.31%>$")
    ask(terminal, "/layer 3-4", r"layer 3-4 \| dose -[0-9.]+% \(strength -1\.5\)")
    ask(terminal, "/positions generated", r"positions generated")
    ask(terminal, "/positions nowhere", r"expected one of all, generated, prompt")
    ask(terminal, "/vector none.npz", r"error: none\.npz: no such file")
    ask(terminal, "/retry", r"\d tokens/s", count=4)
    ask(terminal, "/system Be brief", "system: Be brief")
    ask(terminal, f"/save {tmp_path}/talk.json", "saved 1 turn")
    ask(terminal, "/vector off", r"(?m)^unsteered>$")
    ask(terminal, "/strength 1", "choose a vector first")
    ask(terminal, "/undo", "forgot this question")
    terminal.send("\x03")
    ask(terminal, "/retry", "conversation is empty")
    ask(terminal, f"/load {tmp_path}/talk.json", "loaded 1 turn; the last question: Kim has")
    terminal.wait(r"strength -1\.5\) \| positions generated")
    ask(terminal, "/drop", "0 turns left of 1")
    ask(terminal, "/stat", r"nothing was sent\. Did you mean /stats")
    (tmp_path / "mine.txt").write_text("mine")
    ask(terminal, f"/save {tmp_path}/mine.txt", "not a session file")
    assert (tmp_path / "mine.txt").read_text() == "mine"
    ask(terminal, "/help", r"sends a text that begins with a slash")
    terminal.resize(40, 20)
    ask(terminal, "/vector demo", r"vector demo, layer \d, dose \+20%")
    ask(terminal, "/layer 5", r"vector demo, layer 5, dose")
    ask(terminal, "/strength 20%", r"vector demo, layer 5, dose \+20%")
    text = ask(terminal, f"/compare {COINS}", r"(?s)dose \+20%.*\+20%: 31 tokens")
    assert (
        "unsteered\nKim buys 5: 12+5=17.\n\nThe number doubles: 17*2=34.\n34\n\n+20%\nKim" in text
    ), "on a narrow screen one after the other"
    terminal.wait(r"(?m)^0/1024 tokens$")  # it does not join the conversation
    terminal.send("/quit\r")
    assert terminal.end() == 0
    assert not re.search(rb"\x1b\[[0-9;]*3[0-7]m", terminal.raw), "no colours, on request"


def test_a_dumb_terminal_gets_plain_lines(tmp_path):
    command = [sys.executable, "-m", "mlx_densesteer", "chat", "-m", "demo", *STEERED]
    terminal = Terminal(command, {**os.environ, "XDG_STATE_HOME": str(tmp_path)}, term="dumb")
    try:
        terminal.wait(r"(?m)^\+20%>$")
        ask(terminal, "Kim has 12 coins.\\", r"(?m)^    \.$")
        ask(terminal, COINS.removeprefix("Kim has 12 coins. "), r"(?m)^\(\d+ tokens, 1 step")
        terminal.send("\x04")
        assert terminal.end() == 0
        assert b"\x1b" not in terminal.raw
    finally:
        terminal.process.close(force=True)
