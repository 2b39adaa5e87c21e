"""``densesteer chat``."""

import os
import sys
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from ..errors import install_command
from ..text import count, note
from .options import (
    answer_options,
    load_draft,
    model_option,
    read_think_budget,
    steering_options,
    think_options,
)
from .steering import is_strict, need_no_vector, read_steering, steering_for, tell_fit

if TYPE_CHECKING:
    from ..chat.plain import Keyboard, Screen
    from ..generation.session import Session
    from ..steering.places import Positions
    from ..steering.request import Amount


@click.command()
@model_option()
@steering_options
@think_options
@answer_options
@click.option(
    "--load",
    "saved",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Continue a conversation that /save wrote. Options that you give replace its settings.",
)
@click.option("--plain", is_flag=True, help="Text as it comes: no Markdown, no colours.")
def chat(
    model: str,
    vector: str | None,
    strength: "Amount | None",
    layers: tuple[str, ...],
    positions: "Positions | None",
    think_budget: int | None,
    think_strength: "Amount | None",
    think_budget_hard: bool,
    max_tokens: int,
    temp: float,
    top_p: float,
    seed: int | None,
    system: str | None,
    draft_model: str | None,
    draft_tokens: int,
    no_brake: bool,
    saved: str | None,
    plain: bool,
) -> None:
    """Talk with a model, steered if a vector is given, and change the strength while you talk.

    In a terminal: several lines (Esc, then Enter), history, Markdown; /help lists the commands, among
    them /strength, /compare and /sweep. From a pipe, every line is a question or a command, and
    the answers go to standard output.
    """
    budget, limit = read_think_budget(think_budget, think_strength, think_budget_hard)
    resumed = saved is not None and vector is None  # the conversation has a vector, or none
    setting = strength, layers, positions, budget, think_strength
    request = None if resumed else read_steering(vector, *setting)
    keyboard, screen = _terminal(plain)

    from ..chat.loop import Chat
    from ..generation.brake import Brake
    from ..generation.sampling import Sampling
    from ..generation.session import Session
    from ..model.model import load

    loaded = load(model)
    steering = steering_for(request, loaded)
    brake, draft = None if no_brake else Brake(), load_draft(draft_model, draft_tokens)
    if saved is None:
        session = Session(
            loaded,
            steering,
            system=system,
            max_tokens=max_tokens,
            sampling=Sampling(temp, top_p, seed),
            brake=brake,
            draft=draft,
            think_limit=limit,
        )
    else:
        hard = {} if limit is None else {"think_limit": limit}
        session = Session.load(saved, loaded, brake=brake, draft=draft, **hard)
        if steering is not None:
            session.steer(steering)
        else:
            _change_steering(session, *setting)
        if _given("system"):
            session.system = system
        if _given("max_tokens"):
            session.max_tokens = max_tokens
        if _given("temp", "top_p", "seed"):
            session.sampling = Sampling(temp, top_p, seed)
        note(f"loaded {count(len(session.turns), 'turn')} from {saved}")
    talk = Chat(session, keyboard, screen, strict=is_strict())
    if resumed:
        talk.tell_steering()
    _greet(model, keyboard.interactive)
    failures = talk.run()
    if failures and not keyboard.interactive:
        sys.exit(1)


def _change_steering(
    session: "Session",
    strength: "Amount | None",
    layers: tuple[str, ...],
    positions: "Positions | None",
    budget: int | None,
    late: "Amount | None",
) -> None:
    """Replace what the options name of a loaded conversation's steering; warn of another model's vector."""
    from ..steering.request import parse_layers

    if session.steering is None:
        need_no_vector(strength, layers, positions, budget)
        return
    vector = session.steering.vector
    tell_fit(vector, session.model)
    if layers:
        session.set_layers(parse_layers(layers, vector.layers))
    if positions is not None:
        session.set_positions(positions)
    if strength is not None:  # a dose or a KL is that at these layers and positions
        session.set_strength(strength)
    if budget is not None:
        session.set_budget(budget, late)


def _given(*options: str) -> bool:
    """Tell whether the user gave any of these options."""
    source = click.get_current_context().get_parameter_source
    return any(source(option) is not ParameterSource.DEFAULT for option in options)


def _terminal(plain: bool) -> "tuple[Keyboard, Screen]":
    """Return the keyboard and the screen: those of a terminal need a terminal and the extra."""
    from importlib.util import find_spec

    from ..chat.plain import Keyboard, Screen

    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM") == "dumb":
        return Keyboard(), Screen()
    if any(find_spec(name) is None for name in ("prompt_toolkit", "rich")):
        note(f"plain lines; for editing, history and Markdown: {install_command('chat')}")
        return Keyboard(), Screen()
    from ..chat.terminal_keyboard import TerminalKeyboard
    from ..chat.terminal_screen import TerminalScreen

    return TerminalKeyboard(), Screen() if plain else TerminalScreen()


def _greet(model: str, interactive: bool) -> None:
    """Tell a user at a terminal how to begin, and what the demo model can be asked."""
    from .. import demo
    from ..demo.problems import held_out

    if not interactive:
        return
    note("/help lists the commands, Ctrl-D leaves")
    if model == demo.NAME:
        note(
            "the demo model is a toy that knows one kind of story. Ask it this:\n"
            f"{held_out(1)[0].question}"
        )
