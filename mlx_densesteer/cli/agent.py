"""``densesteer serve --install-agent`` and ``--uninstall-agent``."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from .. import demo
from ..text import note

if TYPE_CHECKING:
    from ..steering.vector import SteeringVector

# Options whose values are paths. They are made absolute: launchd starts the agent in another folder.
PATHS = {"vectors", "folder", "models", "api_key_file"}


def install(
    model: str | None,
    port: int,
    grace: int,
    vectors: "Sequence[SteeringVector]",
    *,
    key_in_environment: bool,
) -> None:
    """Install an agent with this command's options; print it on systems other than macOS.

    Refuse an agent whose server could not start: launchd would start it again and again.
    """
    from ..model.config import read_config
    from ..model.model import find
    from .launch_agent import agent, install, log, path, protected

    if key_in_environment:
        raise click.UsageError(
            "an agent cannot keep the API key of DENSESTEER_API_KEY secret: put the key into a file that "
            "only you can read, and name that with --api-key-file."
        )
    if port == 0:
        raise click.UsageError("--port 0: an agent needs a port that clients know.")
    config = read_config(find(model)) if model is not None else {}
    for vector in vectors:
        vector.check_fits(
            hidden_size=config["hidden_size"], layer_count=config["num_hidden_layers"], model=model
        )
    home = Path.home()
    made = agent(_arguments(click.get_current_context()), home=home, grace=grace)
    for text in protected(made, home=home):
        note(
            f"warning: macOS may not let an agent read {text}. Move it to a folder such as ~/Models, or allow "
            "Python in System Settings, Privacy & Security, Full Disk Access."
        )
    if sys.platform != "darwin":
        click.echo(made.decode(), nl=False)
        note(
            f"only macOS has launchd agents; there this would be {path(home)}, its log {log(home)}"
        )
        return
    note(f"installed and started: {install(made, home=home)}")
    note(f"its log: {log(home)}; remove it with: densesteer serve --uninstall-agent")


def uninstall() -> None:
    """Stop and remove the agent."""
    from .launch_agent import uninstall

    if sys.platform != "darwin":
        raise click.ClickException("only macOS has launchd agents; there is none to remove here.")
    note("removed" if uninstall(home=Path.home()) else "there was no agent")


def _arguments(ctx: click.Context) -> list[str]:
    """Return the options that were given, with absolute paths."""
    found: list[str] = []
    for option in ctx.command.params:
        name = option.name or ""
        given = ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
        if not given or name in ("install_agent", "uninstall_agent"):
            continue
        value = ctx.params.get(name, True)  # --strict is a flag, and no parameter
        long = next(text for text in option.opts if text.startswith("--"))
        if value is True:
            found.append(long)
            continue
        for one in value if isinstance(value, tuple) else (value,):
            found += [long, _text(name, one)]
    return found


def _text(name: str, value: object) -> str:
    """Return an option's value as text for a command line, with absolute paths."""
    from ..server.vectors import exact
    from ..steering.request import Amount

    if isinstance(value, Amount):
        return exact(value)
    text = str(value)
    local = name in PATHS or (name == "model" and Path(text).expanduser().is_dir())
    if not local or (text == demo.NAME and name in ("model", "vectors")):
        return text
    return str(Path(text).expanduser().absolute())
