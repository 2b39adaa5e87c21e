"""Model files from the Hugging Face Hub, and what to do when they do not come."""

import re
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
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
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from ..errors import HubError
from ..files import file_sha256
from .config import parse_config

WEIGHT_FILES = "model*.safetensors"
MODEL_FILES = ["*.json", WEIGHT_FILES, "tokenizer.model", "*.txt", "*.jinja"]


def fetch_model(repo: str, *, revision: str | None = None) -> Path:
    """Return the folder of a model's files, downloading what is not in the cache.

    A download that broke off goes on where it stopped. Without a network, a complete copy
    in the cache is used.

    Raises:
        HubError: see ``fetch_file``.
    """
    return _ask(repo, revision, lambda: _snapshot(repo, revision))


def fetch_file(repo: str, name: str, *, revision: str | None = None) -> Path:
    """Return the path of one file of a repository, downloading it if it is not in the cache.

    Raises:
        HubError: no such repository, revision or file; gated or private; no network and
            nothing in the cache; the connection broke.
    """
    return _ask(repo, revision, lambda: hf_hub_download(
        repo, name, revision=revision, local_files_only=not _answers(repo, revision)
    ))  # fmt: skip


def fetch_config(repo: str, *, revision: str | None = None) -> dict[str, object]:
    """Return a model's ``config.json``: its family is known before gigabytes are fetched.

    Raises:
        HubError: see ``fetch_file``.
        ModelError, UnsupportedModelError: see ``model_folder.read_config``.
    """
    return parse_config(fetch_file(repo, "config.json", revision=revision).read_bytes(), repo)


def missing_bytes(repo: str, *, revision: str | None = None) -> int:
    """Return how many bytes ``fetch_model`` would download; 0 where the Hub cannot say."""
    if not _answers(repo, revision):
        return 0  # no network: a complete copy in the cache needs no room
    try:
        files = snapshot_download(repo, revision=revision, allow_patterns=MODEL_FILES, dry_run=True)
    except (DryRunError, HTTPError, OSError):
        return 0
    return sum(file.file_size for file in files if file.will_download)


def _answers(repo: str, revision: str | None) -> bool:
    """Ask the Hub once, for ``HF_HUB_ETAG_TIMEOUT`` seconds at most (10).

    huggingface_hub asks a Hub that stays silent for more than six minutes, or without end.
    """
    try:
        get_hf_file_metadata(hf_hub_url(repo, "config.json", revision=revision))
    except HfHubHTTPError:
        return True  # it refuses; the download will say why
    except (HTTPError, OSError):
        return False
    return True


def _snapshot(repo: str, revision: str | None) -> Path:
    online = _answers(repo, revision)
    if online:
        _fetch_weights(repo, revision)
    folder = Path(snapshot_download(
        repo, revision=revision, allow_patterns=MODEL_FILES, local_files_only=not online
    ))  # fmt: skip
    if not online and not any(folder.glob(WEIGHT_FILES)):
        raise LocalEntryNotFoundError(f"{folder}: no weights")
    return folder


def _fetch_weights(repo: str, revision: str | None) -> None:
    """Put the weights into huggingface_hub's cache, going on where an earlier run stopped.

    huggingface_hub 2.4 throws a file away that broke off, which may be gigabytes (its pull
    request 4228). Where the cache has the blob of a file, it only links it.
    """
    try:
        files = snapshot_download(
            repo, revision=revision, allow_patterns=WEIGHT_FILES, dry_run=True
        )
    except DryRunError:
        return  # it refuses; the download will say why
    for file in files:
        if file.will_download:
            _fetch_blob(repo, file.filename, file.commit_hash)


def _fetch_blob(repo: str, name: str, commit: str) -> None:
    url = hf_hub_url(repo, name, revision=commit)
    found = get_hf_file_metadata(url)
    if not found.size or not re.fullmatch("[0-9a-f]{64}", found.etag or ""):
        return  # not in LFS, so it is small
    folder = repo_folder_name(repo_id=repo, repo_type="model")
    blob = Path(HF_HUB_CACHE, folder, "blobs", found.etag)
    lock = Path(HF_HUB_CACHE, ".locks", folder, f"{found.etag}.lock")
    for file in (blob, lock):
        file.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not blob.exists():  # another process may have been faster
            _resume(url, blob, found.size, name)


def _resume(url: str, blob: Path, size: int, name: str) -> None:
    """Download one file of ``size`` bytes; the name of ``blob`` is its SHA-256."""
    partial = blob.with_name(f"{blob.name}.incomplete")
    with partial.open("ab") as file:
        if file.tell() > size:
            file.truncate(0)
            file.seek(0)
        http_get(
            url,
            file,
            resume_size=file.tell(),
            headers=build_hf_headers(),
            expected_size=size,
            displayed_filename=name,
        )
    if file_sha256(partial) != blob.name:
        partial.unlink()
        raise OSError(f"{name} has not the SHA-256 that the Hub names; it was removed, try again")
    partial.rename(blob)


def _ask(repo: str, revision: str | None, download: Callable[[], str | Path]) -> Path:
    at = f" at revision {revision}" if revision else ""
    try:
        return Path(download())
    except HFValidationError as error:
        raise HubError(
            f"{repo}: neither a folder here nor a Hub id such as Qwen/Qwen2.5-1.5B-Instruct."
        ) from error
    except GatedRepoError as error:
        raise HubError(
            f"{repo}: the repository is gated. Accept its terms on its Hub page, then log in "
            "with `hf auth login` (or set HF_TOKEN)."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo}: has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{repo}: no such repository on the Hub, or it is private. Check the name; for a "
            "private one log in with `hf auth login` (or set HF_TOKEN)."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            raise HubError(f"{repo}{at}: {_refusal(error.__cause__)}") from error
        raise HubError(
            f"{repo}{at}: there is no such folder here ({Path.cwd()}), the Hub cannot be reached, and "
            "there is no complete copy in its cache. Check the network (and HF_ENDPOINT, "
            "HF_HUB_OFFLINE), or name a local folder."
        ) from error
    except EntryNotFoundError as error:
        raise HubError(
            f"{repo}{at}: is no model repository, a file is missing ({_one_line(error)})."
        ) from error
    except HfHubHTTPError as error:
        raise HubError(f"{repo}{at}: {_refusal(error)}") from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise HubError(
            f"{repo}{at}: the connection to the Hub broke ({type(error).__name__}: {error}). "
            "What was downloaded is kept; run the same command again to go on."
        ) from error
    except OSError as error:
        raise HubError(f"{repo}{at}: the download failed ({_one_line(error)}).") from error


def _refusal(error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else "no status"
    if status in (401, 403):
        return f"the Hub answered with {status}. Check your token (HF_TOKEN, `hf auth whoami`)."
    return f"the Hub answered with {status}. Try again later."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
