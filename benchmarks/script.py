"""Run one benchmark by itself: its command-line options are the arguments of its ``run``."""

import argparse
import inspect
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from mlx_densesteer.bench.figures import Measurement, lines
from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.bench.suite import REFUSALS, header, heading
from mlx_densesteer.text import Live


def main(run: Callable[..., Measurement]) -> Measurement:
    """Call ``run`` with the arguments of the command line and print what it found."""
    options = vars(_parser(run).parse_args())
    model, as_json = options.pop("model"), options.pop("json")
    live = Live()
    try:
        subject = Subject.load(model)
        head = header(subject, shlex.join(["python", *sys.argv]))
        found = run(subject, tell=live.show, **options)
    except (*REFUSALS, subprocess.SubprocessError, ImportError) as error:
        sys.exit(f"error: {reason(error)}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        live.clear()
    if as_json:
        whole = found.document()
        whole |= {"header": head, "details": {**whole["details"], "options": options}}
        print(json.dumps(whole, allow_nan=False))
    else:
        name = Path(inspect.getfile(run)).stem
        table = lines([(name, found.lines)]) if found.lines else found.table
        print("\n".join([*heading(head), "", *table]))
    return found


def reason(error: BaseException) -> str:
    """Say in a line what went wrong; of a process that failed, what it said last."""
    said = getattr(error, "stderr", None) or str(error) or type(error).__name__
    said = said if isinstance(said, str) else said.decode("utf-8", "replace")
    last = said.strip().splitlines()[-1]
    if isinstance(error, subprocess.CalledProcessError):
        return f"{' '.join(error.cmd[1:4])}: exit code {error.returncode}: {last}"
    return last


def _parser(run: Callable[..., Measurement]) -> argparse.ArgumentParser:
    """Make options of the arguments of ``run``; one without a default is positional."""
    said = inspect.getdoc(run) or ""
    helps = dict(re.findall(r"^    (\w+): (.+(?:\n        .+)*)", said, re.MULTILINE))
    about = sys.modules[run.__module__].__doc__
    parser = argparse.ArgumentParser(
        description=f"{about}\n\n{said.partition('Args:')[0]}".replace("``", "`"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a model folder, a Hub id, or demo")
    for name, parameter in inspect.signature(run).parameters.items():
        if name in ("subject", "tell"):
            continue
        default, flag = parameter.default, f"--{name.replace('_', '-')}"
        extra = {"help": " ".join(helps.get(name, "").split()).replace("%", "%%")}
        if default is inspect.Parameter.empty:
            parser.add_argument(name, **extra)
            continue
        if isinstance(default, bool):
            extra["action"] = argparse.BooleanOptionalAction
        else:
            extra["type"] = str if default is None else type(default)
        parser.add_argument(flag, default=default, **extra)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
