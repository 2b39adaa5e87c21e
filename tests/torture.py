"""Kill, starve and race every command that writes a file.

    scripts/torture kills --runs 300 [--begin 100] [--only extract]

After each run the target must be whole, what it was before, or absent; after one more run that may end,
nothing else may be left. Run N is the same whenever it is run, so a count can be continued.
"""

import argparse
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlx_densesteer import demo
from mlx_densesteer.evaluation.journal import Journal
from mlx_densesteer.files import parse_object, read_jsonl
from mlx_densesteer.steering.formats import import_vector
from mlx_densesteer.steering.vector import SteeringVector

PAIRS = Path(__file__).parents[1] / "scripts" / "demo-pairs.jsonl"
SHORT = ["-n", "8", "--limit", "4"]
KILLS = 5  # of one command in one folder, before it may end


def check_folder(folder: Path) -> None:
    from mlx_densesteer.model.config import recorded
    from mlx_densesteer.model.weights import read_tensors

    read_tensors(folder)
    parse_object((folder / "config.json").read_bytes(), "config.json")
    if not recorded(folder):
        raise ValueError("no densesteer.json")


def check_gguf(path: Path) -> None:
    from gguf import GGUFReader

    GGUFReader(path)


def check_function(path: Path) -> None:
    import mlx.core as mx

    mx.import_function(str(path))


def check_session(path: Path) -> None:
    from mlx_densesteer.generation.session_file import read_session

    read_session(path, 576)


def check_journal(path: Path) -> None:
    """The header may be missing where the kill came first; no line but the last may be cut off."""
    lines = path.read_bytes().rpartition(b"\n")[0].splitlines()
    header = parse_object(lines[0], "header") if lines else {"format": "none"}
    if lines:
        with tempfile.TemporaryDirectory() as elsewhere:  # its own disk may be full
            copy = Path(shutil.copyfile(path, Path(elsewhere) / "copy"))
            with Journal(copy, header):
                pass


def check_lines(path: Path) -> None:
    if path.stat().st_size:  # all pairs may have been rejected
        read_jsonl(path)


def check_json(path: Path) -> None:
    parse_object(path.read_bytes(), "table")


def check_picture(path: Path) -> None:
    data = path.read_bytes()
    if not (data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82")):
        raise ValueError("no whole picture")


Check = Callable[[Path], object]


@dataclass(frozen=True)
class Writer:
    """A command, run in an empty folder, and how each of its files is checked."""

    command: list[str]
    targets: dict[str, Check]
    input: str | None = None
    force: bool = True  # replaces what is there; others go on with it

    def start(self, folder: Path, limit: int | None = None) -> subprocess.Popen:
        """Start the command; ``limit`` is the size that no file may exceed, in bytes."""

        def starve() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        command = [*self.command, *(["--force"] if self.force else [])]
        process = subprocess.Popen(
            [sys.executable, "-m", "mlx_densesteer", *command], cwd=folder, text=True,
            stdin=subprocess.PIPE if self.input else subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=None if limit is None else starve,
        )  # fmt: skip
        if self.input:
            process.stdin.write(self.input)
            process.stdin.close()
            process.stdin = None
        return process


WRITERS = {
    "export": Writer(["vector", "export", "demo", "-o", "v.safetensors"], {"v.safetensors": lambda p: import_vector(p, model="x")}),
    "control": Writer(["vector", "export", "demo", "-o", "v.gguf"], {"v.gguf": lambda p: import_vector(p, model="x")}),
    "extract": Writer(["extract", "-m", "demo", str(PAIRS), "-o", "v.npz"], {"v.npz": SteeringVector.load}),
    "chat": Writer(["chat", "-m", "demo", "-n", "8"], {"talk.json": check_session}, "Ben has 2 stones.\n/save talk.json\n", False),
    "convert": Writer(["convert", str(demo.MODEL), "-o", "made", "--bits", "none"], {"made": check_folder}),
    "bake": Writer(["bake", "-m", "demo", "-v", "demo", "-o", "baked"], {"baked": check_folder}),
    "bake-gguf": Writer(["bake", "-m", "demo", "-v", "demo", "--format", "gguf", "-o", "b.gguf"], {"b.gguf": check_gguf}),
    "function": Writer(
        ["export-function", "-m", "demo", "-v", "demo", "-o", "f.mlxfn", "--capacity", "32", "--chunk", "4"],
        {"f.mlxfn": check_function},
    ),
    "eval": Writer(["eval", "-m", "demo", "demo", *SHORT, "-o", "e.jsonl"], {"e.jsonl": check_journal}, force=False),
    "pairs": Writer(
        ["pairs", "-m", "demo", "demo", "-n", "60", "--limit", "4", "-o", "p.jsonl"],
        {"p.jsonl": check_lines, "p.rejected.jsonl": check_lines, "p.jsonl.solved.jsonl": check_journal,
         "p.jsonl.rewrites.jsonl": check_journal},
        force=False,
    ),
    "sweep": Writer(
        ["sweep", "-m", "demo", "-v", "demo", "demo", "-l", "3", "-s", "20%", *SHORT, "-o", "s"],
        {"s": lambda folder: check_sweep(folder)}, force=False,
    ),
}  # fmt: skip


def check_sweep(folder: Path) -> None:
    for path in folder.iterdir():
        kind = {".png": check_picture, ".json": check_json, ".jsonl": check_journal}
        if not path.name.startswith("."):
            kind[path.suffix](path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/torture", description=__doc__)
    parser.add_argument("what", choices=["kills", "disk", "writers"])
    parser.add_argument("--runs", type=int, default=100, help="kills, or races, in all")
    parser.add_argument("--begin", type=int, default=0, help="the first run, to go on")
    parser.add_argument("--only", action="append", choices=list(WRITERS))
    options = parser.parse_args()
    names = options.only or list(WRITERS)
    if options.what == "disk":
        runs = ((name, lambda name=name: disk(name)) for name in names)
    else:
        one, each = (kill, KILLS) if options.what == "kills" else (race, 1)
        runs = (
            (names[n % len(names)], lambda n=n: one(names[n % len(names)], n))
            for n in range(options.begin // each, -(-(options.begin + options.runs) // each))
        )
    return tell(runs)


def tell(runs: Iterable[tuple[str, Callable[[], Iterable[str]]]]) -> int:
    """Run them, and print a line for each writer: what happened, and how often."""
    counts: dict[str, dict[str, int]] = {}
    total = 0
    try:
        for name, run in runs:
            for outcome in run():
                total += 1
                row = counts.setdefault(name, {})
                row[outcome] = row.get(outcome, 0) + 1
                if outcome.startswith("FAULT"):
                    print(f"{name}: {outcome}", flush=True)
            print(f"\r{total} runs ", end="", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("\ninterrupted: what was done is below", file=sys.stderr)
    print(file=sys.stderr)
    for name, row in counts.items():
        print(
            f"{name:12} " + ", ".join(f"{n} {outcome[:60]}" for outcome, n in sorted(row.items()))
        )
    faults = sum(n for row in counts.values() for outcome, n in row.items() if "FAULT" in outcome)
    print(f"{total} runs, {faults} faults")
    return bool(faults)


@contextmanager
def empty_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        yield Path(folder)


def digest(path: Path) -> str:
    """Return a digest of a file, or of a folder's files and their names; "" for none."""
    if not path.exists():
        return ""
    found = hashlib.sha256()
    for one in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if one.is_file():
            found.update(one.name.encode() + one.read_bytes())
    return found.hexdigest()


def faults(writer: Writer, folder: Path, before: dict[str, str]) -> list[str]:
    """Return what is wrong with the targets, which had the digests ``before``."""
    found = []
    for name, check in writer.targets.items():
        path = folder / name
        if path.exists() and digest(path) != before.get(name):
            try:
                check(path)
            except Exception as error:
                found.append(f"FAULT: {name} is not whole: {type(error).__name__}: {error}")
    return found


def left_over(writer: Writer, folder: Path) -> list[str]:
    return sorted(name for name in names_in(folder) if ".partial-" in name)


def names_in(folder: Path) -> set[str]:
    """Return the names of all files and folders; those that vanish meanwhile may be missing."""
    return {name for _, folders, files in os.walk(folder) for name in (*folders, *files)}


def ends_well(writer: Writer, folder: Path) -> list[str]:
    """Run the command to its end; return what is wrong then."""
    process = writer.start(folder)
    text = process.communicate()[0]
    if process.returncode:
        return [f"FAULT: the next run ends with {process.returncode}: {text[-300:]}"]
    missing = [name for name in writer.targets if not (folder / name).exists()]
    found = faults(writer, folder, {}) + [f"FAULT: {name} is missing" for name in missing]
    return found + [f"FAULT: {name} is left over" for name in left_over(writer, folder)]


_whole: dict[str, tuple[float, Path]] = {}


def whole(name: str) -> tuple[float, Path]:
    """Return how long the command takes, and a folder with what it writes."""
    if name not in _whole:
        folder = Path(tempfile.mkdtemp(prefix="torture-whole-"))
        began = time.monotonic()
        problems = ends_well(WRITERS[name], folder)
        if problems:
            raise SystemExit(f"{name}: {problems[0]}")
        _whole[name] = time.monotonic() - began, folder
    return _whole[name]


def kill(name: str, number: int) -> Iterator[str]:
    """Kill the command ``KILLS`` times in one folder, each at a random moment; then let it end.

    Half of the kills come at any moment of the run, half soon after it began to write.
    """
    writer, chance = WRITERS[name], random.Random(number)
    seconds, made = whole(name)
    with empty_folder() as folder:
        if chance.random() < 0.5:
            for one in made.iterdir():
                (shutil.copytree if one.is_dir() else shutil.copyfile)(one, folder / one.name)
        for _ in range(KILLS):
            before = {target: digest(folder / target) for target in writer.targets}
            there = names_in(folder)
            process = writer.start(folder)
            until = time.monotonic() + chance.uniform(0, seconds)
            if soon := chance.random() < 0.5:
                until = time.monotonic() + 10 * seconds
            while process.poll() is None and time.monotonic() < until:
                if soon and names_in(folder) - there:
                    time.sleep(chance.choice((0, 0.001, 0.01, 0.1)))
                    break
                time.sleep(0.001)
            ended = process.poll() is not None
            process.send_signal(signal.SIGKILL)
            process.communicate()
            left = ", something left over" if left_over(writer, folder) else ""
            moment = (
                "ended before" if ended else "killed " + ("as it wrote" if soon else "anywhere")
            )
            yield from faults(writer, folder, before) or [moment + left]
        yield from (one for one in ends_well(writer, folder) if one)


def disk(name: str, sizes: Iterable[float] = (0, 0.3, 0.9, 0.999)) -> Iterator[str]:
    """Run the command where no file can grow beyond a part of its size; then on a small disk."""
    writer = WRITERS[name]
    _, made = whole(name)
    files = [one for one in made.rglob("*") if one.is_file()]
    largest = max(one.stat().st_size for one in files)
    for part in sizes:
        with empty_folder() as folder:
            yield from starved(writer, folder, limit=int(part * largest))
    total = sum(one.stat().st_size for one in files)
    for part in (0.0, 0.5, 0.9):
        with empty_folder() as folder:
            size = max(4096, int(part * total))
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
            if (
                shutil.which("mount")
                and not subprocess.run(command, capture_output=True).returncode
            ):
                try:
                    yield from starved(writer, folder, limit=None)
                finally:
                    subprocess.run(["umount", str(folder)], check=True)


def starved(writer: Writer, folder: Path, *, limit: int | None) -> Iterator[str]:
    process = writer.start(folder, limit)
    text = process.communicate()[0]
    where = "a full disk" if limit is None else "a file that cannot grow"
    found = faults(writer, folder, {})
    found += [f"FAULT: {name} is left over" for name in left_over(writer, folder)]
    if "Traceback" in text or process.returncode not in (0, 1):
        found.append(f"FAULT: ends with {process.returncode}: {text[-400:]}")
    elif process.returncode and not any(
        words in text for words in ("Make room", "Choose another place", "of disk, but")
    ):
        found.append(f"FAULT: names no remedy: {text[-400:]}")
    elif not process.returncode:  # all files were small enough
        found += [
            f"FAULT: {name} is missing" for name in writer.targets if not (folder / name).exists()
        ]
    yield from found or [f"{'refused on' if process.returncode else 'fits on'} {where}"]


def race(name: str, number: int) -> list[str]:
    """Run the command twice at once; both must end well, or one say that the other is at work."""
    writer, chance = WRITERS[name], random.Random(number)
    with empty_folder() as folder:
        first = writer.start(folder)
        time.sleep(chance.choice((0, 0, 0.05, 0.3)))
        second = writer.start(folder)
        texts = [process.communicate()[0] for process in (first, second)]
        codes = first.returncode, second.returncode
        found = faults(writer, folder, {})
        found += [f"FAULT: {name} is left over" for name in left_over(writer, folder)]
        for code, text in zip(codes, texts, strict=True):
            if "Traceback" in text or (code and "another process" not in text):
                found.append(f"FAULT: ends with {code}: {text[-400:]}")
        if all(codes):
            found.append("FAULT: neither ended well")
        return found or [f"{'one gave way' if any(codes) else 'both ended well'}"]


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        status = main()
    finally:
        for _, folder in _whole.values():
            shutil.rmtree(folder, ignore_errors=True)
    raise SystemExit(status)
