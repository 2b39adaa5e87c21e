"""How this installation gets an extra: the command that works where it runs, not one that needs an index.

Source: direct_url.json as PEP 610 has it, written by pip and uv beside what they install.
"""

import json
import shlex
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

_PACKAGE = "mlx-densesteer"
_TOOLS = {  # who makes environments of their own, by what they leave in them
    "uv-receipt.toml": "uv tool install --force",
    "pipx_metadata.json": "pipx install --force",
}


def install_command(extra: str) -> str:
    """Return the command that adds ``extra``, such as ``pip install -e '/src/mlx-densesteer[serve]'``.

    An environment of uv or pipx is made anew, so the extras that it has must be named again; the
    command then says so.
    """
    place, editable = _origin()
    wanted = shlex.quote(f"{place}[{extra}]")
    for mark, tool in _TOOLS.items():
        if (Path(sys.prefix) / mark).is_file():
            option = "--editable " if editable else ""
            return f"{tool} {option}{wanted} (and name what other extras you use)"
    return f"pip install {'-e ' if editable else ''}{wanted}"


def _origin() -> tuple[str, bool]:
    """Return what was installed, a folder or a wheel or the name on an index, and whether it is editable."""
    from importlib.metadata import PackageNotFoundError, distribution  # slow to import

    try:
        found = json.loads(distribution(_PACKAGE).read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        found = {}
    address = urlparse(found.get("url", ""))
    if address.scheme != "file":
        return _PACKAGE, False
    return unquote(address.path), bool(found.get("dir_info", {}).get("editable"))
