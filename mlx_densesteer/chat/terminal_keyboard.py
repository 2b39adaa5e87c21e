"""Read questions from a terminal with prompt_toolkit: several lines, history, completion."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout.processors import Processor, Transformation, TransformationInput
from prompt_toolkit.styles import Style

from ..steering.places import POSITIONS
from ..text import printable
from .commands import BY_NAME, COMMANDS
from .plain import Keyboard, Now

MENU = 6  # rows kept free for the list of completions


class TerminalKeyboard(Keyboard):
    """Read questions with editing, a history in a file, and a toolbar with the settings."""

    interactive = True
    shows_thought = "Tab or /thought"

    def __init__(self) -> None:
        self._given_back = ""
        file = history_file()
        self._prompt: PromptSession[str] = PromptSession(
            multiline=True,
            key_bindings=_bindings(),
            history=_History(str(file)) if file else InMemoryHistory(),
            input_processors=[_Printable()],
            completer=_Commands(),
            complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith("/")),
            reserve_space_for_menu=MENU,
            enable_suspend=True,
            style=Style.from_dict({"prompt": "bold"}),
        )

    def read(self, status: Now) -> str:
        """Return the next question.

        Raises:
            EOFError: Ctrl-D on an empty line.
            KeyboardInterrupt: Ctrl-C; the line is gone.
        """
        now = status()
        text, self._given_back = self._given_back, ""
        prompt = printable(now.prompt)
        return self._prompt.prompt(
            [("", "\n"), ("class:prompt", prompt)],
            default=text,
            bottom_toolbar=lambda: "\n".join(now.lines(get_app().output.get_size().columns)),
            prompt_continuation=lambda width, number, wrapped: " " * width,
        )

    def give_back(self, text: str) -> None:
        self._given_back = text


class _Commands(Completer):
    """Complete the name of a command, and its argument."""

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or text.startswith("//") or "\n" in text:
            return
        name, space, argument = text[1:].partition(" ")
        if not space:
            for command in COMMANDS:
                if command.name.startswith(name.lower()):
                    yield Completion(
                        command.name,
                        start_position=-len(name),
                        display=command.usage,
                        display_meta=command.help.partition(":")[0][:44],
                    )
            return
        kind = BY_NAME[name].completes if name in BY_NAME else ""
        words = {"positions": POSITIONS, "vector": ("demo", "off")}
        for word in words.get(kind, ()):
            if word.startswith(argument):
                yield Completion(word, start_position=-len(argument))
        if kind in ("file", "vector"):
            inner = Document(argument, len(argument))
            for path in PathCompleter(expanduser=True).get_completions(inner, event):
                shown = printable(path.display_text)
                yield Completion(path.text, path.start_position, display=shown)


class _Printable(Processor):
    """Show control characters in a line as visible signs; a file's name or a saved question has them."""

    def apply_transformation(self, line: TransformationInput) -> Transformation:
        parts = [(style, text.replace("\r", "\u240d")) for style, text, *_ in line.fragments]
        return Transformation([(style, printable(text)) for style, text in parts])


class _History(FileHistory):
    """The history in a file; the chat goes on if the disk is full."""

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string.encode("utf-8", "replace").decode("utf-8"))
        except OSError:
            return


def history_file() -> Path | None:
    """Return the file of earlier questions, private to the user; ``None`` if it cannot be made."""
    try:
        path = _state_folder() / "chat-history"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return None
    return path


def _state_folder() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library/Application Support/mlx-densesteer"
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local/state") / "mlx-densesteer"


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\" and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def begin_a_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @bindings.add("tab", filter=Condition(lambda: not get_app().current_buffer.text))
    def show_the_thought(event: KeyPressEvent) -> None:
        event.current_buffer.text = "/thought"
        event.current_buffer.validate_and_handle()

    return bindings
