"""Run tests, benchmarks and a comparison of texts on this machine, and write a report to paste into an issue."""

import argparse
import datetime
import getpass
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_densesteer._version import __version__
from mlx_densesteer.model.machine import chip, macos_version

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "mac-report.md"
# The rooms that compute on the GPU.
ROOMS = ("tests/model", "tests/generation", "tests/export", "tests/server/test_engine.py")
LONGEST = 9_000  # characters of one part's output, the last ones; an issue takes 65,536
# Folders whose names may be private, and what follows them.
FOLDERS = r"(?:/Users|/home|/Volumes|(?:/private)?/var/folders)/[^\s'\"`,;:()\[\]]*"


class Part(NamedTuple):
    """One part of the report: a command, or a reason why there is none."""

    title: str
    command: Sequence[str] = ()
    reason: str = ""


class Outcome(NamedTuple):
    """What a part gave. ``status`` is its exit status, ``None`` without a command."""

    part: Part
    status: int | None
    seconds: float
    text: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="run every test")
    parser.add_argument("--quick", action="store_true", help="few tests, no real model")
    parser.add_argument(
        "--model", metavar="FOLDER", help="the real model; by default a fetched one"
    )
    options = parser.parse_args()
    model = options.model and str(Path(options.model).expanduser().resolve())
    if model is None and not options.quick:
        model = fetch()
    outcomes = [run(part) for part in parts(model, every=options.all, quick=options.quick)]
    known = {
        str(ROOT): ".",
        sys.executable: "python",
        **({model: Path(model).name} if model else {}),
    }
    FILE.write_text(scrub(report(outcomes), known), "utf-8")
    print(FILE)
    sys.exit(any(outcome.status for outcome in outcomes))


def fetch() -> str | None:
    """Return the folder of a real model in 4 bits; ``None`` if it cannot be had."""
    command = [ROOT / "scripts/fetch-test-model", "--bits", "4", "--dtype", "bfloat16"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return None if done.returncode else done.stdout.strip()


def parts(model: str | None, *, every: bool, quick: bool) -> list[Part]:
    """Return the parts of the report."""
    densesteer = [sys.executable, "-m", "mlx_densesteer"]
    which = [*ROOMS, "-m", "not slow and not checkpoint", "-q", "--tb=short"]
    if quick:
        which = ["tests/model/test_block.py", "-q"]
    if every:  # with no other option, so that two workers share them
        which = ["--all"]
    found = [
        Part("Environment", [*densesteer, "doctor"]),
        Part("Tests", ["scripts/test", *which]),
    ]
    bench = ["bench", "--quick"] if quick else ["bench"]
    sizes = ["--questions", "2", "--tokens", "16"] if quick else []
    for name in ["demo", *([model] if model else [])]:
        shown = "the demo" if name == "demo" else Path(name).name
        texts = [sys.executable, "benchmarks/texts.py", name, *sizes]
        found.append(
            Part(f"Speed against stock mlx-lm: {shown}", [*densesteer, *bench, "-m", name])
        )
        found.append(Part(f"Texts that should be equal: {shown}", texts))
    if model is None:
        found.append(Part("A real model", reason="left out, or it could not be fetched"))
    return found


def run(part: Part) -> Outcome:
    """Run a part's command in the clone; its output goes to standard error as it comes."""
    if not part.command:
        return Outcome(part, None, 0.0, part.reason)
    print(f"\n{part.title} ...", file=sys.stderr, flush=True)
    began, lines = time.monotonic(), []
    with subprocess.Popen(
        part.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:  # fmt: skip
        for line in process.stdout:
            sys.stderr.write(line)
            lines.append(line)
    return Outcome(part, process.returncode, time.monotonic() - began, "".join(lines))


def report(outcomes: Iterable[Outcome]) -> str:
    """Return the report as Markdown."""
    mac = sys.platform == "darwin"
    system = f"macOS {macos_version()}" if mac else f"{platform.system()}, which is no Mac"
    today = datetime.datetime.now().astimezone().date().isoformat()
    rows, sections = [], []
    for part, status, seconds, text in outcomes:
        told = {None: "not run", 0: "passed"}.get(status, f"**exit status {status}**")
        rows.append(f"| {part.title} | {told} | {seconds / 60:.1f} |")
        cut = "(the beginning was cut off)\n" if len(text) > LONGEST else ""
        body = f"{cut}{text[-LONGEST:].strip()}".replace("```", "'''")
        sections.append(f"## {part.title}\n\n```text\n{body}\n```\n")
    head = (
        f"# mlx-densesteer on {chip()}, {system}\n\n"
        f"{today}, version {__version__}, commit {commit()}. Made by `scripts/mac-report`.\n\n"
        "| part | outcome | minutes |\n| --- | --- | --- |\n"
    )
    return head + "\n".join([*rows, "", *sections])


def commit() -> str:
    """Return the commit of the clone, with a word if files were changed."""
    command = ["git", "describe", "--always", "--dirty=, changed", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def scrub(text: str, known: Mapping[str, str]) -> str:
    """Return a text without the names of the user and the machine, and without private paths.

    Args:
        known: paths, and what to write for each.
    """
    for path in sorted(known, key=len, reverse=True):
        text = text.replace(path, known[path])
    home = re.escape(str(Path.home()))
    text = re.sub(rf"{home}(?:/[^\s'\"`,;:()\[\]]*)?|{FOLDERS}", "(path)", text)
    host = platform.node()
    for name, word in (
        (host, "HOST"),
        (host.partition(".")[0], "HOST"),
        (getpass.getuser(), "USER"),
    ):
        if name:
            text = re.sub(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", word, text, flags=re.I)
    return text


if __name__ == "__main__":
    main()
