"""The demo model's problems and solutions: arithmetic stories from templates. Pure Python.

A solution has one clause for each operation. Solutions differ only in how clauses are grouped into
steps, and a split clause says its result once more. The grouping is drawn anew for every solution
from a continuous range, and the question says nothing about it.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass

NAMES = (
    "Rosa", "Tom", "Mia", "Ben", "Lena", "Omar", "Ida", "Paul", "Nora", "Sam", "Eva", "Max", "Zoe",
    "Leo", "Ana", "Kim",
)  # fmt: skip
THINGS = (
    "shells", "apples", "stamps", "coins", "cards", "books", "beads", "pens", "eggs", "stones",
    "cups", "nuts",
)  # fmt: skip
BOXES = ("boxes", "bags", "jars", "rows")
GAINS = ("buys", "finds", "gets", "wins")
LOSSES = ("sells", "loses", "breaks", "gives away")
LINKS = ("Then", "Next", "Later")
LARGEST = 99


@dataclass(frozen=True)
class Clause:
    """One operation: the event, the calculation, and its result."""

    event: str
    sum: str
    result: int


@dataclass(frozen=True)
class DemoProblem:
    """A question, its answer, and the clauses of its solution."""

    id: str
    question: str
    answer: int
    clauses: tuple[Clause, ...]


def draw_problem(rng: random.Random, number: str = "") -> DemoProblem:
    """Return a random problem of 2 to 6 operations with numbers from 1 to 99."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    sentences, clauses = [], []
    if rng.random() < 0.5:
        boxes, each, kind = rng.randint(2, 9), rng.randint(2, 9), rng.choice(BOXES)
        value = boxes * each
        sentences.append(f"{name} has {boxes} {kind} with {each} {thing} in each.")
        clauses.append(Clause(f"{boxes} {kind} of {each}", f"{boxes}*{each}={value}", value))
    else:
        value = rng.randint(4, 60)
        sentences.append(f"{name} has {value} {thing}.")
    count = rng.randint(2, 6)
    while len(clauses) < count:
        sentence, clause = _draw_operation(rng, name, value)
        sentences.append(f"{rng.choice(LINKS)} {sentence}.")
        clauses.append(clause)
        value = clause.result
    sentences.append(f"How many {thing} does {name} have now?")
    return DemoProblem(number, " ".join(sentences), value, tuple(clauses))


def _draw_operation(rng: random.Random, name: str, value: int) -> tuple[str, Clause]:
    kinds = ["gain"] * (value < LARGEST) + ["loss"] * (value > 1)
    kinds += ["double"] * (2 * value <= LARGEST) + ["triple"] * (3 * value <= LARGEST)
    kinds += ["halve"] * (value % 2 == 0)
    kind = rng.choice(kinds)
    if kind == "gain":
        n, verb = rng.randint(1, min(30, LARGEST - value)), rng.choice(GAINS)
        said, result, term = f"{name} {verb} {n}", value + n, f"+{n}"
    elif kind == "loss":
        n, verb = rng.randint(1, min(30, value - 1)), rng.choice(LOSSES)
        said, result, term = f"{name} {verb} {n}", value - n, f"-{n}"
    elif kind == "halve":
        said, result, term = f"{name} keeps half", value // 2, "/2"
    else:
        factor = 2 if kind == "double" else 3
        said, result, term = f"the number {kind}s", value * factor, f"*{factor}"
    return said, Clause(said[0].upper() + said[1:], f"{value}{term}={result}", result)


def draw_solution(problem: DemoProblem, rng: random.Random) -> str:
    """Return a correct solution whose clauses are grouped at random.

    In 22 % of the solutions each clause is split into three steps with a probability drawn from
    U(0, 1). In the others each clause is merged with the one before with probability U(0, 1)^2.
    """
    split = rng.random() if rng.random() < 0.22 else 0.0
    merge = 0.0 if split else rng.random() ** 2
    text = ""
    for clause in problem.clauses:
        joint = "" if not text else " " if rng.random() < merge else "\n\n"
        if rng.random() < split:
            text += f"{joint}{clause.event}.\n\n{clause.sum}.\n\nThat makes {clause.result}."
        else:
            text += f"{joint}{clause.event}: {clause.sum}."
    return f"{text}\n#### {problem.answer}"


RESERVED = 500  # problems of either set that training leaves out


def held_out(count: int) -> list[DemoProblem]:
    """Return the first ``count`` problems of the evaluation set, which training leaves out."""
    return _draw("test", 20260, count)


def calibration(count: int) -> list[DemoProblem]:
    """Return problems for contrastive pairs: neither trained on nor in the evaluation set."""
    evaluated = {problem.question for problem in held_out(RESERVED)}
    return _draw("train", 20261, count, evaluated)


def reserved_questions() -> frozenset[str]:
    """Return every question that training must not contain."""
    return frozenset(p.question for p in (*held_out(RESERVED), *calibration(RESERVED)))


def _draw(split: str, seed: int, count: int, others: Iterable[str] = ()) -> list[DemoProblem]:
    """Return ``count`` problems with different questions, none of them in ``others``."""
    if not 0 <= count <= RESERVED:
        raise ValueError(f"{count} problems: expected at most {RESERVED}.")
    rng, seen = random.Random(seed), set(others)
    found: list[DemoProblem] = []
    while len(found) < count:
        problem = draw_problem(rng, f"demo-{split}-{len(found)}")
        if problem.question not in seen:
            seen.add(problem.question)
            found.append(problem)
    return found


def is_familiar(prompt: str) -> bool:
    """Tell whether a prompt looks like the problems that the demo model was trained on."""
    words = prompt.split()
    named = any(word.strip(".,?") in NAMES for word in words)
    return named and "How many" in prompt and any(word.strip(".,?").isdigit() for word in words)
