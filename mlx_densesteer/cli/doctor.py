"""``densesteer doctor``: checks of this machine, each with a remedy for what is wrong."""

import ctypes
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .. import demo
from .._version import __version__
from ..model.machine import (
    FOR_WEIGHTS,
    chip,
    emulates_bfloat16,
    gpu,
    is_virtual,
    macos_version,
    rounds_to_tf32,
    working_set,
)
from ..text import count
from . import completers

if TYPE_CHECKING:
    from mlx_lm.models.qwen2 import Model

PACKAGES = ("mlx-densesteer", "mlx", "mlx-lm", "transformers", "huggingface-hub", "numpy", "gguf")


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``remedy`` is set where something is wrong, ``hint`` is advice."""

    name: str
    value: str
    remedy: str | None = None
    fatal: bool = False
    hint: str | None = None


def examine() -> Iterator[Finding]:
    """Yield findings, cheap ones first; a fatal one means that nothing can be generated."""
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    yield from _packages()
    yield from _system()
    yield from _runtime()


def examine_model(name: str) -> Iterator[Finding]:
    """Yield what works with a model, from its configuration alone.

    Raises:
        UnsupportedModelError: it cannot be steered; the message says why.
        ModelError, HubError: no model, or a damaged one.
    """
    from ..export.llama import BAKES
    from ..model.config import local_folder, parse_config, read_file
    from ..model.families import (
        decoder_blocks,
        empty_network,
        is_plain,
        parallel_ways,
        unlike,
        window_of,
    )
    from ..model.hub import CONFIG, fetch_file

    folder = demo.MODEL if name == demo.NAME else local_folder(name)
    content = fetch_file(name, CONFIG).read_bytes() if folder is None else read_file(folder)
    config = parse_config(content, name)
    network = empty_network(config, name)
    kind = str(config["model_type"])
    yield Finding(
        "model",
        f"{name}, a {kind} of {config['num_hidden_layers']} blocks of {network.args.hidden_size}",
    )
    remark = unlike(config)
    hint = remark and "compare its first answers with another program's"
    yield Finding("config.json", remark or "computed as transformers computes it", hint=hint)
    blocks = list(decoder_blocks(network).values())
    plain = all(is_plain(type(block)) for block in blocks)
    how = "in the last addition of a block" if plain else "by one operation after a block"
    yield Finding("steering", f"{how}: generate, chat, serve, extract, sweep, train, eval")
    if window := window_of(network):
        yield Finding(
            "windows",
            f"some blocks attend to {window} tokens; their keys and values are kept whole",
        )
    bakes = (
        f"as a {BAKES[kind][0]} with biases"
        if kind in BAKES
        else "no place for a vector in its weights"
    )
    hint = None if kind in BAKES else "give llama.cpp the vector: `densesteer vector export`"
    yield Finding("bake", bakes, hint=hint)
    ways = parallel_ways(network)
    yield Finding(
        "several Macs", f"{' and '.join(ways)} parallel" if ways else "mlx-lm cannot cut it"
    )


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
        version = macos_version()
        major = int(version.split(".")[0] or 0)
        old = major < 14
        remedy = "mlx needs macOS 14 or newer" if old else None
        hint = "from macOS 15 on mlx keeps a model's weights in memory" if major == 14 else None
        yield Finding("system", f"macOS {version}, {machine}", remedy, old, hint)
        if machine != "arm64":
            remedy = "mlx needs Apple silicon and a native (arm64) Python; under Rosetta reinstall Python"
            yield Finding("processor", machine, remedy, fatal=True)
    else:
        yield Finding("system", f"{platform.system()} {platform.release()}, {machine}")
    hint = "it emulates bfloat16: `densesteer convert --dtype float16` makes a faster model"
    yield Finding("chip", chip(), hint=hint if emulates_bfloat16() else None)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("memory", f"{memory / 2**30:.1f} GiB")
    free = shutil.disk_usage(Path.cwd()).free
    remedy = "a 1.5B model takes about 4 GB while it is converted" if free < 4e9 else None
    yield Finding("free disk", f"{free / 1e9:.1f} GB here", remedy)


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
    if metal:
        yield from _gpu()
    if mx.default_device() == mx.Device(mx.cpu) and sys.platform == "linux":
        yield _openblas()
    yield _self_check()


def _gpu() -> Iterator[Finding]:
    found = gpu()
    remedy = None
    if is_virtual(found):
        remedy = "a virtual machine's GPU: its speed and its rounding are not those of a Mac"
    kind = f"{found.get('device_name')} ({found.get('architecture')})"
    yield Finding("GPU", kind, remedy)
    limit = working_set(found) or 0
    hint = None
    if FOR_WEIGHTS * limit < 6.2e9:
        hint = "a 3B model in 16 bits (6.2 GB) does not fit; 4 bits (1.8 GB) do: convert --bits 4"
    yield Finding("working set", f"{limit / 2**30:.1f} GiB for the GPU", hint=hint)
    if rounds_to_tf32():
        yield Finding(
            "TF32",
            "float32 products are rounded to 10 bits",
            hint="MLX_ENABLE_TF32=0 computes them in full, to compare with another program",
        )


def _openblas() -> Finding:
    core = openblas_core()
    if core is None:
        return Finding(
            "OpenBLAS",
            "not loaded",
            "float32 is 20-40 times slower without it: apt-get install libopenblas0-pthread, then set "
            "LD_PRELOAD to its libopenblas.so.0",
        )
    flags = Path("/proc/cpuinfo").read_text().split()
    better = {"avx512vl": "SkylakeX", "avx2": "Haswell"}
    name = next((better[flag] for flag in better if flag in flags), None)
    if core == "Prescott" and name:
        return Finding(
            "OpenBLAS",
            "loaded, with the code for a Prescott of 2004",
            "float32 is 3-6 times slower than with the code for your processor: set "
            f"OPENBLAS_CORETYPE={name}",
        )
    return Finding("OpenBLAS", f"loaded, with the code for {core}")


def openblas_core() -> str | None:
    """Return the processor whose code the loaded OpenBLAS runs; ``None`` if none is loaded.

    An OpenBLAS that is older than the processor takes it for a Prescott, which has no AVX.
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
    try:
        error, limit = largest_error(), 4e-3 if rounds_to_tf32() else 1e-4
    except RuntimeError as failure:  # such as mx.compile without a C++ compiler
        reason = str(failure).splitlines()[0]
        remedy = "on Linux install a C++ compiler (g++)"
        return Finding("steering", f"fails: {reason}", remedy, fatal=True)
    # a strength that is wrong by 1 % is off by 9e-3; chunks of a prompt are off by 1e-3 under TF32
    if not error <= limit:
        remedy = "this mlx-lm does not fit; install the version that this release names"
        return Finding("steering", f"off by {error:.1e}", remedy, fatal=True)
    return Finding("steering", f"right on a tiny random model (largest error {error:.0e})")


def tiny_model(
    *, layers: int = 4, hidden: int = 64, vocabulary: int = 128, seed: int = 0
) -> "Model":
    """Return a random Qwen2 model of a few thousand float32 weights."""
    import mlx.core as mx
    from mlx_lm.models.qwen2 import Model, ModelArgs

    mx.random.seed(seed)
    arguments = ModelArgs(
        model_type="qwen2",
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=2 * hidden,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    model = Model(arguments)
    mx.eval(model.parameters())
    return model.eval()


def largest_error() -> float:
    """Steer a tiny random model; return the largest difference of its logits from a sum by hand.

    Two layers are steered, and the prompt is read in two chunks.
    """
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models.base import create_attention_mask

    from ..model.block import make_cache, unpatch
    from ..model.families import decoder_blocks
    from ..steering.steering import Steering
    from ..steering.vector import SteeringVector, VectorMeta

    model = tiny_model()
    tokens = mx.arange(12)[None]
    rng = np.random.default_rng(0)
    arrays = {layer: rng.normal(size=64).astype(np.float32) for layer in (1, 2)}
    vector = SteeringVector(arrays, VectorMeta(model="tiny", hidden_size=64, layer_count=4))
    cache = make_cache(model, Steering(vector, 2.0, (1, 2)))
    steered = mx.concatenate([model(tokens[:, :7], cache), model(tokens[:, 7:], cache)], axis=1)
    unpatch(model)
    h = model.model.embed_tokens(tokens)
    mask = create_attention_mask(h)
    for layer, block in decoder_blocks(model).items():
        h = block(h, mask, None)
        if layer in arrays:
            h = h + 2.0 * mx.array(arrays[layer])
    expected = model.model.embed_tokens.as_linear(model.model.norm(h))
    return float(mx.abs(steered - expected).max())


@click.command()
@click.option(
    "-m",
    "--model",
    shell_complete=completers.models,
    metavar="MODEL",
    help="Tell what works with this model, and why not.",
)
def doctor(model: str | None) -> None:
    """Check this machine: versions, device, memory, and that steering computes correctly.

    With -m it tells instead what can be done with a model, from its config.json alone. Exits with 1 if
    models cannot run, or this one.
    """
    wrong = fatal = 0
    for finding in examine() if model is None else examine_model(model):
        mark = "ok" if finding.remedy is None else "!!"
        click.echo(f"{mark}  {finding.name:<16}{finding.value}")
        if advice := finding.remedy or finding.hint:
            click.echo(f"    {'':<16}-> {advice}")
        if finding.remedy is not None:
            wrong, fatal = wrong + 1, fatal + finding.fatal
    click.echo(f"\n{count(wrong, 'problem')} found" if wrong else "\nnothing wrong")
    sys.exit(1 if fatal else 0)
