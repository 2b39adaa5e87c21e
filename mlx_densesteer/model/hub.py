"""Fetch files of models and data sets from the Hugging Face Hub; every failure names its remedy."""

import contextlib
import errno
import glob
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    DryRunError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from ..errors import HubError
from ..files import check_disk
from ..text import cause, printable, unguarded
from .config import parse_config
from .families import empty_network
from .weights import INDEX, parse_index

CONFIG = "config.json"
WEIGHT_FILES = "model*.safetensors"
OTHER_FILES = ["*.json", "tokenizer.model", "*.txt", "*.jinja"]

Kind = Literal["model", "dataset"]

_LOGIN = "log in with `hf auth login` (or set HF_TOKEN)"
_OTHERWISE = {"model": "a local folder", "dataset": "a local JSONL file with the same fields"}


def fetch_model(repo: str, *, revision: str | None = None) -> Path:
    """Return the folder of a model's files; download what is not in the cache.

    The weights are the files that the index names, or ``model*.safetensors`` without one. They are not
    downloaded if ``config.json`` is that of a model that cannot be steered. Without a network, a complete copy in the
    cache is enough.

    Raises:
        HubError: see ``fetch_file``.
        ModelError, UnsupportedModelError: the index is damaged, or see ``config.parse_config``.
        DiskError: the cache's disk has no room for what is missing.
    """
    content = fetch_file(repo, CONFIG, revision=revision).read_bytes()
    empty_network(parse_config(content, repo), repo)

    def download(offline: bool) -> Path:
        weights = _indexed(repo, revision, offline) or [WEIGHT_FILES]
        if not offline:
            _download_missing(repo, revision, weights)
        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[*OTHER_FILES, *weights],
                local_files_only=offline,
                tqdm_class=_NoBar,
            )
        )
        if offline and not all(any(folder.glob(name)) for name in weights):
            raise LocalEntryNotFoundError(f"{folder}: no weights")
        return folder

    return _fetch(repo, CONFIG, revision, "model", download)


def fetch_file(repo: str, name: str, *, revision: str | None = None, kind: Kind = "model") -> Path:
    """Return the path of one file of a repository; download it if it is not in the cache.

    Raises:
        HubError: no such repository, revision or file; gated or private; no network and nothing in
            the cache; a full disk; a download that broke off.
    """

    def download(offline: bool) -> Path:
        options = {"repo_type": kind, "revision": revision, "local_files_only": offline}
        return Path(hf_hub_download(repo, name, tqdm_class=_Bar, **options))

    return _fetch(repo, name, revision, kind, download)


class _Bar(tqdm):
    """A file's progress bar. It is drawn with escape sequences; the Hub's name for the file has none."""

    def __init__(self, *arguments: object, **options: object) -> None:
        options |= {"desc": printable(str(options.get("desc", ""))), "file": unguarded(sys.stderr)}
        super().__init__(*arguments, **options)


class _NoBar(tqdm):
    """A progress bar that shows nothing: each file has its own bar, on a terminal."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **{**options, "disable": True})


def _indexed(repo: str, revision: str | None, offline: bool) -> list[str]:
    """Return patterns for the weight files that a model's index names; empty without an index."""
    options = {"revision": revision, "local_files_only": offline, "tqdm_class": _Bar}
    try:
        index = Path(hf_hub_download(repo, INDEX, **options))
    except EntryNotFoundError:  # if the Hub fails here, it fails again below, and that is told
        return []
    return sorted({glob.escape(name) for name in parse_index(index.read_bytes(), repo).values()})


def _download_missing(repo: str, revision: str | None, weights: list[str]) -> None:
    """Download one file after another, so that Ctrl-C stops at once.

    ``snapshot_download`` uses threads, and waits for their whole files.
    """
    files = []
    # If the Hub fails here, the caller's snapshot_download says why, or finds a complete copy.
    with contextlib.suppress(DryRunError):
        files = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[*OTHER_FILES, *weights],
            dry_run=True,
            tqdm_class=_NoBar,
        )
    missing = [file for file in files if file.will_download]
    check_disk(Path(HF_HUB_CACHE), sum(file.file_size for file in missing), "the download")
    for file in missing:
        hf_hub_download(repo, file.filename, revision=file.commit_hash, tqdm_class=_Bar)


def _fetch(
    repo: str, name: str, revision: str | None, kind: Kind, download: Callable[[bool], Path]
) -> Path:
    """Call ``download(offline)``; raise ``HubError`` for what huggingface_hub raises."""
    try:
        return download(not _answers(repo, name, revision, kind))
    # Xet, the Hub's storage of large files, raises RuntimeError; a malformed repository id, ValueError.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        shown = f"data set {repo}" if kind == "dataset" else repo
        raise HubError(f"{shown}: {_reason(error, name, revision, kind)}") from error


def _answers(repo: str, name: str, revision: str | None, kind: Kind) -> bool:
    """Tell whether the Hub answers within ``HF_HUB_ETAG_TIMEOUT`` seconds (10).

    If it does not answer, ``hf_hub_download`` waits six minutes, and ``snapshot_download`` for
    ever.
    """
    try:
        get_hf_file_metadata(hf_hub_url(repo, name, repo_type=kind, revision=revision))
    except HfHubHTTPError:
        return True  # the Hub refuses; the download says why
    except (HTTPError, OSError):
        return False
    return True


def _reason(error: Exception, name: str, revision: str | None, kind: Kind) -> str:
    """Return what was found, what was expected, and the remedy, in one line."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # the Hub was reached, and refused
    if isinstance(error, HFValidationError):
        return "neither a folder here nor a Hub id such as Qwen/Qwen2.5-1.5B-Instruct."
    if isinstance(error, GatedRepoError):
        return f"is gated. Accept its terms on its Hub page, then {_LOGIN}."
    if isinstance(error, RevisionNotFoundError):
        return (
            f"has no revision {revision!r}. Expected a branch, a tag or a commit of its Hub page."
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"is not on the Hub, or it is private. Check the name; for a private one {_LOGIN}."
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return (
            "the Hub cannot be reached, and there is no complete copy in its cache. Check the network (and "
            f"HF_ENDPOINT, HF_HUB_OFFLINE), or name {_OTHERWISE[kind]}."
        )
    if isinstance(error, EntryNotFoundError) and name == CONFIG:
        return (
            "has no config.json, so no model's folder. A LoRA adapter must be merged into its model first; of "
            "a repository of GGUF files, download one and convert it."
        )
    if isinstance(error, EntryNotFoundError):
        return f"has no file {name}. Check the name, or name {_OTHERWISE[kind]}."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"the Hub answered with {status}. Check your token (HF_TOKEN, `hf auth whoami`)."
        return f"the Hub answered with {status}. Try again later."
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk of {HF_HUB_CACHE} is full. Make room, or set HF_HOME to a folder elsewhere."
        )
    return (
        f"the download broke off ({cause(error)}). Files that came whole are kept; start the same "
        "command again."
    )
