"""Grading: the answer that a response gives, and whether it is the gold answer. No mlx.

GSM8K: the last number. Tasks that ask for a box: the last ``\\boxed{}``, compared by math-verify
where it is installed (extra ``eval``), else as a string after the usual clean-up of MATH.
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
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, install_command

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
    - ``by_reference``: the verdict of the reference's string rule.
    - ``by_math_verify``: that of math-verify; ``None`` for the rule "number", without the extra
      ``eval``, without a box, and without a verdict in time.
    """

    correct: bool
    found: str | None
    by_reference: bool
    by_math_verify: bool | None


def grade(problem: "Problem", response: str) -> Grade:
    """Grade a response by the problem's rule.

    "number": the last match with a digit, compared as a number. The reference compares the last
    match as a string, without ``,``, ``$`` and a final ``.``. Its pattern also matches a lone
    ``$$`` or ``..``, and its 72.00 is not 72.

    "boxed": the content of the last ``\\boxed{}``. The verdict of math-verify on it counts; without
    one, the string rule.

    Raises:
        InputError: math-verify is installed but cannot be used.
    """
    if problem.rule == "number":
        return _grade_number(problem.answer, response)
    return _grade_boxed(problem.answer, response)


_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def _grade_number(gold: str, response: str) -> Grade:
    matches = [_strip_number(match) for match in _NUMBER.findall(response)]
    gold = _strip_number(gold)
    found = next((m for m in reversed(matches) if any(c.isdigit() for c in m)), None)
    return Grade(
        correct=found is not None and _same_number(found, gold),
        found=found,
        by_reference=bool(matches) and matches[-1] == gold,
        by_math_verify=None,
    )


def _strip_number(text: str) -> str:
    return text.strip().replace(",", "").replace("$", "").removesuffix(".")


def _same_number(found: str, gold: str) -> bool:
    try:
        return Decimal(found.rstrip(".")) == Decimal(gold)
    except InvalidOperation:
        return found == gold


def _grade_boxed(gold: str, response: str) -> Grade:
    found = last_boxed(response)
    if not found:
        return Grade(correct=False, found=None, by_reference=False, by_math_verify=None)
    by_reference = normalise(found) == normalise(gold)
    by_math_verify = agree(gold, found)
    correct = by_reference if by_math_verify is None else by_math_verify
    return Grade(correct, found, by_reference, by_math_verify)


_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{}``, or ``None`` if there is none or it is cut off.

    Braces nest; an escaped one, as of a set, is text.
    """
    _, found, text = text.rpartition("\\boxed")
    match = re.match(r"\s*\{", text)
    if not found or match is None:
        return None
    depth = 1
    for brace in _BRACE.finditer(text, match.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[match.end() : brace.start()].strip()
    return None


_REWRITES = (
    (r"\\[!,;:> ]|\\q?quad(?![a-zA-Z])|~", ""),  # spacing
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
