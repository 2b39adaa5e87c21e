"""One benchmark by itself: ``python benchmarks/NAME.py MODEL``. Its flags are ``run``'s arguments."""

import argparse
import inspect
import json
import re
import shlex
import signal
import sys
from importlib import import_module

from ..cli.progress import Live
from .report import REFUSALS, header, heading, lines, reason


def main(name: str) -> None:
    """Run the benchmark ``name`` with the arguments of the command line and print what it found."""
    module = import_module(f".{name}", __package__)
    options = vars(_parser(module).parse_args())
    model, as_json = options.pop("model"), options.pop("json")
    command = shlex.join(["python", *sys.argv])
    from .subject import Subject

    live = Live()
    try:
        subject = Subject.load(model)
        head = header(subject, command)
        result = module.run(subject, tell=live.show, **options)
    except REFUSALS as error:
        sys.exit(f"error: {reason(error)}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    live.clear()
    if as_json:
        print(json.dumps({**result, "header": head}, allow_nan=False))
    elif hasattr(module, "rows"):
        table = lines((name, row) for row in module.rows(result))
        print("\n".join([*heading(head), "", *table]))
    else:
        print("\n".join([*heading(head), "", *module.lines(result)]))


def _parser(module) -> argparse.ArgumentParser:
    """Make options of ``run``'s arguments; one without a default is a positional argument."""
    said = inspect.getdoc(module.run) or ""
    helps = dict(re.findall(r"^    (\w+): (.+(?:\n        .+)*)", said, re.MULTILINE))
    parser = argparse.ArgumentParser(
        description=f"{module.__doc__}\n\n{said.partition('Args:')[0]}".replace("``", "`"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a model folder, a Hub id, or demo")
    for name, parameter in list(inspect.signature(module.run).parameters.items())[1:]:
        if name == "tell":
            continue
        default = parameter.default
        about = {"help": " ".join(helps.get(name, "").split()).replace("%", "%%")}
        flag = f"--{name.replace('_', '-')}"
        if default is inspect.Parameter.empty:
            parser.add_argument(name, **about)
        elif isinstance(default, bool):
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=default, **about
            )
        else:
            kind = str if default is None else type(default)
            parser.add_argument(flag, type=kind, default=default, **about)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
