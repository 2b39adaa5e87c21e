"""The chat's loop: read a line, then answer it or carry out its command."""

import contextlib
import math
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..errors import ContextError, DenseSteerError, InputError, SessionError, SteeringError
from ..generation.answer import Generation, brake_lines, receipt
from ..generation.conversation import Turn
from ..generation.session import Reply, Session
from ..steering.request import parse_layers, request
from ..steering.steering import LARGE_DOSE, LARGE_DOSE_WARNING, Steering
from ..steering.vector import SteeringVector
from ..text import count, one_line, signed_dose
from .commands import Call, parse
from .plain import Keyboard, Screen
from .rows import Rows, last_question
from .status import Status, stats_lines, strength_of, sweep_lines

SWEEP_MOST = 16  # strengths at once
SWEEP_FACTORS = (0.0, 0.5, 1.0, 1.5, 2.0)  # of the strength in force
SWEEP_DOSES = ("-10%", "0", "10%", "20%", "40%")  # if the strength in force is 0


class Chat:
    """A conversation between a keyboard and a session, shown on a screen.

    ``do_NAME`` carries out the command ``/NAME`` of ``commands.COMMANDS``.

    Args:
        session: the conversation; ``/load`` replaces it.
        strict: refuse vectors that were made for another model.
    """

    def __init__(
        self, session: Session, keyboard: Keyboard, screen: Screen, *, strict: bool = False
    ):
        self.session, self.keyboard, self.screen = session, keyboard, screen
        self._strict = strict
        self.failures = 0
        self._unsteered: tuple[Turn, Generation] | None = None  # of the last ``/stats``

    def run(self) -> int:
        """Run until the input ends or ``/quit``; return how many lines failed.

        Ctrl-C ends it only if the lines come from a pipe.
        """
        while True:
            try:
                text = self.keyboard.read(self.status)
                if text.strip() and not self._take(text):
                    return self.failures
            except EOFError:
                return self.failures
            except (DenseSteerError, OSError) as error:
                self._tell_error(error)
            except KeyboardInterrupt as error:
                if self._ends(error):
                    raise

    def status(self) -> Status:
        """Return the settings in force."""
        session = self.session
        return Status(
            model=Path(session.model.name).name,
            steering=session.steering,
            dose=self._dose(session.steering),
            tokens=session.tokens,
            context=session.context,
        )

    def answer(self, reply: Reply) -> None:
        """Show an answer as it comes. Ctrl-C ends it and keeps the text so far.

        If there is no text yet, the question goes back to the keyboard for editing.
        """
        before, said, interrupt = self.status(), 0, None

        def now() -> Status:
            result = reply.result
            return replace(
                before,
                steering=result.steering,
                dose=self._dose(result.steering),
                tokens=result.prompt_tokens + result.tokens,
            )

        view = self.screen.answer(now)
        try:
            for _ in reply:
                thought, answer = reply.shown
                if answer:
                    view.feed(answer[said:])
                    said = len(answer)
                elif thought is not None:
                    view.think(thought, reply.result.thought_tokens)
        except KeyboardInterrupt as error:
            interrupt = error
        finally:
            with _no_interrupts():
                reply.close()
                view.feed(reply.result.answer[said:])
                view.finish()
        self._tell_result(reply)
        if interrupt is not None:
            raise interrupt

    def tell_steering(self) -> None:
        """Show what is steered now, and warn of an overdose."""
        now = self.status()
        self.screen.note(", ".join(now.settings))
        if self.session.model.largest_dose(self.session.steering) >= LARGE_DOSE:
            self.screen.warn(LARGE_DOSE_WARNING)

    # What to steer with

    def do_strength(self, argument: str) -> None:
        self._steering()
        if argument:
            self.session.set_strength(argument)
        self.tell_steering()

    def do_layer(self, argument: str) -> None:
        steering = self._steering()
        if argument:
            layers = parse_layers(argument.replace(",", " ").split(), steering.vector.layers)
            self.session.set_layers(layers)
        self.tell_steering()

    def do_positions(self, argument: str) -> None:
        self._steering()
        if argument:
            self.session.set_positions(argument)  # type: ignore[arg-type]
        self.tell_steering()

    def do_budget(self, argument: str) -> None:
        self._steering()
        tokens, _, late = argument.partition(" ")
        if argument and argument != "off" and not (tokens.isdecimal() and len(tokens) < 10):
            raise InputError(
                f"/budget {argument}: expected a number of tokens, perhaps a strength, or off."
            )
        if argument:
            number = None if argument == "off" else int(tokens)
            self.session.set_budget(number, late.strip() or None)
        self.tell_steering()

    def do_vector(self, argument: str) -> None:
        if argument == "off":
            self.session.set_vector(None)
        elif argument:
            vector = SteeringVector.load(str(Path(argument).expanduser()))
            warning = self.session.model.other_weights(vector, strict=self._strict)
            self.session.set_vector(vector)
            if warning:
                self.screen.warn(warning)
        self.tell_steering()

    # The conversation

    def do_retry(self, argument: str) -> None:
        self.answer(self.session.regenerate())

    def do_undo(self, argument: str) -> None:
        turn = self.session.undo()
        left = count(len(self.session.turns), "turn")
        self.screen.note(
            f"forgot this question and its answer, {left} left: {one_line(turn.user, 60)}"
        )
        self.keyboard.give_back(turn.user)

    def do_drop(self, argument: str) -> None:
        turns = len(self.session.turns)
        if argument not in ("", "all") and not (argument.isdecimal() and len(argument) < 10):
            raise InputError(f"/drop {argument}: expected a number of turns, or all.")
        self.session.drop(turns if argument == "all" else int(argument or 1))
        self.screen.note(f"{count(len(self.session.turns), 'turn')} left of {turns}")

    def do_system(self, argument: str) -> None:
        if argument:
            self.session.system = None if argument == "off" else argument
        system = self.session.system
        self.screen.note("no system message" if system is None else f"system: {system}")

    def do_save(self, argument: str) -> None:
        path = self.session.save(_path(argument, "/save"))
        self.screen.note(f"saved {count(len(self.session.turns), 'turn')} in {path}")

    def do_load(self, argument: str) -> None:
        now, path = self.session, _path(argument, "/load")
        if not path.is_file():
            raise InputError(f"{path}: no such file. Expected one that /save wrote.")
        session = Session.load(path, now.model, draft=now.draft, brake=now.brake)
        if session.steering and (
            warning := now.model.other_weights(session.steering.vector, strict=self._strict)
        ):
            self.screen.warn(warning)
        self.session, last = session, ""
        if session.turns:
            last = f"; the last question: {one_line(session.turns[-1].user, 60)}"
        self.screen.note(f"loaded {count(len(session.turns), 'turn')}{last}")
        self.tell_steering()

    # The same question several times

    def do_compare(self, argument: str) -> None:
        steering, now = self._steering(), self.status()
        if not argument:
            self._tell_question()
        rows = Rows(self.session, [None, steering], argument or None)
        titles, interrupt = ["unsteered", signed_dose(now.dose)], None
        try:
            self.screen.compare(titles, rows, lambda: now)
        except KeyboardInterrupt as error:
            interrupt = error
        for title, result in zip(titles, rows.stop(), strict=True):
            self.screen.receipt(f"{title}: {receipt(result, self.session.context)}")
        if interrupt is not None:
            raise interrupt

    def do_sweep(self, argument: str) -> None:
        now, steerings = self.status(), self._sweep_steerings(argument)
        doses = [self._dose(one) for one in steerings]
        self._tell_question()
        rows = Rows(self.session, steerings)
        self.screen.table(
            rows, lambda: sweep_lines(rows.rows, doses, self.screen.width), lambda: now
        )

    def do_stats(self, argument: str) -> None:
        now = self.status()
        last_question(self.session)
        turn = self.session.turns[-1]
        if turn.reply.steering is None or turn.reply.steering.is_zero:
            self.screen.show(stats_lines([("unsteered", turn.reply)], self._dose))
            return

        def lines(unsteered: "Generation | None") -> list[str]:
            return stats_lines([("steered", turn.reply), ("unsteered", unsteered)], self._dose)

        if self._unsteered is not None and self._unsteered[0] is turn:
            self.screen.show(lines(self._unsteered[1]))
            return
        rows = Rows(self.session, [None])
        self.screen.table(rows, lambda: lines(rows.rows[0].result), lambda: now)
        self._unsteered = turn, rows.rows[0].result

    def do_thought(self, argument: str) -> None:
        last_question(self.session)
        thought = self.session.turns[-1].reply.thought
        if not thought:
            raise SessionError("the last answer has no thought.")
        self.screen.show(thought.split("\n"))

    def do_help(self, argument: str) -> None:
        from .commands import help_lines

        self.screen.show(help_lines(self.screen.width))

    def _take(self, text: str) -> bool:
        """Answer a line or carry out its command; return ``False`` for ``/quit``."""
        asked = parse(text)
        if not isinstance(asked, Call):
            self.answer(self.session.send(asked))
        elif asked.command.name == "quit":
            return False
        else:
            self._carry_out(asked)
        return True

    def _carry_out(self, asked: Call) -> None:
        name = asked.command.name
        try:
            getattr(self, f"do_{name}")(asked.argument)
        except (InputError, SteeringError) as error:
            if name not in ("strength", "layer") or not str(error).startswith(f"{name} "):
                raise
            raise type(error)(f"/{error}") from error  # as it was typed: /strength

    def _steering(self) -> "Steering":
        if self.session.steering is None:
            raise SessionError("nothing is steered: choose a vector first, /vector FILE.")
        return self.session.steering

    def _sweep_steerings(self, argument: str) -> "list[Steering]":
        """Return the steerings to sweep, each strength once, the lowest first."""
        now = self._steering()
        words = argument.replace(",", " ").split() or SWEEP_DOSES
        if not argument and now.strength:
            words = [now.strength * factor for factor in SWEEP_FACTORS]
        if len(words) > SWEEP_MOST:
            raise InputError(f"{len(words)} strengths: expected at most {SWEEP_MOST} at once.")
        made = [
            replace(
                request(now.vector, word, now.layers, now.positions).steering(self.session.model),
                budget=now.budget,
            )
            for word in words
        ]
        return sorted({one.strength: one for one in made}.values(), key=lambda one: one.strength)

    def _dose(self, steering: Steering | None) -> float:
        """Return the dose of a steering, negative where the strength is."""
        return math.copysign(self.session.model.dose(steering), strength_of(steering))

    def _tell_question(self) -> None:
        self.screen.note(f"the last question again: {one_line(last_question(self.session), 60)}")

    def _tell_result(self, reply: Reply) -> None:
        result = reply.result
        if result.finish_reason == "interrupted" and result.is_empty:
            when = "its thought ended" if result.token_ids else "the first token"
            self.screen.note(f"stopped before {when}: the question does not count")
            self.keyboard.give_back(reply.user)
            return
        opens = f"; {self.keyboard.shows_thought} shows it" if result.thought else ""
        self.screen.receipt(receipt(result, self.session.context) + opens)
        for line in brake_lines(result):
            self.screen.warn(line)

    def _tell_error(self, error: Exception) -> None:
        """Show an error; raise it again if standard output is closed."""
        if isinstance(error, BrokenPipeError):
            raise error
        self.failures += 1
        message = str(error)
        if isinstance(error, OSError):
            message = f"{error.filename or 'the system'}: {error.strerror or error}."
        if isinstance(error, ContextError):
            message = f"{message.partition('. ')[0]}. Shorten it, or forget old turns: /drop or /drop all."
        self.screen.warn(f"error: {message}")

    def _ends(self, error: KeyboardInterrupt) -> bool:
        """Whether to leave: at SIGTERM and SIGHUP, and at Ctrl-C if the lines come from a pipe."""
        return type(error) is not KeyboardInterrupt or not self.keyboard.interactive


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise InputError(f"{command}: expected the name of a file.")
    return Path(argument).expanduser()


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C while an answer joins the conversation, which must not happen by half."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
