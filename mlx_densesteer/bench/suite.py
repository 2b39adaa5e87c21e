"""All benchmarks one after the other; their figures as one object and one table."""

import datetime
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata

import mlx.core as mx

from .._version import __version__
from ..errors import DenseSteerError
from ..model.machine import chip, macos_version
from ..text import cause
from . import batch, decode, generation
from .figures import Figure, Measurement, Tell, lines, quiet
from .subject import Subject

BENCHMARKS = {"decode": decode, "generation": generation, "batch": batch}

# what a benchmark may meet on a user's machine; anything else is a bug
REFUSALS = (DenseSteerError, OSError, RuntimeError)


def measure(
    subject: Subject,
    names: Sequence[str] = (),
    *,
    quick: bool = False,
    tell: Callable[[str], Tell] = lambda name: quiet,
) -> Iterator[tuple[str, Measurement]]:
    """Yield (name, measurement) of each benchmark as it is done; without ``names`` of all.

    A benchmark that cannot run yields the reason in its ``details``. ``tell(name)`` returns what is
    called with that benchmark's progress.
    """
    for name, module in BENCHMARKS.items():
        if names and name not in names:
            continue
        options = module.QUICK if quick else {}
        began = time.perf_counter()
        try:
            found = module.run(subject, tell=tell(name), **options)
        except REFUSALS as error:
            found = _not_measured(cause(error))
        seconds = round(time.perf_counter() - began, 1)
        yield name, replace(found, details={**found.details, "wall_seconds": seconds})


def _not_measured(why: str) -> Measurement:
    return Measurement([Figure("", "not measured", None, remark=why)], {"reason": why})


def document(
    found: Mapping[str, Measurement], head: Mapping[str, object], missing: str
) -> dict[str, object]:
    """Return one object: figures at the top level, ``header``, ``details`` by benchmark.

    A figure without a measurement is ``None``; ``missing`` is the reason of benchmarks that did not
    run at all.
    """
    whole = {name: found.get(name, _not_measured(missing)).document() for name in BENCHMARKS}
    return {
        **{key: whole[name].get(key) for name, of in BENCHMARKS.items() for key in of.FIGURES},
        "header": dict(head),
        "details": {name: of["details"] for name, of in whole.items()},
    }


def report(found: Mapping[str, Measurement], head: Mapping[str, object]) -> list[str]:
    """Return the header and the table of all that was measured."""
    return [*heading(head), "", *lines((name, of.lines) for name, of in found.items())]


def header(subject: Subject, command: str) -> dict[str, object]:
    """Return what belongs to every figure: model, machine, versions, date and command."""
    return {
        "model": subject.name,
        "layers": subject.model.layer_count,
        "dtype": subject.dtype,
        "device": _device(),
        "machine": platform.machine(),
        "chip": chip(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": _system(),
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "mlx-lm": metadata.version("mlx-lm"),
        "mlx-densesteer": __version__,
        "load": round(os.getloadavg()[0], 1),  # processes that want to run, over the last minute
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "command": command,
    }


def heading(head: Mapping[str, object]) -> list[str]:
    """Return the header as a few lines above the table."""
    return [
        f"{head['model']}: {head['layers']} layers, {head['dtype']}, on {head['device']}",
        f"{head['chip']} ({head['machine']}), {head['cores']} cores, {head['memory_gib']} GiB, "
        f"{head['os']}, load {head['load']}",
        f"Python {head['python']}, mlx {head['mlx']}, mlx-lm {head['mlx-lm']}, "
        f"mlx-densesteer {head['mlx-densesteer']}, {head['date']}",
        f"$ {head['command']}",
    ]


def _device() -> str:
    if mx.default_device() != mx.Device(mx.gpu):
        return "CPU"
    name = mx.device_info().get("device_name")
    return f"GPU ({name})" if name else "GPU"


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {macos_version()}"
    return f"{platform.system()} {platform.release()}"
