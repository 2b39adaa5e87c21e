"""Problems to solve: from the Hub, from a local JSONL file, or the embedded ones. No mlx.

GSM8K and the demo problems are asked as they are; the other tasks ask for a box.
Source: the evaluation protocol of the reference code of arXiv 2605.29247.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Literal

from ..demo import NAME
from ..errors import InputError, install_command
from ..files import read_jsonl
from .grading import last_boxed
from .numbers import read_only_number


@dataclass(frozen=True)
class Problem:
    """One problem: ``question`` as published, ``prompt`` as the user turn of the model.

    ``id`` is unique within the task and does not depend on the part that is loaded. ``rule`` says
    how a response is graded against ``answer`` (``grading.grade``).
    """

    id: str
    question: str
    prompt: str
    answer: str
    rule: Literal["number", "boxed"]


_PART = "-00000-of-00001.parquet"
_SOURCES = {  # data sets of the Hub: the file of each split, the default first
    "gsm8k": ("openai/gsm8k", {"test": f"main/test{_PART}", "train": f"main/train{_PART}"}),
    "math500": ("HuggingFaceH4/MATH-500", {"test": "test.jsonl"}),
    "amc23": ("math-ai/amc23", {"test": f"test{_PART}"}),
    "aime24": ("math-ai/aime24", {"test": f"test{_PART}"}),
    "olympiad": (
        "Hothan/OlympiadBench",
        {"test": "OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet"},
    ),
}
TASKS = (*_SOURCES, NAME)
_LONGEST = 10_000  # characters of a gold answer; those of the known tasks have less than 200


def load_task(
    name_or_path: str | Path,
    *,
    split: str | None = None,
    skip: int = 0,
    limit: int | None = None,
    revision: str | None = None,
) -> list[Problem]:
    """Return the problems of a task after the first ``skip``, at most ``limit`` of them.

    ``name_or_path`` is a name of ``TASKS`` or a JSONL file with the fields of one of these
    data sets. ``split`` is "test" (the default) or, for gsm8k and demo, "train".

    Raises:
        InputError: neither a task nor a file, no such split, an unreadable file, a record without
            the needed fields, a repeated problem, or no problem left.
        HubError: the file cannot be fetched from the Hub.
    """
    if skip < 0 or (limit is not None and limit < 1):
        raise InputError(f"skip {skip}, limit {limit}: expected skip >= 0 and limit >= 1.")
    name = str(name_or_path)
    if name in _SOURCES:
        problems = _from_hub(name, split, revision)
    elif revision is not None:
        raise InputError(f"{name}: only tasks of the Hub have a revision: {', '.join(_SOURCES)}.")
    elif name == NAME:
        problems = _embedded(split)
    else:
        problems = _from_file(Path(name_or_path).expanduser(), split)
    part = problems[skip:][:limit]
    if not part:
        raise InputError(f"{name}: has {len(problems)} problems, none after the first {skip}.")
    return part


def _from_hub(name: str, split: str | None, revision: str | None) -> list[Problem]:
    from ..model.hub import fetch_file  # slow to import: the shell asks for TASKS

    repo, files = _SOURCES[name]
    split = _choose_split(name, split, files)
    path = fetch_file(repo, files[split], revision=revision, kind="dataset")
    if path.suffix == ".parquet":
        records = _read_parquet(path, name)
    else:
        records = [record for _, record in read_jsonl(path)]
    prefix = f"{name}-{split}" if len(files) > 1 else name
    return [
        _problem(record, prefix, index, f"{repo}: record {index}")
        for index, record in enumerate(records)
    ]


def _embedded(split: str | None) -> list[Problem]:
    from ..demo.problems import RESERVED, calibration, held_out

    draw = {"test": held_out, "train": calibration}
    return [
        Problem(p.id, p.question, p.question, str(p.answer), "number")
        for p in draw[_choose_split(NAME, split, draw)](RESERVED)
    ]


def _from_file(path: Path, split: str | None) -> list[Problem]:
    if not path.exists():
        raise InputError(f"{path}: no such file, and no task; the tasks are {', '.join(TASKS)}.")
    if split is not None:
        raise InputError(f"{path}: a file has no split {split!r}; leave it out or name a task.")
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for line, record in read_jsonl(path):
        problem = _problem(record, path.stem, len(problems), f"{path}: line {line}")
        for kind, text in ("id", problem.id), ("question", problem.question):
            first = seen.setdefault(f"{kind} {text}", line)
            if first != line:
                raise InputError(
                    f"{path}: line {line}: has the {kind} of line {first}. Remove one; a problem "
                    "that is counted twice makes every interval too narrow."
                )
        problems.append(problem)
    return problems


def _choose_split(name: str, split: str | None, known: Iterable[str]) -> str:
    known = list(known)
    if split is not None and split not in known:
        raise InputError(f"{name}: has no split {split!r}; it has {' and '.join(known)}.")
    return split or known[0]


def _read_parquet(path: Path, name: str) -> list[dict[str, object]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f"{name}: its file on the Hub is Parquet, which needs pyarrow; or name a local JSONL file. "
            f"To get pyarrow: {install_command('eval')}"
        ) from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: is no Parquet file ({error}). Download it again.") from error


def _problem(record: Mapping[str, object], prefix: str, index: int, where: str) -> Problem:
    """Return the problem of a record, whose fields tell its data set."""
    problem = _recognise(record, prefix, index, where)
    if len(problem.answer) > _LONGEST:
        raise InputError(
            f"{where}: its answer has {len(problem.answer):,} characters, expected at most "
            f"{_LONGEST:,}: the final answer alone. Shorten or remove it."
        )
    return problem


def _recognise(record: Mapping[str, object], prefix: str, index: int, where: str) -> Problem:
    number = record.get("unique_id", record.get("id"))
    identifier = f"{prefix}-{index if number is None else number}"
    question = record.get("problem", record.get("question"))
    answer, final, solution = (record.get(k) for k in ("answer", "final_answer", "solution"))
    if not isinstance(question, str) or not question.strip():
        raise _unknown(record, where)
    if isinstance(final, list) and final and all(isinstance(a, str) for a in final):
        if isinstance(context := record.get("context"), str):
            question = f"{context}\n\n{question}"
        return Problem(identifier, question, _olympiad(question, record), _plain(final), "boxed")
    if answer is None and isinstance(solution, str):
        answer = last_boxed(solution)
    answer = _text(answer)
    if not answer:
        raise _unknown(record, where)
    if "problem" in record or "url" in record:
        return Problem(identifier, question, _ask_for_box(question), answer, "boxed")
    if isinstance(record["answer"], str):
        marker, gold = answer.rpartition("####")[1:]
        answer = _gold_number(gold) if marker else ""
    if not answer:
        raise InputError(
            f"{where}: its `answer` ends in {record['answer'][-20:]!r}, expected `#### ` and one number "
            "as in GSM8K, at most with a unit; a JSON number; or `problem` in the place of `question` "
            "for a boxed answer."
        )
    return Problem(identifier, question, question, answer, "number")


def _gold_number(gold: str) -> str:
    """Return a gold answer without its unit; empty if it is not one number."""
    number = read_only_number(gold)
    if number is None or number.value is None or gold.lstrip().startswith("("):
        return ""  # (500) is -500 to an accountant
    return gold.strip() if re.fullmatch(r"\s*-?[0-9.,]+\s*", gold) else number.text


def _unknown(record: Mapping[str, object], where: str) -> InputError:
    found = ", ".join(record) or "none"
    return InputError(
        f"{where}: fields {found}; expected, none of them empty, question and answer (GSM8K), "
        "problem and answer (MATH-500, AMC, AIME), or question and final_answer (OlympiadBench)."
    )


def _text(answer: object) -> str:
    """Write a gold answer as text, empty if there is none; AMC's 27.0 is 27."""
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    number = type(answer) in (int, float) and isfinite(answer)
    return str(answer).strip() if number or isinstance(answer, str) else ""


def _plain(answers: Iterable[str]) -> str:
    """Join OlympiadBench's final answers, without the dollars and the full stop around them."""
    return ", ".join(answer.replace("$", "").strip().removesuffix(".") for answer in answers)


def _ask_for_box(question: str, *remarks: str) -> str:
    request = (
        "Reason step by step. End with a line of the form\n"
        "Final Answer: \\boxed{...}\n"
        "with nothing but the answer between the braces."
    )
    return "\n".join([f"{question}\n\n{request}", *remarks])


def _olympiad(question: str, record: Mapping[str, object]) -> str:
    remarks = []
    if record.get("is_multiple_answer"):
        remarks.append("If there are several answers, separate them by commas in this one box.")
    if record.get("unit"):
        remarks.append(f"The unit is ${record['unit']}$; leave it out of the box.")
    return _ask_for_box(question, *remarks)
