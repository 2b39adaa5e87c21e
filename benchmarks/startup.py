"""Time to the first token of a whole process, `densesteer generate` against `mlx_lm generate`."""

import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from script import main
from servers import model_folder

from mlx_densesteer.bench.figures import (
    Figure,
    Measurement,
    Tell,
    alternate,
    quiet,
    ratio,
    spread,
    timed,
)
from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.demo.problems import held_out

TOKENS = "10"
RULE = b"=" * 10 + b"\n"  # mlx_lm prints it before it begins
OURS = (sys.executable, "-m", "mlx_densesteer")
SHORT = {
    "import_seconds": (sys.executable, "-c", "import mlx_densesteer"),
    "help_seconds": (*OURS, "--help"),
}


def run(
    subject: Subject, *, rounds: int = 5, seconds: float = 0.0, tell: Tell = quiet
) -> Measurement:
    """Start processes in turn and wait for the first byte of text on their standard output.

    `densesteer generate`, the same with a vector, `python -m mlx_lm generate`, and this once more
    as the noise; same model folder, same prompt, greedy. A ratio is densesteer's seconds over
    mlx-lm's: below 1 is sooner. One start of each beforehand puts the files into the system's
    cache. ``import_seconds`` is `import mlx_densesteer` in a new process, ``help_seconds`` is
    `densesteer --help`.

    Args:
        rounds: starts of each side.
        seconds: after which no new round begins; 0 is no limit.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model, prompt = str(model_folder(subject, place)), held_out(1)[0].question
        vector = str(subject.vector.save(place / "random.npz"))
        ours = [*OURS, "generate", "-m", model, "-n", TOKENS]
        steered = ["-v", vector, "-l", str(subject.model.layer_count // 2), "-s", "0.1"]
        stock = [sys.executable, "-m", "mlx_lm", "generate", "--model", model, "--temp", "0"]
        stock += ["--max-tokens", TOKENS, "--prompt", prompt]
        commands = [[*ours, prompt], [*ours, *steered, prompt], stock]
        sides = [_Command(words) for words in (*commands, stock)]
        for side in sides[:3]:
            side.first_token()
        works = [side.first_token for side in sides]
        plain, with_vector, theirs, again = alternate(
            works, rounds=rounds, seconds=seconds, tell=tell
        )
    short = [lambda words=words: timed(lambda: _silently(words)) for words in SHORT.values()]
    times = alternate(short, rounds=max(2, rounds))
    noise, same = ratio(again, theirs), sides[0].text == sides[2].text
    medians = [f"{spread(of)['median']:.2f} s" for of in (plain, with_vector, theirs)]
    return Measurement(
        [
            Figure.of(
                "first_token_ratio",
                "seconds to the first token, ours / mlx_lm",
                ratio(plain, theirs),
                noise,
                f"ours {medians[0]}, mlx_lm {medians[2]}",
            ),
            Figure.of(
                "first_token_steered_ratio",
                "  ours steered / mlx_lm",
                ratio(with_vector, theirs),
                noise,
                f"ours {medians[1]}",
            ),
            Figure("", "unsteered: the text is mlx_lm's", same),
            *(
                Figure.of(key, f"seconds of `python {shlex.join(SHORT[key][1:])}`", spread(of))
                for key, of in zip(SHORT, times, strict=True)
            ),
        ]
    )


def _silently(command: tuple[str, ...]) -> None:
    subprocess.run(command, check=True, capture_output=True)


class _Command:
    """A command that writes text, and the text of its last run."""

    def __init__(self, words: list[str]):
        self._words = words
        self.text = ""

    def first_token(self) -> float:
        """Run it; return the seconds from its start to the first byte of text.

        Raises:
            subprocess.CalledProcessError: it failed; its message is the error's ``stderr``.
        """
        seen, first = b"", None
        with tempfile.TemporaryFile() as errors:
            began = time.perf_counter()
            with subprocess.Popen(self._words, stdout=subprocess.PIPE, stderr=errors) as process:
                try:
                    while piece := process.stdout.read1():
                        seen += piece
                        if first is None and seen.removeprefix(RULE) and not RULE.startswith(seen):
                            first = time.perf_counter() - began
                except BaseException:
                    process.kill()
                    raise
            errors.seek(0)
            said = errors.read().decode("utf-8", "replace")
        if process.returncode or first is None:
            raise subprocess.CalledProcessError(process.returncode, self._words, stderr=said)
        text = seen.removeprefix(RULE).split(b"\n" + RULE)[0]
        self.text = text.decode("utf-8", "replace").strip()
        return first


if __name__ == "__main__":
    main(run)
