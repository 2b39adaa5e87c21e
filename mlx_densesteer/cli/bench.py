"""``densesteer bench``."""

import json
import shlex
import sys
from collections.abc import Callable

import click

from . import completers
from .progress import Live
from .text import note


@click.command()
@click.option("-m", "--model", default="demo", show_default=True, metavar="MODEL", shell_complete=completers.models,
              help="A model folder, a Hub id, or demo (embedded).")  # fmt: skip
@click.option("--quick", is_flag=True, help="Fewer rounds: a look, no measurement.")
@click.option("--draft", metavar="MODEL", shell_complete=completers.models, help="A draft model for `speculative`. [default: the "
              "model's own first blocks]")  # fmt: skip
@click.option("--pairs", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
              help="Contrastive pairs for `extract`. [default: of the demo's problems]")  # fmt: skip
@click.option("--oracle", metavar="PYTHON",
              help="A Python with steering-vectors, to compare `extract` with it.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
def bench(model: str, quick: bool, draft: str | None, pairs: str | None, oracle: str | None,
          as_json: bool, names: tuple[str, ...]) -> None:  # fmt: skip
    """Measure what steering costs and saves on this machine, against stock mlx-lm.

    NAME is one of decode, generation, startup, batch, resteer, speculative, extract, sweep; without
    one all of them run: about two minutes for demo, twelve for a model of half a billion parameters
    on two cores. Figures are ratios within one run. Ctrl-C prints what was measured so far.
    """
    from ..bench.report import header, heading, lines
    from ..bench.suite import chosen, document, measure, table

    wanted = chosen(names)

    from ..bench.subject import Subject

    subject = Subject.load(model)
    head = header(subject, shlex.join(["densesteer", *sys.argv[1:]]))
    given = {"speculative": {"draft": draft}, "extract": {"pairs": pairs, "oracle": oracle}}
    found: dict[str, dict] = {}
    live = Live()
    missing, interrupt = "not asked for", None
    try:
        for name, result in measure(
            subject, wanted, quick=quick, options=given, tell=lambda name: _teller(live, name)
        ):
            found[name] = result
            live.clear()
            _tell_done(name, result, len(found), len(wanted))
    except KeyboardInterrupt as error:
        missing, interrupt = "interrupted", error
    finally:  # what was measured is not lost to a fault in what comes next
        live.clear()
        if as_json:
            click.echo(json.dumps(document(found, head, missing), allow_nan=False))
        else:
            click.echo("\n".join([*heading(head), "", *lines(table(found))]))
    if interrupt:
        raise interrupt


def _teller(live: Live, name: str) -> Callable[[str], None]:
    live.show(f"{name} ...")
    return lambda message: live.show(f"{name}: {message}")


def _tell_done(name: str, result: dict, done: int, of: int) -> None:
    details = result["details"]
    verdict = f"not measured: {details['reason']}" if "reason" in details else "done"
    note(f"{name} {verdict} in {details['wall_seconds']:.0f} s ({done} of {of})")
