"""The chat itself: read a line, answer it or carry out its command, again and again."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import ContextError, DenseSteerError
from .actions import Actions
from .commands import Call, parse
from .keyboard import Keyboard
from .rows import context_tokens
from .screen import Screen
from .status import Status, brake_lines, receipt

if TYPE_CHECKING:
    from ..generation.session import Reply, Session
    from ..model.model import ModelInfo


class Chat:
    """A conversation between a keyboard and a session, shown on a screen.

    Args:
        session: the conversation; ``/load`` replaces it.
        info: what the model is.
    """

    def __init__(self, session: "Session", info: "ModelInfo", keyboard: Keyboard, screen: Screen):
        self.session, self.info = session, info
        self.keyboard, self.screen = keyboard, screen
        self.failures = 0
        self._actions = Actions(self)

    def run(self) -> int:
        """Go on until the input ends or ``/quit``; return how many lines could not be done.

        Ctrl-C never ends it, unless the lines come from a pipe.
        """
        while True:
            try:
                text = self.keyboard.read(self.status)
                if text.strip() and not self._take(text):
                    return self.failures
            except EOFError:
                return self.failures
            except (DenseSteerError, click.ClickException, OSError) as error:
                self._tell(error)
            except KeyboardInterrupt as error:
                if self._ends(error):
                    raise

    def status(self) -> Status:
        """Return the settings in force."""
        session = self.session
        return Status.of(
            Path(self.info.name).name, session.steering, context_tokens(session), session.context
        )

    def answer(self, reply: "Reply") -> None:
        """Show an answer as it comes; Ctrl-C ends it, and what was said stays.

        If nothing was said yet, the question goes back to the keyboard.
        """
        before, said, interrupt = self.status(), 0, None

        def now() -> Status:
            result = reply.result
            tokens = result.prompt_tokens + result.tokens
            strength = result.steering.strength if result.steering else 0.0
            return replace(before, tokens=tokens, strength=strength)

        view = self.screen.answer(now)
        try:
            for piece in reply:
                said += len(piece)
                view.feed(piece)
        except KeyboardInterrupt as error:
            interrupt = error
        finally:
            with _no_interrupts():
                reply.close()
                view.feed(reply.result.text[said:])
                view.finish()
        self._tell_result(reply)
        if interrupt is not None:
            raise interrupt

    def _take(self, text: str) -> bool:
        """Do what one line asks for; ``False`` to leave."""
        asked = parse(text)
        if isinstance(asked, Call):
            return self._actions.do(asked)
        self.answer(self.session.send(asked))
        return True

    def _tell_result(self, reply: "Reply") -> None:
        result = reply.result
        if result.finish_reason == "interrupted" and not result.token_ids:
            self.screen.note("stopped before anything was said: the question does not count")
            self.keyboard.give_back(reply.user)
            return
        self.screen.receipt(receipt(result))
        for line in brake_lines(result):
            self.screen.warn(line)

    def _tell(self, error: Exception) -> None:
        """Show an error and go on; a broken pipe of our own output is the end."""
        if isinstance(error, BrokenPipeError):
            raise error
        self.failures += 1
        if isinstance(error, click.ClickException):
            message = error.format_message()
        elif isinstance(error, OSError):
            message = f"{error.filename or 'the system'}: {error.strerror or error}."
        else:
            message = str(error)
        if isinstance(error, ContextError):
            message += " Here that is /drop, or /drop all."
        self.screen.warn(f"error: {message}")

    def _ends(self, error: KeyboardInterrupt) -> bool:
        """Tell whether to leave: at SIGTERM and SIGHUP, and when the lines come from a pipe."""
        return type(error) is not KeyboardInterrupt or not self.keyboard.interactive


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Let nobody interrupt what must not be left half-done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
