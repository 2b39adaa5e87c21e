"""Where the chat keeps what it remembers between runs: the history of questions."""

import os
import sys
from pathlib import Path


def state_folder() -> Path:
    """Return the user's state folder of this program; it need not exist.

    Raises:
        RuntimeError: there is no home folder.
    """
    if sys.platform == "darwin":
        return Path.home() / "Library/Application Support/mlx-densesteer"
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local/state") / "mlx-densesteer"


def history_file() -> Path | None:
    """Return the file of earlier questions, readable by the user alone; ``None`` without a place."""
    try:
        path = state_folder() / "chat-history"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
    except (OSError, RuntimeError):
        return None
    return path
