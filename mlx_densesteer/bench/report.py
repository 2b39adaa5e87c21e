"""The table, and the machine that it was measured on. No mlx before it is asked for."""

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .._version import __version__
from ..errors import DenseSteerError

if TYPE_CHECKING:
    from .subject import Subject


# what a benchmark may meet on somebody's machine; anything else is a bug of ours
REFUSALS = (DenseSteerError, OSError, subprocess.SubprocessError, RuntimeError, ImportError)


class Row(NamedTuple):
    """One line of the table: a figure, its quartiles, those of the null comparison, a remark."""

    figure: str
    value: str
    quartiles: str = ""
    noise: str = ""
    remark: str = ""


def ratio(figure: str, of: Mapping[str, float], null: Mapping[str, float] | None = None,
          remark: str = "") -> Row:  # fmt: skip
    """Write a ``spread`` of ratios, with the ``spread`` of the null comparison."""
    noise = "" if null is None else f"{null['median']:.3f} ({_range(null)})"
    return Row(figure, f"{of['median']:.3f}", _range(of), noise, remark)


def _range(of: Mapping[str, float]) -> str:
    return f"{of['low']:.3f}-{of['high']:.3f}" if of["count"] > 1 else "one round"


HEAD = ("", "value", "quartiles", "the same twice")


def lines(rows: Iterable[tuple[str, Row]]) -> list[str]:
    """Return the table of (benchmark, row): a line with the name, then its rows and remarks."""
    cells: list[tuple[str, ...]] = [HEAD]
    for name, group in groupby(rows, key=itemgetter(0)):
        cells.append((name,))
        for _, row in group:
            cells.append((f"  {row.figure}", *row[1:4]))
            if row.remark:
                cells.append((f"      {row.remark}",))
    full = [line for line in cells if len(line) == len(HEAD)]
    widths = [max(len(line[i]) for line in full) for i in range(len(HEAD))]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def header(subject: "Subject", command: str) -> dict[str, object]:
    """Return what a figure must carry: model, machine, versions, date, command."""
    import mlx.core as mx

    return {
        "model": subject.name,
        "layers": subject.layer_count,
        "dtype": subject.dtype,
        "device": _device(mx),
        "machine": platform.machine(),
        "chip": _chip(),
        "cores": os.cpu_count(),
        "memory_gib": _memory(),
        "os": _system(),
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "mlx-lm": metadata.version("mlx-lm"),
        "mlx-densesteer": __version__,
        "load": _load(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "command": command,
    }


def heading(head: Mapping[str, object]) -> list[str]:
    """Return the header as a few lines above the table."""
    load = "" if head["load"] is None else f", load {head['load']}"
    return [
        f"{head['model']}: {head['layers']} layers, {head['dtype']}, on {head['device']}",
        f"{head['chip']} ({head['machine']}), {head['cores']} cores, {head['memory_gib']} GiB, {head['os']}{load}",
        f"Python {head['python']}, mlx {head['mlx']}, mlx-lm {head['mlx-lm']}, "
        f"mlx-densesteer {head['mlx-densesteer']}, {head['date']}",
        f"$ {head['command']}",
    ]


def reason(error: BaseException) -> str:
    """Say in a line why a benchmark could not run."""
    said = getattr(error, "stderr", None) or str(error) or type(error).__name__
    said = said if isinstance(said, str) else said.decode("utf-8", "replace")
    last = said.strip().splitlines()[-1]
    if isinstance(error, subprocess.CalledProcessError):
        return f"{' '.join(error.cmd[1:4])}: exit code {error.returncode}: {last}"
    return last


def _device(mx) -> str:
    info = mx.device_info()
    name = info.get("device_name")
    kind = "GPU" if mx.default_device() == mx.Device(mx.gpu) else "CPU"
    return kind if kind == "CPU" or not name else f"{kind} ({name})"


def _chip() -> str:
    if sys.platform == "darwin":
        found = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"],
            capture_output=True,
            text=True,
            check=False,
        )
        return found.stdout.strip() or "unknown chip"
    try:
        names = [line.partition(":")[2].strip()
                 for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines()
                 if line.startswith("model name")]  # fmt: skip
    except OSError:
        names = []
    return (names or [platform.processor() or "unknown chip"])[0]


def _memory() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.release()}"


def _load() -> float | None:
    """What else the machine was doing: processes that want to run, over the last minute."""
    try:
        return round(os.getloadavg()[0], 1)
    except OSError:
        return None
