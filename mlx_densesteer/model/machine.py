"""The machine: its processor, its system, and what its GPU computes in its own way.

Sources: sysctl(8) and sw_vers(1) of macOS; ``is_nax_available`` in mlx's ``metal/device.cpp``.
"""

import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# Of the GPU's working set: what is above it does not stay in memory beside caches and the system (as mlx-lm warns).
FOR_WEIGHTS = 0.9


def chip() -> str:
    """Return the processor's name, such as "Apple M2 Max"."""
    if sys.platform == "darwin":
        said = _ask("sysctl", "-n", "machdep.cpu.brand_string")
    else:
        file = Path("/proc/cpuinfo")
        names = file.read_text("utf-8").partition("model name")[2] if file.exists() else ""
        said = names.partition("\n")[0].strip("\t: ") or platform.processor()
    return said or "unknown chip"


def macos_version() -> str:
    """Return the version of macOS. A Python built for an older one takes macOS 26 for 16."""
    return _ask("sw_vers", "-productVersion")


def emulates_bfloat16() -> bool:
    """Tell whether this is a Mac with an M1 or M2: their GPUs have no bfloat16 of their own."""
    return sys.platform == "darwin" and re.match(r"Apple M[12]\b", chip()) is not None


def gpu() -> Mapping[str, str | int]:
    """Return what mlx knows of the GPU; empty where Metal cannot be used."""
    import mlx.core as mx

    return mx.device_info(mx.gpu) if mx.metal.is_available() else {}


def working_set(gpu: Mapping[str, str | int]) -> int | None:
    """Return how many bytes a GPU can keep in memory; ``None`` where there is no such limit."""
    found = gpu.get("max_recommended_working_set_size")
    return None if found is None else int(found)


def is_virtual(gpu: Mapping[str, str | int]) -> bool:
    """Tell whether a GPU is that of a virtual machine, as on GitHub's runners."""
    name, architecture = str(gpu.get("device_name")), str(gpu.get("architecture"))
    return "Paravirtual" in name or architecture.startswith("air64")


def rounds_to_tf32() -> bool:
    """Tell whether mlx rounds float32 products to TF32, 10 bits of fraction; it tries one product.

    mlx does so on an M5 or newer from macOS 26.2 on, unless ``MLX_ENABLE_TF32=0`` is set before it starts.
    """
    import mlx.core as mx

    fine = mx.full((256, 256), 1 + 2**-12)
    return not mx.array_equal(fine @ mx.eye(256), fine).item()


def _ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
