"""One file of a data set on the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import HubError

_KIND = "dataset"
_LOGIN = "log in with `hf auth login` (or set HF_TOKEN)"


def fetch_data_file(repo: str, name: str, *, revision: str | None = None) -> Path:
    """Return the path of one file of a data set, downloading it if it is not in the cache.

    Raises:
        HubError: no such data set, revision or file; gated or private; no network and
            nothing in the cache; the connection broke.
    """
    try:
        return Path(hf_hub_download(
            repo, name, repo_type=_KIND, revision=revision,
            local_files_only=not _answers(repo, name, revision),
        ))  # fmt: skip
    except (HTTPError, OSError) as error:  # huggingface_hub's own errors are among these
        raise HubError(f"data set {repo}: {_reason(error, name, revision)}") from error


def _answers(repo: str, name: str, revision: str | None) -> bool:
    """Ask the Hub once; huggingface_hub asks one that stays silent for minutes (hub.py)."""
    try:
        get_hf_file_metadata(hf_hub_url(repo, name, repo_type=_KIND, revision=revision))
    except HfHubHTTPError:
        return True  # it refuses; the download will say why
    except (HTTPError, OSError):
        return False
    return True


def _reason(error: Exception, name: str, revision: str | None) -> str:
    status = _status(error) or _status(error.__cause__)
    if isinstance(error, GatedRepoError):
        return f"is gated. Accept its terms on its Hub page, then {_LOGIN}."
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {revision!r}."
    if isinstance(error, RepositoryNotFoundError):
        return f"is not on the Hub, or it is private; for a private one {_LOGIN}."
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled) and not status:
        return (
            f"the Hub cannot be reached, and {name} is not in its cache. Check the network (and "
            "HF_ENDPOINT, HF_HUB_OFFLINE), or name a local JSONL file with the same fields."
        )
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"has no file {name}. Name a local JSONL file with the same fields."
    if status in (401, 403):
        return f"the Hub answered with {status}. Check your token (HF_TOKEN, `hf auth whoami`)."
    if status:
        return f"the Hub answered with {status}. Try again later."
    return f"the download failed ({' '.join(str(error).split())}). Try again."


def _status(error: BaseException | None) -> int | None:
    response = getattr(error, "response", None)
    return response.status_code if response is not None else None
