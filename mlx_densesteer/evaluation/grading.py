"""Grading: the answer that a response gives, and whether it is the gold answer. No mlx.

GSM8K: the number in the last ``\\boxed{}``, else the last number. Tasks that ask for a box: the last
``\\boxed{}``, compared as a number where both are one, else by math-verify where it is installed
(extra ``eval``), else as a string after the usual clean-up of MATH.
Source: the evaluation protocol of the reference code of arXiv 2605.29247.

math-verify runs in a process of its own, which a timer kills and the next question starts again.
Its own guard, ``signal.alarm``, works in the main thread only, takes the caller's alarm, and does
not end a computation inside C, such as 9^{9^{9^{9}}}.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, install_command
from .numbers import Number, bare, last_number, read_number, read_only_number

if TYPE_CHECKING:
    from .tasks import Problem

SECONDS = 5  # CPU time of one verdict; wall time would depend on the machine's load
LONGEST = 2000  # characters; gold answers of the known tasks have less than a tenth
_MEMORY = 4 * 2**30
_SERVE = "from mlx_densesteer.evaluation.grading import serve; serve({})"


@dataclass(frozen=True)
class Grade:
    """The grade of a response.

    - ``correct``: the verdict that counts.
    - ``found``: the answer in the response, ``None`` without one.
    - ``by_reference``: the verdict of the reference's string rule, to the letter.
    - ``by_math_verify``: that of math-verify on the tidied answer; it does not count for two
      numbers. ``None`` for the rule "number", without the extra ``eval``, without a box, and
      without a verdict in time.
    """

    correct: bool
    found: str | None
    by_reference: bool
    by_math_verify: bool | None


def grade(problem: "Problem", response: str) -> Grade:
    """Grade a response by the problem's rule.

    "number": the number in the last box with one, else the last number of the response, compared
    by value. The reference compares the last match of its pattern as a string, without ``,``, ``$``
    and a final ``.``. The pattern also matches a lone ``$$`` or ``..``, its 72.00 is not 72, and
    its 9{,}500 is 500.

    "boxed": the content of the last box. Two numbers are compared by value. The verdict of
    math-verify counts for all else; without one, the string rule.

    Raises:
        InputError: math-verify is installed but cannot be used.
    """
    if problem.rule == "number":
        return _grade_number(problem.answer, response, problem.question)
    return _grade_boxed(problem.answer, response, problem.question)


def _same_number(gold: Number, found: Number, question: str) -> bool:
    """Tell whether both are equal; 7 dozen is 7 where the question speaks of dozens."""
    if found.scales and " ".join(found.scales) in question.lower():
        return found.equals(gold) or found.unscaled().equals(gold)
    return found.equals(gold)


def _grade_number(gold: str, response: str, question: str) -> Grade:
    box = last_boxed(response)
    found = (read_only_number(box) if box else None) or last_number(response)
    right = read_only_number(gold)
    matches = deque(_REFERENCE_NUMBER.finditer(response), maxlen=1)
    return Grade(
        correct=bool(found and right and _same_number(right, found, question)),
        found=found.text if found else None,
        by_reference=bool(matches) and _strip_number(matches[0][0]) == _strip_number(gold),
        by_math_verify=None,
    )


_REFERENCE_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def _strip_number(text: str) -> str:
    return text.strip().replace(",", "").replace("$", "").removesuffix(".")


def _grade_boxed(gold: str, response: str, question: str) -> Grade:
    found = last_boxed(response)
    if not found:
        return Grade(correct=False, found=None, by_reference=False, by_math_verify=None)
    by_reference = _same_string(gold, found)
    short = max(len(gold), len(found)) <= LONGEST
    plain_gold, plain = (bare(t) if short else t for t in (gold, found))
    by_math_verify = agree(plain_gold, plain)
    one, two = read_number(gold), read_number(found)
    if one and two and not ("=" in gold and "=" in found):  # x = 0 is not y = 0
        correct = _same_number(one, two, question)
    elif by_math_verify is not None:
        correct = by_math_verify and not _other_base(plain_gold, plain)
    else:
        correct = by_reference or _same_string(plain_gold, plain)
    return Grade(correct, found, by_reference, by_math_verify)


_BASED = re.compile(r"[0-9A-Za-z]+_\s*\{?\s*([0-9]+)\s*\}?")


def _other_base(gold: str, found: str) -> bool:
    """Tell whether both are numbers of a named base, and the bases differ, which math-verify does not see."""
    bases = [match[1] for text in (gold, found) if (match := _BASED.fullmatch(text.strip()))]
    return len(bases) == 2 and bases[0] != bases[1]


def _same_string(gold: str, answer: str) -> bool:
    if max(len(gold), len(answer)) > LONGEST:
        return gold == answer
    return normalise(gold) == normalise(answer)


_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:(\{)|(-?[0-9](?:[0-9.,/]*[0-9])?))|\\.|[{}]", re.DOTALL)
_EMPTY = re.compile(r"(?:\s|[{}$~]|\\[,;:!> ]|\\q?quad(?![a-zA-Z])|\\(?:text|mbox|mathrm)\s*\{)*")


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last complete ``\boxed{}`` that is not empty, or ``None``.

    "Last" is the one that begins last. Braces nest; an escaped one, as of a set, is text. ``\fbox``
    and ``\boxed 5`` are boxes too. The time is linear in the text.
    """
    if "box" not in text:
        return None
    opened: list[int | None] = []  # where the content of a box begins; None for another brace
    last: tuple[int, int] | None = None
    for match in _BOX.finditer(text):
        if match[2]:
            first, end = match.span(2)
        elif match[0] == "}":
            first, end = opened.pop() if opened else None, match.start()
        else:
            if match[1] or match[0] == "{":
                opened.append(match.end() if match[1] else None)
            continue
        later = first is not None and (last is None or first > last[0])
        if later and not _EMPTY.fullmatch(text, first, end):
            last = first, end
    return text[slice(*last)].strip() if last else None


def stated_answer(response: str) -> str | None:
    """Return the answer that a response marks as its last, or ``None`` without a mark.

    The mark is GSM8K's ``#### 32`` in the last line, else the last box. Equal answers are equal texts: a
    number by its value (9,500.0 is ``9500``, 1/2 is ``0.5``, 50% is ``50``), another answer by ``normalise``.
    """
    last = response.rstrip().rpartition("\n")[2].strip()
    line = last[4:] if last.startswith("####") and not _HEADING.match(last) else ""
    box = last_boxed(response) or ""
    for marked in (line, box):
        if len(marked) <= LONGEST and (number := read_number(marked)):
            return _written(number)
    return normalise(bare(box)) or None if len(box) <= LONGEST else None


_HEADING = re.compile(r"####\s*\d+\.\s*[^\W\d]")  # "#### 1. Setup" is a heading


def _written(number: Number) -> str:
    """Write the value of a number: in decimals if they end, else as a fraction."""
    value = number.value
    if not isinstance(value, Fraction):
        return str(value)
    if number.percent and 0 < abs(value) < 1:  # as ``Number.equals`` reads it
        value /= 100
    decimals = f"{Decimal(value.numerator) / value.denominator:f}"
    return decimals if Fraction(decimals) == value else str(value)


_REWRITES = (
    (r"(\\\\)|\\[!,;:> ]|\\q?quad(?![a-zA-Z])|~", r"\1"),  # spacing, not a new row
    (r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\\$|\$", ""),
    (r"\\?%", ""),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree", ""),
    (r"(?<=[0-9}\s])\s*\\(?:text|mbox)\{[^{}]*\}(?:\^\{?\d\}?)?\s*$", ""),  # a unit
    (r"\\(?:text|mbox|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1"),
    (r"^\s*[a-zA-Z]\s*(?:=|\\in(?![a-zA-Z]))\s*", ""),  # x = 5
    (r"(?<![0-9])\.(?=[0-9])", "0."),
    (r"(\.[0-9]*?)0+(?![0-9])", r"\1"),
    (r"\.(?![0-9])", ""),
    (r"\s+", ""),
    (r"\\sqrt([0-9a-zA-Z])", r"\\sqrt{\1}"),
    (r"\\frac([0-9])([0-9])", r"\\frac{\1}{\2}"),
    (r"\\frac([0-9])\{", r"\\frac{\1}{"),
    (r"(\\frac\{[^{}]*\})([0-9])", r"\1{\2}"),
    (r"^(-?)([0-9]+)/([0-9]+)$", r"\1\\frac{\2}{\3}"),
    (r"^(-?)0+(?=[0-9])", r"\1"),
)
_THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")


def normalise(answer: str) -> str:
    """Return an answer in LaTeX in one form of typesetting.

    It has no spacing, ``\\left``, degrees, currency, percent, unit after a number, ``\\text``,
    variable before ``=``, separators of thousands, or zeros around a number, and one kind of
    fractions.
    """
    for pattern, new in _REWRITES:
        answer = re.sub(pattern, new, answer)
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


def agree(gold: str, answer: str) -> bool | None:
    """Return whether two answers in LaTeX are the same by math-verify; ``None`` is no verdict.

    It gives no verdict if it is not installed (extra ``eval``), an answer is too long, or the time
    is up. May be called from any thread.

    Raises:
        InputError: math-verify is installed but cannot be imported.
    """
    if max(len(gold), len(answer)) > LONGEST or not has_math_verify():
        return None
    return _judge.ask(gold, answer)


def has_math_verify() -> bool:
    """Return whether math-verify is installed."""
    return importlib.util.find_spec("math_verify") is not None


class _Judge:
    """The process of math-verify: the first question starts it, and the next one after a kill."""

    def __init__(self, seconds: int = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self._stop)

    def ask(self, gold: str, answer: str) -> bool | None:
        with self._lock:
            try:
                process = self._process or self._start()
                reply = _exchange(process, [gold, answer])
            except BaseException:  # Ctrl-C: the next question must not read this one's reply
                self._stop()
                raise
            if not reply:
                self._stop()
            return json.loads(reply) if reply else None

    def _start(self) -> "subprocess.Popen[str]":
        path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE.format(self._seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
            start_new_session=True,  # Ctrl-C does not reach it
        )
        if not self._process.stdout.readline():
            error = self._process.stderr.read().strip().splitlines()[-1:] or ["no message"]
            raise InputError(
                f"math-verify is installed but does not start ({error[0]}). Install it "
                f"again: {install_command('eval')}"
            )
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                with contextlib.suppress(BrokenPipeError):  # unsent input
                    stream.close()


def _exchange(process: "subprocess.Popen[str]", question: list[str]) -> str:
    try:
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return ""
    return process.stdout.readline()


_judge = _Judge()


def serve(seconds: int) -> None:
    """Answer each line, JSON ``[gold, answer]``, with ``true`` or ``false``."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()  # it warns that it has no timeout
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  (its pipe is not read)
    os.dup2(sys.stderr.fileno(), 2)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with contextlib.suppress(ValueError, OSError):  # macOS may refuse
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    print(flush=True)  # ready
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        boxes = (f"\\boxed{{{_escape_percent(text)}}}" for text in json.loads(line))
        gold, answer = (
            parse(box, [LatexExtractionConfig()], parsing_timeout=None) for box in boxes
        )
        verdict = verify(gold, answer, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(bool(verdict)), flush=True)


def _escape_percent(text: str) -> str:
    """Escape each bare ``%``, which begins a comment in LaTeX."""
    return text.replace("\\%", "%").replace("%", "\\%")
