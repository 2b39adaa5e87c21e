"""Whether two answers in LaTeX are the same, by math-verify in a process of its own.

math-verify guards itself with ``signal.alarm`` and a Python handler. That works in the main
thread only, takes away the caller's alarm, and does not end a computation inside C, such as
9^{9^{9^{9}}}. Our process has the timer's default action, which is death, and is replaced.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

from ..errors import InputError, install_command

SECONDS = 5  # of CPU time for one verdict, so that a busy machine changes none
LONGEST = 2000  # characters; no gold answer of the known tasks has a tenth
_MEMORY = 4 * 2**30
_SERVE = "from mlx_densesteer.equivalence import serve; serve({})"


def agree(gold: str, answer: str) -> bool | None:
    """Return math-verify's verdict, or ``None`` where it has none.

    None: it is not installed (extra ``eval``), the answer is too long, or no verdict came in
    time. May be called from any thread.

    Raises:
        InputError: math-verify is installed but cannot be imported.
    """
    if max(len(gold), len(answer)) > LONGEST or not installed():
        return None
    return _judge.ask(gold, answer)


def installed() -> bool:
    """Return whether math-verify is there."""
    return importlib.util.find_spec("math_verify") is not None


class _Judge:
    """The process, begun by the first question and begun again after a death."""

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
            except BaseException:  # Ctrl-C: the reply to this question must not meet the next one
                self._stop()
                raise
            if not reply:
                self._stop()
            return json.loads(reply) if reply else None

    def _start(self) -> "subprocess.Popen[str]":
        path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE.format(self._seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
            start_new_session=True,  # Ctrl-C is for us, not for it
        )  # fmt: skip
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
                with contextlib.suppress(BrokenPipeError):  # what was not sent
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
    """Answer one question a line, JSON ``[gold, answer]``, with ``true``, ``false`` or death."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()  # it warns that it has no timeout
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  (nobody reads the pipe from here on)
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
    """A bare ``%`` begins a comment in LaTeX; in an answer it is a percent sign."""
    return text.replace("\\%", "%").replace("%", "\\%")
