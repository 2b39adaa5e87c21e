"""The command line. Modules here import click alone; a command imports the rest when it runs."""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import click

from .._version import __version__
from ..distributed.ranks import launched_rank
from ..errors import DenseSteerError
from ..text import guard_terminals, silence
from .bake import bake
from .bench import bench
from .calibrate import calibrate
from .chat import chat
from .completers import completion
from .convert import convert
from .demo import demo
from .doctor import doctor
from .eval import evaluate
from .export_function import export_function
from .extract import extract
from .generate import generate
from .pairs import pairs
from .serve import serve
from .sweep import sweep
from .train import train
from .vector import vector

ON_RANKS = ("generate", "eval", "sweep")  # the commands that run under mlx.launch


class _Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP: like Ctrl-C, so that files are cleaned up and answers kept."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


class _Commands(click.Group):
    """Turn expected errors into a message and an exit code; let bugs show their traceback."""

    def main(self, *args: object, **kwargs: object) -> object:
        _open_closed_streams()
        guard_terminals()
        return super().main(*args, **kwargs)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple:
        name, command, rest = super().resolve_command(ctx, args)
        if launched_rank() is not None and name not in ON_RANKS:
            raise click.UsageError(
                f"densesteer {name} runs on one machine: start it without mlx.launch. "
                f"On several ranks run {', '.join(ON_RANKS)}."
            )
        return name, command, rest

    def invoke(self, ctx: click.Context) -> object:
        rank = launched_rank()
        try:
            with _signals() if rank is None else _ranked(rank):
                return super().invoke(ctx)
        except DenseSteerError as error:
            message = f"rank {rank}: {error}" if rank else str(error)
            raise click.ClickException(message) from error
        except RuntimeError as error:  # from mlx's ring
            if rank is None or not str(error).startswith("[ring]"):
                raise
            raise click.ClickException(f"rank {rank}: another rank is gone ({error}).") from error
        except OSError as error:  # no permission, disk full, ...
            if error.errno in (None, errno.EPIPE):
                raise
            place = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{place}{error.strerror}.") from error
        except KeyboardInterrupt as error:
            ctx.exit(128 + getattr(error, "number", signal.SIGINT))


def _open_closed_streams() -> None:
    """Open a closed standard input or error on the null device; end without a standard output.

    Otherwise the next file that is opened would become standard input or error.
    """
    if sys.stdout is None:
        sys.exit("densesteer: standard output is closed; there is nowhere to put a result.")
    for number in (0, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


@contextlib.contextmanager
def _ranked(rank: int) -> Iterator[None]:
    """Silence all ranks but rank 0, and let signals end the process at once.

    Python's signal handlers wait until mlx returns, and mlx may wait for a rank that is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if not rank:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), silence():
        yield


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into ``_Ended`` until the block ends."""

    def end(number: int, frame: object) -> None:
        raise _Ended(number)

    taken = []
    if threading.current_thread() is threading.main_thread():
        # under nohup SIGHUP is ignored, and stays so
        numbers = (signal.SIGTERM, signal.SIGHUP)
        taken = [n for n in numbers if signal.getsignal(n) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


# color: click would take escape sequences out of what goes to files and pipes
@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "color": True})
@click.version_option(__version__, prog_name="densesteer")
def main() -> None:
    """Run steered small language models on a Mac.

    Add a steering vector to a model's residual stream while it generates, and it reasons in
    fewer, denser steps. The model's weights stay as they are.
    """


for command in (
    demo,
    convert,
    generate,
    chat,
    serve,
    pairs,
    extract,
    train,
    calibrate,
    evaluate,
    sweep,
    vector,
    bake,
    export_function,
    bench,
    doctor,
    completion,
):
    main.add_command(command)
