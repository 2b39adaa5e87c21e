"""Shell completion: the script for a shell, and what Tab offers for models, vectors and tasks.

Without mlx and numpy: a user waits at the prompt.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePath

import click
from click.shell_completion import CompletionItem, get_completion_class

from .. import demo

SHELLS = ("bash", "zsh", "fish")

# Shells insert an offered name as it is. Their own completion of files escapes spaces, quotes and $,
# so names with them are left to it.
_SAFE = re.compile(r"[\w@%+./-]*")


@click.command()
@click.argument("shell", required=False, type=click.Choice(SHELLS), metavar="[SHELL]")
@click.pass_context
def completion(ctx: click.Context, shell: str | None) -> None:
    """Print the script that makes a shell complete commands, options, models and vectors.

    SHELL is bash, zsh or fish, by default that of $SHELL. To have it in every new shell:

    \b
    zsh   in ~/.zshrc, below compinit:  eval "$(densesteer completion zsh)"
    bash  in ~/.bashrc:                 eval "$(densesteer completion bash)"
    fish  densesteer completion fish > ~/.config/fish/completions/densesteer.fish

    bash must be 4.4 or newer. The one of macOS is 3.2: install another, or use zsh.
    """
    name = shell or PurePath(os.environ.get("SHELL", "")).name
    kind = get_completion_class(name) if name in SHELLS else None
    if kind is None:
        raise click.UsageError(
            f"$SHELL is {os.environ.get('SHELL') or 'not set'}; name the shell: {', '.join(SHELLS)}."
        )
    root = ctx.find_root().command
    click.echo(kind(root, {}, "densesteer", "_DENSESTEER_COMPLETE").source())


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer demo and the models in converted/; the shell offers other folders."""
    written = [
        f"converted/{name}"
        for name in _names("converted/")
        if Path("converted", name, "config.json").is_file()
    ]
    offered = _offer("dir", [demo.NAME, *written], incomplete)
    # in converted/ the shell would offer the same folders once more
    return offered[1:] if incomplete.startswith("converted/") and offered[1:] else offered


def vectors(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer demo and the .npz files of the typed folder; the shell offers folders."""
    head = incomplete[: incomplete.rfind("/") + 1]
    found = [head + name for name in _names(head) if name.endswith(".npz")]
    unsafe = any(name.startswith(incomplete) and not _is_safe(name) for name in found)
    return _offer("file" if unsafe else "dir", [demo.NAME, *found], incomplete)


def tasks(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the names of tasks, and files."""
    from ..evaluation.tasks import TASKS

    return _offer("file", TASKS, incomplete)


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer files and folders."""
    return _offer("file", (), incomplete)


def _offer(kind: str, values: Iterable[str], incomplete: str) -> list[CompletionItem]:
    """Return a mark that asks the shell for its own files or folders, and the values that fit.

    The mark comes first: click's script for bash forgets what came before it. bash heeds it only
    where no value fits.
    """
    fitting = [v for v in values if v.startswith(incomplete) and _is_safe(v)]
    return [CompletionItem(incomplete, type=kind), *(CompletionItem(v) for v in fitting)]


def _names(head: str) -> list[str]:
    """Return the visible names in a folder, none if it cannot be read."""
    try:
        found = os.listdir(os.path.expanduser(head) or ".")  # noqa: PTH111, PTH208
    except OSError:
        return []
    return sorted(name for name in found if name[0] not in ".-~")


def _is_safe(value: str) -> bool:
    return _SAFE.fullmatch(value.removeprefix("~")) is not None  # ~ stands for the home folder
