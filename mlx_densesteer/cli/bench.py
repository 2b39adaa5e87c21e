"""``densesteer bench``."""

import json
import shlex
import sys
from collections.abc import Callable

import click

from ..text import Live, note
from . import completers


@click.command()
@click.option("-m", "--model", default="demo", show_default=True, metavar="MODEL", shell_complete=completers.models,
              help="A model folder, a Hub id, or demo (embedded).")  # fmt: skip
@click.option("--quick", is_flag=True, help="Fewer rounds: a look, no measurement.")
@click.option("--draft", metavar="MODEL", shell_complete=completers.models, help="A draft model for `speculative`. [default: the "
              "model's own first blocks]")  # fmt: skip
@click.option("--pairs", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
              help="Contrastive pairs for `extract`. [default: of the demo's problems]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
def bench(model: str, quick: bool, draft: str | None, pairs: str | None, as_json: bool,
          names: tuple[str, ...]) -> None:  # fmt: skip
    """Measure what steering costs and saves on this machine, against stock mlx-lm.

    NAME is one of decode, generation, startup, batch, resteer, speculative, extract, sweep; without
    one all of them run: about two minutes for demo, twelve for a model of half a billion parameters
    on two cores. Figures are ratios within one run. Ctrl-C prints what was measured so far.
    """
    from ..bench.figures import Measurement
    from ..bench.subject import Subject
    from ..bench.suite import chosen, document, header, measure, report

    wanted = chosen(names)
    subject = Subject.load(model)
    head = header(subject, shlex.join(["densesteer", *sys.argv[1:]]))
    given = {"speculative": {"draft": draft}, "extract": {"pairs": pairs}}
    found: dict[str, Measurement] = {}
    live = Live()
    missing = "not asked for"

    def teller(name: str) -> Callable[[str], None]:
        live.show(f"{name} ...")
        return lambda message: live.show(f"{name}: {message}")

    try:
        for name, one in measure(subject, wanted, quick=quick, options=given, tell=teller):
            found[name] = one
            live.clear()
            why = one.details.get("reason")
            note(f"{name} {f'not measured: {why}' if why else 'done'} in "
                 f"{one.details['wall_seconds']:.0f} s ({len(found)} of {len(wanted)})")  # fmt: skip
    except KeyboardInterrupt:
        missing = "interrupted"
        raise
    finally:  # an interrupt or a fault loses nothing that was measured
        live.clear()
        if as_json:
            click.echo(json.dumps(document(found, head, missing), allow_nan=False))
        else:
            click.echo("\n".join(report(found, head)))
