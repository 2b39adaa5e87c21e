"""What a shell offers at Tab for models, vectors and tasks. No mlx: a key was pressed, and somebody waits."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from .. import demo

# What is offered is inserted as it is. A name with a space, a quote or a $ in it is left to the shell's
# own completion of files, which escapes it.
_SAFE = re.compile(r"[\w@%+./-]*")


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer demo and what ``convert`` wrote here; other folders are for the shell to walk."""
    written = [
        f"converted/{name}" for name in _names("converted/") if _is_model(Path("converted", name))
    ]
    offered = _offer("dir", [demo.NAME, *written], incomplete)
    # in converted/ the shell would offer the same folders once more
    return offered[1:] if incomplete.startswith("converted/") and offered[1:] else offered


def vectors(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer demo and the .npz files of the folder that is typed; folders are for the shell."""
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
    """Return what begins as typed, behind the mark that asks the shell for its own files or folders.

    The mark is first: click's script for bash forgets what came before it. There it only counts
    where nothing else fits.
    """
    fitting = [v for v in values if v.startswith(incomplete) and _is_safe(v)]
    return [CompletionItem(incomplete, type=kind), *(CompletionItem(v) for v in fitting)]


def _names(head: str) -> list[str]:
    """Return the visible names in a folder; one that cannot be read has none."""
    try:
        found = os.listdir(os.path.expanduser(head) or ".")  # noqa: PTH111, PTH208
    except OSError:
        return []
    return sorted(name for name in found if name[0] not in ".-~")


def _is_safe(value: str) -> bool:
    return _SAFE.fullmatch(value.removeprefix("~")) is not None  # ~ stands for the home folder


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()
