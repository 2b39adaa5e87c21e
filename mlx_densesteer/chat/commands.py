"""The commands of the chat: one table for parsing, ``/help``, completion and the documentation."""

import difflib
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class Command:
    """A command: ``/name arguments``. ``completes`` is the kind of argument that Tab completes."""

    name: str
    arguments: str
    help: str
    completes: str = ""

    @property
    def usage(self) -> str:
        return f"/{self.name} {self.arguments}".strip()


@dataclass(frozen=True)
class Call:
    """A typed command with its argument."""

    command: Command
    argument: str


COMMANDS = (
    Command(
        "strength",
        "STRENGTH",
        "how strongly to steer: 20% of the residual stream, lambda as a number (1.5, -2, 0), or a KL (0.1nats)",
    ),
    Command("layer", "LAYERS", "steer these layers: 14, 10-14, 10,12 or all"),
    Command(
        "vector",
        "FILE",
        "steer with this vector (.npz or demo), at its own layer, strength and positions; or off",
        "vector",
    ),
    Command("positions", "WHERE", "steer all, generated, prompt, steps, first:48 ...", "positions"),
    Command(
        "budget",
        "N [STRENGTH]|off",
        "of a model that thinks: from N tokens of thought on steer at that strength, or a dose of 20% more",
    ),
    Command(
        "compare",
        "[TEXT]",
        "the same question unsteered and steered, beside each other; without TEXT the last question. "
        "It does not join the conversation",
    ),
    Command(
        "sweep",
        "[STRENGTHS]",
        "the last question at five strengths, one line each; or at those named: 0 10% 20% 1.5 0.1nats",
    ),
    Command("stats", "", "the receipt of the last answer, beside that of the unsteered model"),
    Command(
        "thought",
        "",
        "show what a reasoning model thought before its last answer; Tab on an empty line",
    ),
    Command("retry", "", "answer the last question again, under the settings in force"),
    Command(
        "undo", "", "forget the last question and its answer, and offer the question for editing"
    ),
    Command("drop", "[N|all]", "forget the oldest question and answer, or the N oldest, or all"),
    Command("save", "FILE", "save the conversation and its settings", "file"),
    Command("load", "FILE", "continue a saved conversation", "file"),
    Command("system", "[TEXT|off]", "set the system message; without TEXT show it"),
    Command("help", "", "this list"),
    Command("quit", "", "leave; so does Ctrl-D"),
)
BY_NAME = {command.name: command for command in COMMANDS}

KEYS = (
    ("Enter", "sends"),
    (
        "Esc, then Enter",
        "begins a new line; so do \\ and Enter, and Alt-Enter (in Terminal.app only with Use Option as Meta Key)",
    ),
    ("Ctrl-C", "stops an answer and keeps what was said; at the prompt it clears the line"),
    ("Up, Down, Ctrl-R", "earlier questions, and a search in them"),
    ("Tab", "completes a command or a file name; on an empty line shows the last thought"),
    ("//text", "sends a text that begins with a slash"),
)


def parse(text: str) -> Call | str:
    """Return the command in ``text``, or the text to send.

    Raises:
        InputError: the text begins with a slash and is no command. The message names similar ones.
    """
    text = text.strip()
    if not text.startswith("/"):
        return text
    if text.startswith("//"):
        return text[1:]
    name, argument = re.fullmatch(r"/(\S*)(.*)", text, re.DOTALL).groups()
    command = BY_NAME.get(name.lower())
    if command is None:
        near = " or ".join(f"/{known}" for known in nearest(name.lower()))
        raise InputError(
            f"/{name}: no such command, so nothing was sent. "
            f"{f'Did you mean {near}? ' if near else ''}/help lists the commands. To send a text that "
            "begins with a slash, begin it with two."
        )
    return Call(command, argument.strip())


def nearest(name: str) -> list[str]:
    """Return up to three commands that are similar to a mistyped name, the most similar first."""
    begun = [known for known in BY_NAME if name and known.startswith(name)]
    alike = difflib.get_close_matches(name, BY_NAME, n=3, cutoff=0.5)
    return list(dict.fromkeys([*begun, *alike]))[:3]


def help_lines(width: int) -> list[str]:
    """Return the list of commands and keys for a screen of ``width`` columns."""
    pairs = [(command.usage, command.help) for command in COMMANDS]
    lines = []
    for group in (pairs, KEYS):
        lines += [*_two_columns(group, width), ""]
    return lines[:-1]


def _two_columns(pairs: Sequence[tuple[str, str]], width: int) -> list[str]:
    left = max(len(name) for name, _ in pairs) + 2
    if width < left + 24:  # too narrow: the explanation goes below the name
        left = 4
    lines = []
    for name, text in pairs:
        wrapped = textwrap.wrap(text, max(width - left - 1, 16))
        if len(name) + 2 > left:
            lines += [name, *(" " * left + line for line in wrapped)]
        else:
            lines.append(name.ljust(left) + wrapped[0])
            lines += [" " * left + line for line in wrapped[1:]]
    return lines
