"""``densesteer doctor``: what is wrong with this machine, and the remedy."""

import ctypes
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import click

from .._version import __version__
from ..text import count

PACKAGES = ("mlx-densesteer", "mlx", "mlx-lm", "transformers", "huggingface-hub", "numpy", "gguf")


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``remedy`` is set where something is wrong."""

    name: str
    value: str
    remedy: str | None = None
    fatal: bool = False


def examine() -> Iterator[Finding]:
    """Yield findings, cheap ones first; a fatal one means that nothing can be generated."""
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    yield from _packages()
    yield from _system()
    yield from _runtime()


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield Finding(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            if name == "mlx-densesteer":
                yield Finding(name, f"{__version__}, not installed but run from its folder")
            elif name == "gguf":
                yield Finding(name, "not installed; only `convert FILE.gguf` needs it")
            else:
                yield Finding(name, "not installed", f"pip install {name}", fatal=True)


def _system() -> Iterator[Finding]:
    machine = platform.machine()
    if sys.platform == "darwin":
        version = platform.mac_ver()[0]
        old = int(version.split(".")[0] or 0) < 14
        yield Finding("system", f"macOS {version}, {machine}",
                      "mlx needs macOS 14 or newer" if old else None, fatal=old)  # fmt: skip
        if machine != "arm64":
            yield Finding("processor", machine, "mlx needs Apple silicon and a native (arm64) "
                          "Python; under Rosetta reinstall Python", fatal=True)  # fmt: skip
    else:
        yield Finding("system", f"{platform.system()} {platform.release()}, {machine}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("memory", f"{memory / 2**30:.1f} GiB")
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding("free disk", f"{free / 1e9:.1f} GB here",
                  "a 1.5B model takes about 4 GB while it is converted" if free < 4e9 else None)  # fmt: skip


def _runtime() -> Iterator[Finding]:
    try:
        import mlx.core as mx
    except ImportError as error:
        yield Finding(
            "mlx", f"does not load: {error}", "on Linux: pip install 'mlx[cpu]'", fatal=True
        )
        return
    metal = mx.metal.is_available()
    yield Finding("device", f"{mx.default_device()}{', Metal' if metal else ''}")
    if sys.platform == "darwin" and not metal:
        yield Finding("Metal", "not available", "run outside of a virtual machine or container")
    if mx.default_device() == mx.Device(mx.cpu) and sys.platform == "linux":
        yield _openblas()
    yield _self_check()


def _openblas() -> Finding:
    core = openblas_core()
    if core is None:
        return Finding("OpenBLAS", "not loaded", "float32 is 20-40 times slower without it: apt-get "
                       "install libopenblas0-pthread, then set LD_PRELOAD to its libopenblas.so.0")  # fmt: skip
    flags = Path("/proc/cpuinfo").read_text().split()
    better = {"avx512vl": "SkylakeX", "avx2": "Haswell"}
    name = next((better[flag] for flag in better if flag in flags), None)
    if core == "Prescott" and name:
        return Finding("OpenBLAS", "loaded, with the code of a Prescott of 2004", "float32 is 3-6 times "
                       f"slower than with your processor's own: set OPENBLAS_CORETYPE={name}")  # fmt: skip
    return Finding("OpenBLAS", f"loaded, with the code for {core}")


def openblas_core() -> str | None:
    """Return for which processor the OpenBLAS that is loaded computes; ``None`` without one.

    One that is older than the processor knows it as a Prescott, which has no AVX.
    """
    lines = Path("/proc/self/maps").read_text().splitlines()
    file = next((line.split(maxsplit=5)[5] for line in lines if "libopenblas" in line), None)
    if file is None:
        return None
    corename = getattr(ctypes.CDLL(file), "openblas_get_corename", None)
    if corename is None:
        return "an unknown processor"
    corename.restype = ctypes.c_char_p
    return corename().decode()


def _self_check() -> Finding:
    """Steer a tiny random model and compare with the sum worked out by hand."""
    from .self_check import largest_error

    try:
        error = largest_error()
    except RuntimeError as failure:  # mx.compile without a C++ compiler, for one
        return Finding("steering", f"fails: {str(failure).splitlines()[0]}",
                       "on Linux install a C++ compiler (g++)", fatal=True)  # fmt: skip
    # without the steering the logits are off by 4; some GPUs round products to TF32
    if error > 1e-2:
        return Finding("steering", f"off by {error:.1e}", "mlx-lm changed under us; install "
                       "the version that this release names", fatal=True)  # fmt: skip
    return Finding("steering", f"exact on a tiny random model (largest error {error:.0e})")


@click.command()
def doctor() -> None:
    """Print versions, device and memory, and what is wrong.

    Exits with 1 if something is wrong that keeps models from running.
    """
    wrong = fatal = 0
    for finding in examine():
        mark = "ok" if finding.remedy is None else "!!"
        click.echo(f"{mark}  {finding.name:<16}{finding.value}")
        if finding.remedy is not None:
            click.echo(f"    {'':<16}-> {finding.remedy}")
            wrong, fatal = wrong + 1, fatal + finding.fatal
    click.echo(f"\n{count(wrong, 'problem')} found" if wrong else "\nnothing wrong")
    sys.exit(1 if fatal else 0)
