"""Fuzz the readers at length: scripts/fuzz --inputs 100000.

Each part of a reader's inputs runs in a process of its own, so that a crash of the interpreter is found
and named too. The table goes to standard output; the exit status is 1 if a fault was found.
"""

import argparse
import collections
import concurrent.futures
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

PART = 2500
KEEP = Path(__file__).parents[2] / "build" / "fuzz"


def main() -> int:
    from readers import READERS

    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="for each reader")
    parser.add_argument("--begin", type=int, default=0, help="the first input, to go on")
    parser.add_argument("--reader", action="append", choices=list(READERS), help="only this one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    names = options.reader or list(READERS)
    end = options.begin + options.inputs
    parts = [(name, at) for name in names for at in range(options.begin, end, PART)]
    found = {name: collections.Counter() for name in names}
    done, began = 0, time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(options.processes) as pool:
        jobs = {
            pool.submit(run_part, name, options.seed, at, min(at + PART, end)): name
            for name, at in parts
        }
        try:
            for job in concurrent.futures.as_completed(jobs):
                found[jobs[job]] += job.result()
                done += 1
                print(
                    f"\r{done}/{len(parts)} parts, {time.monotonic() - began:.0f} s  ",
                    end="", file=sys.stderr, flush=True,
                )  # fmt: skip
        except KeyboardInterrupt:
            for job in jobs:
                job.cancel()
            print("\ninterrupted: the parts that ended are below", file=sys.stderr)
    print(file=sys.stderr)
    return tell(found)


def run_part(name: str, seed: int, begin: int, end: int) -> collections.Counter:
    """Run a part in another process; return what came out."""
    place = KEEP / f"{name}-{seed}-{begin}.at"
    KEEP.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        __file__,
        "--part",
        name,
        str(seed),
        str(begin),
        str(end),
        str(place),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    number = place.read_text().strip() if place.exists() else "none"
    place.unlink(missing_ok=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [""]
        return collections.Counter(
            {f"FAULT: process ended with {done.returncode} after input {number}: {last[0]}": 1}
        )
    return collections.Counter(json.loads(done.stdout.splitlines()[-1]))


def part(name: str, seed: int, begin: int, end: int, place: Path) -> None:
    """Run a part in this process, and print the counts as JSON."""
    from fuzzing import fuzz

    counts: collections.Counter[str] = collections.Counter()
    with place.open("wb", buffering=0) as reached:  # what a crash leaves
        for number, outcome in fuzz(name, seed, begin, end, KEEP):
            counts[outcome] += 1
            os.pwrite(reached.fileno(), f"{number:20}".encode(), 0)
    print(json.dumps(counts))


def tell(found: dict[str, collections.Counter]) -> int:
    """Print the table; return how to end."""
    faults = [
        (name, outcome)
        for name, counts in found.items()
        for outcome in counts
        if "FAULT" in outcome
    ]
    print(f"{'reader':20} {'inputs':>8} {'read':>8} {'refused':>8} {'faults':>7}")
    for name, counts in found.items():
        bad = sum(n for outcome, n in counts.items() if "FAULT" in outcome)
        refused = counts.total() - bad - counts["read"]
        print(f"{name:20} {counts.total():8} {counts['read']:8} {refused:8} {bad:7}")
    for name, outcome in faults[:50]:
        print(f"{name}: {outcome}")
    if faults:
        print(f"the faulty inputs are in {KEEP}", file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        part(sys.argv[2], *map(int, sys.argv[3:6]), Path(sys.argv[6]))
    else:
        raise SystemExit(main())
