"""``densesteer bench``."""

import json
import shlex
import sys
from collections.abc import Callable

import click

from ..text import Live, note
from .options import json_option, model_option

NAMES = ("decode", "generation", "batch")


@click.command()
@model_option(required=False, default="demo", show_default=True)
@click.option("--quick", is_flag=True, help="Fewer rounds: a first look, no measurement.")
@json_option
@click.argument("names", nargs=-1, type=click.Choice(NAMES), metavar="[NAME]...")
def bench(model: str, quick: bool, as_json: bool, names: tuple[str, ...]) -> None:
    """Measure what steering costs on this machine, against stock mlx-lm.

    NAME is one of decode, generation, batch; without one all of them run: about a minute for demo, a
    few minutes for a model of half a billion parameters on two cores. Figures are ratios within one
    run. Ctrl-C prints what was measured so far.
    """
    from ..bench.figures import Measurement
    from ..bench.subject import Subject
    from ..bench.suite import document, header, measure, report

    subject = Subject.load(model)
    head = header(subject, shlex.join(["densesteer", *sys.argv[1:]]))
    found: dict[str, Measurement] = {}
    live = Live()
    missing = "not asked for"

    def teller(name: str) -> Callable[[str], None]:
        live.show(f"{name} ...")
        return lambda message: live.show(f"{name}: {message}")

    try:
        for name, one in measure(subject, names, quick=quick, tell=teller):
            found[name] = one
            live.clear()
            reason = one.details.get("reason")
            outcome = f"not measured: {reason}" if reason else "done"
            seconds, number = one.details["wall_seconds"], len(set(names) or NAMES)
            note(f"{name} {outcome} in {seconds:.0f} s ({len(found)} of {number})")
    except KeyboardInterrupt:
        missing = "interrupted"
        raise
    finally:  # an interrupt or a fault loses nothing that was measured
        live.clear()
        if as_json:
            click.echo(json.dumps(document(found, head, missing), allow_nan=False))
        else:
            click.echo("\n".join(report(found, head)))
