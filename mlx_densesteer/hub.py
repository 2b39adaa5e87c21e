"""Model files from the Hugging Face Hub, and what to do when they do not come."""

from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
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

from .errors import HubError

MODEL_FILES = ["*.json", "model*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]


def fetch_model(repo: str, *, revision: str | None = None) -> Path:
    """Return the folder of a model's files, downloading what is not in the cache.

    A download that broke off goes on where it stopped. Without a network, a complete copy
    in the cache is used.

    Raises:
        HubError: see ``fetch_file``.
    """
    return _ask(repo, revision, lambda: snapshot_download(
        repo, revision=revision, allow_patterns=MODEL_FILES
    ))  # fmt: skip


def fetch_file(repo: str, name: str, *, revision: str | None = None) -> Path:
    """Return the path of one file of a repository, downloading it if it is not in the cache.

    Raises:
        HubError: no such repository, revision or file; gated or private; no network and
            nothing in the cache; the connection broke.
    """
    return _ask(repo, revision, lambda: hf_hub_download(repo, name, revision=revision))


def missing_bytes(repo: str, *, revision: str | None = None) -> int:
    """Return how many bytes ``fetch_model`` would download; 0 where the Hub cannot say."""
    try:
        files = snapshot_download(
            repo, revision=revision, allow_patterns=MODEL_FILES, dry_run=True
        )
    except (DryRunError, HTTPError, OSError):
        return 0  # no network: a complete copy in the cache needs no room
    return sum(file.file_size for file in files if file.will_download)


def _ask(repo: str, revision: str | None, download) -> Path:
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
        raise HubError(
            f"{repo}{at}: the Hub cannot be reached and there is no complete copy in the cache. "
            "Check the network (and HF_ENDPOINT, HF_HUB_OFFLINE), or name a local folder."
        ) from error
    except EntryNotFoundError as error:
        raise HubError(f"{repo}{at}: is no model repository, a file is missing ({error}).") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        raise HubError(f"{repo}{at}: the Hub answered with {status}. Try again later.") from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise HubError(
            f"{repo}{at}: the connection to the Hub broke ({type(error).__name__}: {error}). "
            "What was downloaded is kept; run the same command again to go on."
        ) from error
    except OSError as error:
        raise HubError(f"{repo}{at}: the download failed ({error}).") from error
