"""Time to the first token of a whole process, `densesteer generate` against `mlx_lm generate`."""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx

from .. import demo
from ..demo.problems import held_out
from ..model.model import find
from ..steering.vector import SteeringVector, VectorMeta
from .report import Row, ratio
from .subject import Subject
from .timing import Tell, alternate, over, quiet, spread, timed

FIGURES = ("first_token_ratio", "first_token_steered_ratio", "import_seconds", "help_seconds")
SUITE = {"rounds": 5, "seconds": 25.0}
QUICK = {"rounds": 1}
TOKENS = 10  # one more than the brake holds back
RULE = b"=" * 10 + b"\n"  # mlx_lm prints it before it begins


def run(
    subject: Subject, *, rounds: int = 5, seconds: float = 0.0, tell: Tell = quiet
) -> dict[str, object]:
    """Start processes in turn and wait for the first byte of text on their standard output.

    `densesteer generate`, the same with a vector, that with `--no-brake`, `python -m mlx_lm generate`,
    and this once more as the null; same model folder, same prompt, greedy. A ratio is our seconds over
    mlx-lm's: below 1 we are sooner. The brake shows a steered text some tokens late. The files are in
    the system's cache after a first start of each. The vector carries the norms that
    `densesteer extract` records, as vectors do. ``import_seconds`` is
    ``import mlx_densesteer`` in a new process, ``help_seconds`` is `densesteer --help`.

    Args:
        rounds: starts of each side.
        seconds: then no new round is begun; 0 is no limit.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model, prompt = _folder(subject, place), held_out(1)[0].question
        file = _vector(subject).save(place / "random.npz")
        ours = [
            sys.executable, "-m", "mlx_densesteer", "generate", "-m", str(model), "-n", str(TOKENS)
        ]  # fmt: skip
        theirs = [
            sys.executable, "-m", "mlx_lm", "generate", "--model", str(model), "--max-tokens",
            str(TOKENS), "--temp", "0", "--prompt", prompt,
        ]  # fmt: skip
        steered = ["-v", str(file), "-l", str(subject.layer_count // 2), "-s", "0.1"]
        sides = [
            _Process([*ours, prompt]), _Process([*ours, *steered, prompt]),
            _Process([*ours, *steered, "--no-brake", prompt]), _Process(theirs), _Process(theirs),
        ]  # fmt: skip
        for side in sides[:4]:
            side.first_token()
        plain, with_vector, at_once, stock, again = alternate(
            [side.first_token for side in sides], rounds=rounds, seconds=seconds, tell=tell
        )
    short = _short_commands(rounds)
    ratios = {
        "plain": spread(over(plain, stock)),
        "steered": spread(over(with_vector, stock)),
        "steered_no_brake": spread(over(at_once, stock)),
        "null": spread(over(again, stock)),
    }
    return {
        "first_token_ratio": ratios["plain"]["median"],
        "first_token_steered_ratio": ratios["steered"]["median"],
        "import_seconds": short["import mlx_densesteer"]["median"],
        "help_seconds": short["densesteer --help"]["median"],
        "details": {
            "first_token": ratios,
            "seconds": {
                "densesteer": spread(plain),
                "densesteer_steered": spread(with_vector),
                "densesteer_steered_no_brake": spread(at_once),
                "mlx_lm": spread(stock),
            },
            "same_text": sides[0].text == sides[3].text,
            "short_commands": short,
        },
    }


def rows(result: dict) -> list[Row]:
    """Return the table's rows."""
    d = result["details"]
    first, taken, short = d["first_token"], d["seconds"], d["short_commands"]
    same = "same text" if d["same_text"] else "THE TEXTS DIFFER"
    return [
        ratio("seconds to the first token, ours / mlx_lm", first["plain"], first["null"],
              f"ours {taken['densesteer']['median']:.2f} s, mlx_lm {taken['mlx_lm']['median']:.2f} s; {same}"),
        ratio("  ours steered / mlx_lm", first["steered"], first["null"],
              f"ours {taken['densesteer_steered']['median']:.2f} s; the brake holds a few tokens back"),
        ratio("  ours steered, --no-brake / mlx_lm", first["steered_no_brake"], first["null"],
              f"ours {taken['densesteer_steered_no_brake']['median']:.2f} s"),
        *(Row(f"`{name}`", f"{of['median']:.2f} s", f"{of['low']:.2f}-{of['high']:.2f}")
          for name, of in short.items()),
    ]  # fmt: skip


class _Process:
    """A command that writes text, and the text of its last run."""

    def __init__(self, command: list[str]):
        self._command = command
        self.text = ""

    def first_token(self) -> float:
        """Run it; return the seconds from its start to the first byte of text.

        Raises:
            subprocess.CalledProcessError: it failed; its message is the error's ``stderr``.
        """
        seen, first = b"", None
        with tempfile.TemporaryFile() as errors:
            began = time.perf_counter()
            with subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=errors) as process:
                try:
                    while piece := process.stdout.read1():
                        seen += piece
                        if first is None and seen.removeprefix(RULE) and not RULE.startswith(seen):
                            first = time.perf_counter() - began
                except BaseException:
                    process.kill()
                    raise
            errors.seek(0)
            if process.returncode or first is None:
                message = errors.read().decode("utf-8", "replace")
                raise subprocess.CalledProcessError(
                    process.returncode, self._command, stderr=message
                )
        self.text = (
            seen.removeprefix(RULE).split(b"\n" + RULE)[0].decode("utf-8", "replace").strip()
        )
        return first


def _folder(subject: Subject, place: Path) -> Path:
    """Return a folder that both commands compute in the same dtype.

    The embedded model comes in bfloat16, which we compute in float32 on the CPU, and mlx-lm
    does not: there both get a copy in float32.
    """
    found = find(subject.name)
    if found != demo.MODEL or mx.default_device() != mx.Device(mx.cpu):
        return found
    copy = shutil.copytree(found, place / "demo-float32")
    weights = mx.load(str(copy / "model.safetensors"))
    floats = {name: array.astype(mx.float32) for name, array in weights.items()}
    mx.save_safetensors(str(copy / "model.safetensors"), floats, metadata={"format": "mlx"})
    return copy


def _vector(subject: Subject) -> SteeringVector:
    """Return the random vector with the metadata that an extracted one has."""
    meta = VectorMeta(
        model=subject.name, hidden_size=subject.model.args.hidden_size,
        layer_count=subject.layer_count, fingerprint=subject.fingerprint,
        residual_norms={str(layer): norm for layer, norm in subject.norms.items()},
    )  # fmt: skip
    return SteeringVector(subject.vector.layers, meta)


def _short_commands(rounds: int) -> dict[str, dict[str, float]]:
    commands = {
        "import mlx_densesteer": ["-c", "import mlx_densesteer"],
        "import mlx_lm": ["-c", "import mlx_lm"],
        "densesteer --help": ["-m", "mlx_densesteer", "--help"],
        "python -c pass": ["-c", "pass"],
    }

    def start(arguments: list[str]) -> float:
        command = [sys.executable, *arguments]
        return timed(lambda: subprocess.run(command, check=True, capture_output=True))

    sides = [lambda arguments=arguments: start(arguments) for arguments in commands.values()]
    taken = alternate(sides, rounds=max(2, rounds))
    return {name: spread(seconds) for name, seconds in zip(commands, taken, strict=True)}
