"""``densesteer serve``."""

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import install_command
from ..text import count, note
from . import completers
from .agent import install, uninstall
from .options import (
    layers_option,
    max_tokens_option,
    model_option,
    positions_option,
    strength_option,
    strict_option,
)
from .steering import is_strict, need_no_vector, read_vector, tell_fit, tell_steering

if TYPE_CHECKING:
    from ..server.models import Models
    from ..server.settings import Access
    from ..server.vectors import NamedVector, Vectors
    from ..steering.places import Positions
    from ..steering.request import Amount

KEY_VARIABLE = "DENSESTEER_API_KEY"
MIN_KEY = 16
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(:[0-9]{1,5})?")


@click.command()
@model_option(required=False)
@click.option(
    "-v",
    "--vector",
    "vectors",
    multiple=True,
    metavar="FILE",
    shell_complete=completers.vectors,
    help="A vector that requests may name by its file's name; may be repeated. -m demo always has the "
    "vector demo.",
)
@click.option(
    "--vectors",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="A folder of vectors (NAME.npz) that requests may name; with --models, those of its folder MODEL are "
    "that model's.",
)
@click.option(
    "--models",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="A folder of models, each in a folder of its name; a request loads the one that it names. With -m too, "
    "that one is loaded at the start, and is the default.",
)
@click.option(
    "--keep",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    metavar="N",
    help="Models of --models that are in memory at a time.",
)
@click.option(
    "--idle",
    type=click.FloatRange(0, min_open=True),
    metavar="MINUTES",
    help="Unload a model of --models after this time without a request. [default: never]",
)
@strength_option
@layers_option()
@positions_option()
@strict_option
@click.option(
    "--effort",
    "efforts",
    multiple=True,
    metavar="LEVEL=STRENGTH[:TOKENS]",
    help="Of a model that thinks: what reasoning_effort means, as low=30%:256; may be repeated. [default: "
    "low is the vector's strength and a thinking budget of 512, medium half of it and 2048, high unsteered]",
)
@click.option(
    "--name", metavar="NAME", help="What clients call the model. [default: its folder's name]"
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Where to listen; any address but this machine's own needs an API key.",
)
@click.option(
    "-p",
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port to listen at; 0 takes any free one.",
)
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help=f"The file with the API key; without it, the key in the environment ({KEY_VARIABLE}), if any.",
)
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="A host name under which this server is reached; may be repeated.",
)
@click.option(
    "--allow-origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="A web page that may send requests, as https://app.example; may be repeated.",
)
@click.option(
    "--rows",
    type=click.IntRange(1, 256),
    default=16,
    show_default=True,
    help="Answers that are generated together.",
)
@click.option(
    "--queue",
    type=click.IntRange(0, 4096),
    default=64,
    show_default=True,
    help="Answers that may wait; further requests are refused with status 429.",
)
@max_tokens_option
@click.option(
    "--prompt-cache",
    type=click.IntRange(min=0),
    default=1024,
    show_default=True,
    metavar="MIB",
    help="Memory for the KV caches of earlier prompts and answers, of each model; 0 keeps none.",
)
@click.option(
    "--exact",
    is_flag=True,
    help="Read earlier answers again, as a new server would: the same bits, but a later first token.",
)
@click.option(
    "--grace",
    type=click.IntRange(0, 3600),
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="Time that running answers get when the server ends.",
)
@click.option(
    "--install-agent",
    is_flag=True,
    help="Serve with these options whenever you are logged in (launchd), not now. On systems other than "
    "macOS, print the agent.",
)
@click.option(
    "--uninstall-agent", is_flag=True, help="Stop and remove the agent; no other option is needed."
)
@click.option("--verbose", is_flag=True, help="Log every request, and the tracebacks of errors.")
def serve(
    model: str | None,
    vectors: tuple[str, ...],
    folder: Path | None,
    models: Path | None,
    keep: int,
    idle: float | None,
    strength: "Amount | None",
    layers: tuple[str, ...],
    positions: "Positions | None",
    efforts: tuple[str, ...],
    name: str | None,
    host: str,
    port: int,
    api_key_file: Path | None,
    hosts: tuple[str, ...],
    origins: tuple[str, ...],
    rows: int,
    queue: int,
    max_tokens: int,
    prompt_cache: int,
    exact: bool,
    grace: int,
    install_agent: bool,
    uninstall_agent: bool,
    verbose: bool,
) -> None:
    """Serve a model on this machine to every OpenAI client, steered per request, with a chat page.

    A request steers with the field `steering`, or with the model's name: NAME@VECTOR=20%. NAME alone
    is the unsteered model. -s, -l and --positions are the defaults of the vectors of -v. Ctrl-C ends.
    """
    if uninstall_agent:
        uninstall()
        return
    _check_models(model, models, vectors, name, keep, idle)
    if name is not None and "@" in name:
        raise click.UsageError(f"--name {name}: expected no @, which separates a vector's name.")
    _check_extra()
    access = _access(host, _read_key(api_key_file), hosts, origins)

    from ..server.effort import EFFORTS, parse_effort
    from ..server.listening import listen, open_socket

    # before anything takes long: a port in use is an error at once
    levels = EFFORTS | dict(map(parse_effort, efforts))
    listener = None if install_agent else open_socket(host, port)
    given = _read_vectors(model, vectors, strength, layers, positions)
    if install_agent:
        in_environment = api_key_file is None and access.key is not None
        install(
            model, port, grace, [one.vector for one in given], key_in_environment=in_environment
        )
        return
    _set_up_logs(verbose)

    from ..server.settings import ServerLimits, Settings
    from ..server.start import model_id, start

    limits = ServerLimits(rows=rows, queue=queue, max_tokens=max_tokens, grace=float(grace))
    settings = Settings(
        model_id(model, name) if model is not None else "",
        limits,
        access,
        folder,
        strict=is_strict(),
        efforts=levels,
        models=models,
        keep=keep,
        unload=None if idle is None else 60 * idle,
        cache_bytes=prompt_cache * 2**20,
        exact=exact,
    )
    service = start(model, given, settings)
    what = _tell_models(service.models) if models is not None else settings.name
    if service.vectors is not None:
        _tell_vectors(service.vectors, given)
    address = f"[{host}]" if ":" in host else host
    note(f"serving {what} on http://{address}:{listener.getsockname()[1]} (Ctrl-C ends)")
    listen(service.application, listener, service.models, limits)


def _check_models(
    model: str | None,
    models: Path | None,
    vectors: tuple[str, ...],
    name: str | None,
    keep: int,
    idle: float | None,
) -> None:
    """Raise unless a model is given, and the options of one model or of several go with it."""
    if model is None and models is None:
        raise click.UsageError("no model: add -m MODEL, or --models DIR.")
    if models is None and (keep != 1 or idle is not None):
        raise click.UsageError("--keep and --idle are for the models of --models DIR: add it.")
    if model is None and (vectors or name is not None):
        raise click.UsageError(
            "-v and --name are for the model of -m: add it, or put vectors for the models of --models into "
            "--vectors DIR."
        )


def _check_extra() -> None:
    from importlib.util import find_spec

    if any(find_spec(name) is None for name in ("pydantic", "starlette", "uvicorn")):
        raise click.ClickException(f"the server needs an extra: {install_command('serve')}")


def _read_vectors(
    model: str | None,
    vectors: tuple[str, ...],
    strength: "Amount | None",
    layers: tuple[str, ...],
    positions: "Positions | None",
) -> "list[NamedVector]":
    """Return the vectors of ``-v``, each with the defaults of ``-s -l --positions``.

    The demo model always has the vector demo.
    """
    from .. import demo
    from ..server.vectors import NamedVector
    from ..steering.request import parse_layers

    if model == demo.NAME and demo.NAME not in vectors:
        vectors = (*vectors, demo.NAME)
    if not vectors:
        need_no_vector(strength, layers, positions)
    found: dict[str, NamedVector] = {}
    for file in vectors:
        vector = read_vector(file)
        vector.name = Path(file).stem
        if vector.name in found:
            raise click.UsageError(
                f"two vectors have the name {vector.name}: rename one of the files."
            )
        chosen = parse_layers(layers, vector.layers) if layers else None
        named = NamedVector(vector, strength, chosen, positions)
        named.request()  # refuses wrong settings before the model is loaded
        found[vector.name] = named
    return list(found.values())


def _read_key(file: Path | None) -> bytes | None:
    """Return the API key. It is never an option, which every user of the machine could see."""
    text = os.environ.get(KEY_VARIABLE) if file is None else file.read_text(errors="replace")
    if text is None:
        return None
    key = text.strip()
    if len(key) < MIN_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise click.UsageError(
            f"the API key of {file or KEY_VARIABLE}: expected at least {MIN_KEY} characters of ASCII without "
            "spaces, for example from `openssl rand -hex 24`."
        )
    return key.encode()


def _access(
    host: str, key: bytes | None, hosts: tuple[str, ...], origins: tuple[str, ...]
) -> "Access":
    from ..server.settings import LOOPBACK, Access

    local = host in LOOPBACK
    if not local and key is None:
        raise click.UsageError(
            f"--host {host} opens the server to other machines: give it an API key "
            f"(--api-key-file FILE or {KEY_VARIABLE})."
        )
    for origin in origins:
        if not ORIGIN.fullmatch(origin):
            raise click.UsageError(
                f"--allow-origin {origin}: expected one origin, as https://app.example, "
                "http://localhost:3000 or app://obsidian.md."
            )
    names = {name.casefold() for name in hosts} | set(LOOPBACK)
    return Access(key, frozenset(names), not local, frozenset(origins))


def _set_up_logs(verbose: bool) -> None:
    """Send the server's logs to standard error; requests and tracebacks only with ``verbose``."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("densesteer: %(message)s") if verbose else _Brief())
    for name, level in (("mlx_densesteer.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level if verbose else logging.WARNING)


class _Brief(logging.Formatter):
    """Only the first line of a record: a traceback shows paths, and may show prompts."""

    def format(self, record: logging.LogRecord) -> str:
        return f"densesteer: {record.getMessage().splitlines()[0]}"


def _tell_models(models: "Models") -> str:
    """Warn of models that cannot be named, and return which there are."""
    for name in models.unusable():
        note(
            f"warning: model {name!r} cannot be used: expected a name of letters, digits and . _ + - only. Rename "
            "the folder."
        )
    names = models.names()
    return f"{count(len(names), 'model')} ({', '.join(names) or 'none yet'})"


def _tell_vectors(vectors: "Vectors", given: "list[NamedVector]") -> None:
    """Tell which vectors there are, and warn of those that do not fit."""
    for one in given:
        tell_fit(one.vector, vectors.model)
        asked = one.request()
        steering = asked.steering(vectors.model)
        tell_steering(asked, steering, vectors.model)
    for name, reason in vectors.unusable().items():
        note(f"warning: {name} of the folder cannot be used: {reason}")
    names = [one.name for one in vectors.all()]
    if names:
        note(f"{count(len(names), 'vector')} by name: {', '.join(names)}")
    else:
        note("no vectors: nothing can be steered (-v FILE, --vectors DIR)")
