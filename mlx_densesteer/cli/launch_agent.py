"""A launchd agent that starts ``densesteer serve`` at login, and again after an error or a crash.

There is one agent; installing another replaces it. Source: launchd.plist(5), launchctl(1).
"""

import os
import plistlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import DenseSteerError, InputError
from ..files import atomic_file, disk_errors

LABEL = "com.mlx-densesteer.serve"
LOG = "serve.log"
THROTTLE = 30  # seconds between two starts
ENDS = 10  # seconds for the server to end after its last answer
PATIENCE = 60.0  # seconds for an older agent to end
KEPT = ("HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT")  # environment variables to keep; never a secret
# Where macOS asks a person before a program may read; an agent may be refused without a question.
PROTECTED = (
    "Documents", "Desktop", "Downloads", "Library/Mobile Documents", "Library/CloudStorage", "/Volumes",
)  # fmt: skip


def agent(
    arguments: Sequence[str], *, home: Path, grace: int = 10,
    environment: Mapping[str, str] = os.environ,
) -> bytes:  # fmt: skip
    """Return the property list of an agent that runs ``densesteer serve`` with these arguments.

    Paths must be absolute: launchd starts the server in another folder. ``environment``: only the
    variables in ``KEPT`` are used. ``grace``: seconds for running answers when the server ends.

    Raises:
        InputError: a text that a property list cannot hold.
    """
    logs = str(log(home))
    document = {
        "Label": LABEL,
        "ProgramArguments": [_lasting(sys.executable), "-m", "mlx_densesteer", "serve", *arguments],
        "RunAtLoad": True,
        # start again after any exit status but 0, or a signal
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": THROTTLE,
        "ExitTimeOut": grace + ENDS,  # then launchd kills it
        "ProcessType": "Interactive",  # macOS does not throttle it
        "WorkingDirectory": str(home),
        "StandardErrorPath": logs,
        "StandardOutPath": logs,
    }
    if kept := {name: environment[name] for name in KEPT if name in environment}:
        document["EnvironmentVariables"] = kept
    try:
        return plistlib.dumps(document)
    except ValueError as error:
        raise InputError(f"the agent cannot be written as a property list ({error}).") from error


def _lasting(program: str) -> str:
    """Return a path of Homebrew that outlives an upgrade, which removes ``Cellar/NAME/VERSION``."""
    lasting = re.sub(r"/Cellar/([^/]+)/[^/]+/", r"/opt/\1/", program)
    return lasting if Path(lasting).exists() else program


def protected(made: bytes, *, home: Path) -> list[str]:
    """Return the paths in an agent, its program's too, that macOS may not let an agent read."""
    folders = [home / name for name in PROTECTED]
    return [
        text
        for text in plistlib.loads(made)["ProgramArguments"]
        for path in [Path(text)]
        if path.is_absolute()
        and any(p.is_relative_to(f) for p in (path, path.resolve()) for f in folders)
    ]


def path(home: Path) -> Path:
    """Return where macOS looks for the agent."""
    return home / "Library" / "LaunchAgents" / f"{LABEL}.plist"


def log(home: Path) -> Path:
    """Return the log file of the agent's server."""
    return home / "Library" / "Logs" / "mlx-densesteer" / LOG


def install(made: bytes, *, home: Path) -> Path:
    """Write the agent and start it, in place of an older one; return its file.

    Raises:
        DiskError: it cannot be written.
        DenseSteerError: launchd refused it.
    """
    file = path(home)
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        log(home).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as out:
        out.write(made)
    file.chmod(0o644)  # launchd refuses files that others may write
    if lint := shutil.which("plutil"):
        _run([lint, "-lint", str(file)])
    _boot_out()
    _launchctl("bootstrap", _domain(), str(file))
    return file


def uninstall(*, home: Path) -> bool:
    """Stop the agent and remove its file; ``False`` if there was none."""
    file = path(home)
    there = file.exists()
    _boot_out()
    file.unlink(missing_ok=True)
    return there


def _boot_out() -> None:
    """Stop the agent and wait until it has ended: launchd refuses to start it earlier."""
    service = f"{_domain()}/{LABEL}"
    _launchctl("bootout", service, may_fail=True)
    until = time.monotonic() + PATIENCE
    while _launchctl("print", service, may_fail=True) and time.monotonic() < until:
        time.sleep(0.2)


def _domain() -> str:
    return f"gui/{os.getuid()}"


def _launchctl(*arguments: str, may_fail: bool = False) -> bool:
    """Run launchctl; return whether it succeeded."""
    launchctl = shutil.which("launchctl")
    if launchctl is None:
        raise DenseSteerError("no launchctl: an agent can be installed only on macOS.")
    return _run([launchctl, *arguments], may_fail=may_fail)


def _run(command: list[str], *, may_fail: bool = False) -> bool:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode and not may_fail:
        said = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        raise DenseSteerError(
            f"`{' '.join(command)}`: {said}. Look at the file, or try `launchctl bootstrap` by hand."
        )
    return not done.returncode
