"""What the commands do."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli.steering import read_steering, read_vector, tell_dose, tell_fit
from ..errors import InputError, SessionError
from ..steering.request import default_layer
from ..text import count, one_line, signed
from .commands import Call, help_lines
from .dial import Doses, read_strength, sweep_strengths
from .rows import Asked, Rows, last_question
from .status import receipt
from .tables import stats_lines, sweep_lines

if TYPE_CHECKING:
    from ..generation.answer import Generation
    from ..generation.conversation import Turn
    from ..generation.session import Session
    from ..steering.steering import Steering
    from .loop import Chat

MOST_ROWS = 16  # of one sweep


class Actions:
    """Carry out the commands of ``commands.COMMANDS`` on a chat."""

    def __init__(self, chat: "Chat"):
        self._chat, self._screen = chat, chat.screen
        self._doses = Doses(chat.session.model, chat.session.tokenizer)
        self._unsteered: tuple[Turn, Generation] | None = None  # of the last ``/stats``

    def do(self, call: Call) -> bool:
        """Carry out a command; ``False`` to leave the chat.

        Raises:
            DenseSteerError, click.ClickException, OSError: it cannot be done; nothing has changed.
        """
        if call.command.name == "quit":
            return False
        getattr(self, f"_{call.command.name}")(call.argument)
        return True

    @property
    def _session(self) -> "Session":
        return self._chat.session

    def _steering(self) -> "Steering":
        if self._session.steering is None:
            raise SessionError("nothing is steered: choose a vector first, /vector FILE.")
        return self._session.steering

    # The dial

    def _strength(self, argument: str) -> None:
        steering = self._steering()
        if argument:
            self._session.set_strength(
                read_strength(argument, lambda dose: self._doses.strength(steering, dose))
            )
        self._tell_steering()

    def _layer(self, argument: str) -> None:
        from ..steering.request import parse_layers

        steering = self._steering()
        if argument:
            self._session.set_layers(
                parse_layers(argument.replace(",", " ").split(), steering.vector.layers)
            )
        self._tell_steering()

    def _positions(self, argument: str) -> None:
        self._steering()
        if argument:
            self._session.set_positions(argument)  # type: ignore[arg-type]
        self._tell_steering()

    def _vector(self, argument: str) -> None:
        if not argument:
            self._tell_steering()
            return
        session, now = self._session, self._session.steering
        if argument == "off":
            session.steer(None)
            self._screen.note("nothing is steered")
            return
        name = str(Path(argument).expanduser())
        if now is None:
            request = read_steering(name, None, (), None)
            tell_fit(request.vector, self._chat.info)
            session.steer(request.for_model(session.model, session.tokenizer))
        else:
            vector = read_vector(name)
            tell_fit(vector, self._chat.info)
            keeps = set(now.layers) <= set(vector.layers)
            default = default_layer(vector.layers, vector.meta.layer_count)
            session.set_vector(vector, now.layers if keeps else (default,))
        self._tell_steering()

    def _tell_steering(self) -> None:
        steering = self._session.steering
        if steering is None:
            self._screen.note("nothing is steered")
        else:
            tell_dose(steering, self._doses.of(steering))

    # The conversation

    def _retry(self, argument: str) -> None:
        self._chat.answer(self._session.regenerate())

    def _undo(self, argument: str) -> None:
        turn = self._session.undo()
        self._screen.note(f"taken back: {one_line(turn.user, 60)}")
        self._chat.keyboard.give_back(turn.user)

    def _drop(self, argument: str) -> None:
        turns = len(self._session.turns)
        if argument not in ("", "all") and not (argument.isdecimal() and len(argument) < 10):
            raise InputError(f"/drop {argument}: expected a number of turns, or all.")
        self._session.drop(turns if argument == "all" else int(argument or 1))
        self._screen.note(f"{count(len(self._session.turns), 'turn')} left of {turns}")

    def _system(self, argument: str) -> None:
        if argument:
            self._session.system = None if argument == "off" else argument
        system = self._session.system
        self._screen.note("no system message of yours" if system is None else f"system: {system}")

    def _save(self, argument: str) -> None:
        path = self._session.save(_path(argument, "/save"))
        self._screen.note(f"saved {count(len(self._session.turns), 'turn')} in {path}")

    def _load(self, argument: str) -> None:
        from ..generation.session import Session

        now, path = self._session, _path(argument, "/load")
        if not path.is_file():
            raise InputError(f"{path}: no such file. Expected one that /save wrote.")
        session = Session.load(path, now.model, now.tokenizer, draft=now.draft, brake=now.brake)
        self._chat.session = session
        last = (
            f"; the last question: {one_line(session.turns[-1].user, 60)}" if session.turns else ""
        )
        self._screen.note(f"loaded {count(len(session.turns), 'turn')}{last}")
        self._tell_steering()

    # The same question several times

    def _compare(self, argument: str) -> None:
        steering = self._steering()
        session = self._session
        asked = Asked(argument, session.turns) if argument else last_question(session)
        if not argument:
            self._screen.note(f"the last question again: {one_line(asked.text, 60)}")
        rows, now = Rows(session, asked, [None, steering]), self._chat.status()
        titles, interrupt = ["unsteered", f"strength {signed(steering.strength)}"], None
        try:
            self._screen.compare(titles, rows, lambda: now)
        except KeyboardInterrupt as error:
            interrupt = error
        for result in rows.stop():
            self._screen.receipt(receipt(result, name_strength=True))
        if interrupt is not None:
            raise interrupt

    def _sweep(self, argument: str) -> None:
        steering, asked = self._steering(), last_question(self._session)
        strengths = sweep_strengths(
            argument, steering.strength, lambda dose: self._doses.strength(steering, dose)
        )
        if len(strengths) > MOST_ROWS:
            raise InputError(f"{len(strengths)} strengths: expected at most {MOST_ROWS} at once.")
        self._screen.note(f"the last question again: {one_line(asked.text, 60)}")
        rows = Rows(
            self._session, asked, [replace(steering, strength=strength) for strength in strengths]
        )
        now = self._chat.status()
        self._screen.table(rows, lambda: sweep_lines(rows.states, self._screen.width), lambda: now)

    def _stats(self, argument: str) -> None:
        session, asked = self._session, last_question(self._session)
        turn, now = session.turns[-1], self._chat.status()
        reply = turn.reply
        if reply.steering is None or not reply.steering.strength:
            self._screen.show(stats_lines(None, reply, self._dose))
        elif self._unsteered is not None and self._unsteered[0] is turn:
            self._screen.show(stats_lines(reply, self._unsteered[1], self._dose))
        else:
            rows = Rows(session, asked, [None])
            (unsteered,) = rows.states
            self._screen.table(
                rows, lambda: stats_lines(reply, unsteered.result, self._dose), lambda: now
            )
            self._unsteered = turn, unsteered.result

    def _dose(self, steering: "Steering") -> float:
        return sum(self._doses.of(steering).values())

    def _help(self, argument: str) -> None:
        self._screen.show(help_lines(self._screen.width))


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise InputError(f"{command}: expected the name of a file.")
    return Path(argument).expanduser()
