"""Options that commands share, and what reads them without a model."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..steering.places import EXPECTED, POSITIONS, is_positions
from . import completers

if TYPE_CHECKING:
    from ..generation.speculation import Draft

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]


def _options(*options: Decorator) -> Decorator:
    """Return a decorator that adds ``options``; the help lists them in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


class _Model(click.ParamType):
    """A model's name; the error for a missing one says what it could be.

    A folder that is not there is told before mlx and transformers are imported, which takes a second.
    """

    name = "model"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from .. import demo
        from ..model.config import local_folder

        if value != demo.NAME:
            local_folder(value)
        return value

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
        return "Try -m demo, which is embedded, or a folder that `densesteer convert` wrote."


def model_option(*, required: bool = True, **settings: Any) -> Decorator:
    """Make ``-m/--model``; ``settings`` are more arguments of ``click.option``."""
    return click.option(
        "-m",
        "--model",
        required=required,
        type=_Model(),
        metavar="MODEL",
        shell_complete=completers.models,
        help="A folder that `densesteer convert` wrote, a Hub id, or demo (embedded).",
        **settings,
    )


def vector_option(remark: str, *, required: bool = False) -> Decorator:
    """Make ``-v/--vector``."""
    return click.option(
        "-v",
        "--vector",
        metavar="FILE",
        required=required,
        shell_complete=completers.vectors,
        help=f"Steering vector (.npz), or demo (embedded). {remark}".strip(),
    )


class StrengthType(click.ParamType):
    """A strength (lambda), a dose in per cent or a KL; the value is a ``steering.request.Amount``.

    Args:
        kl: a KL only, whose unit may be left out.
    """

    name = "strength"

    def __init__(self, kl: bool = False):
        self.kl = kl

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        from ..errors import InputError
        from ..steering.request import Amount

        try:
            return Amount.parse_kl(value) if self.kl else Amount.parse(value)
        except InputError as error:
            self.fail(str(error), param, ctx)


_lambda_option = click.option(
    "-s",
    "--strength",
    "--lambda",
    type=StrengthType(),
    metavar="STRENGTH",
    help="A dose in per cent of the residual stream (20%), lambda as a number (1.5), or a KL (0.1nats). "
    "Positive is towards dense, 0 is the unsteered model. [default: as trained or as a sweep recommended, else 20%]",
)
_kl_option = click.option(
    "--kl",
    type=StrengthType(kl=True),
    metavar="NATS",
    help="In place of -s: as strong as moves the model by this KL from the unsteered one, in nats per "
    "token. 0.05 to 0.2 is usual. Measured, unless `densesteer calibrate --write` stored it.",
)


def strength_option(command: Command) -> Command:
    """Add ``-s/--strength`` and ``--kl``; the command gets the one that is given as ``strength``."""

    @functools.wraps(command)
    def call(*given: Any, strength: object, kl: object, **options: Any) -> Any:
        if strength is not None and kl is not None:
            raise click.UsageError("--strength and --kl both say how strongly to steer: give one.")
        return command(*given, strength=strength if kl is None else kl, **options)

    return _options(_lambda_option, _kl_option)(call)


_BEST_LAYER = (
    "[default: as trained or as a sweep recommended, else one of the best that extraction measured]"
)


def layers_option(remark: str = _BEST_LAYER) -> Decorator:
    """Make ``-l/--layer``."""
    return click.option(
        "-l",
        "--layer",
        "layers",
        multiple=True,
        metavar="LAYERS",
        help=f"0-based: 14, 10-14, 10,12 or all; may be repeated. {remark}",
    )


def layer_sets_option(default: str) -> Decorator:
    """Make ``-l/--layers`` of a command that tries several settings."""
    return click.option(
        "-l",
        "--layers",
        multiple=True,
        metavar="LAYERS",
        help="0-based: 8,12-16 or all are layers alone, 8+12+16 is one setting of three layers together; "
        f"may be repeated. {default}",
    )


def read_think_budget(
    budget: int | None, late: object, hard: bool
) -> tuple[int | None, int | None]:
    """Return from how many tokens on a thought is steered otherwise, and where it is ended by force."""
    if budget is None and (late is not None or hard):
        name = "--think-budget-hard" if hard else "--think-strength"
        raise click.UsageError(f"{name}: add --think-budget N.")
    if hard and late is not None:
        raise click.UsageError("--think-budget-hard ends the thought: leave --think-strength out.")
    return (None, budget) if hard else (budget, None)


class PositionsType(click.Choice):
    """One of ``places.POSITIONS``."""

    def __init__(self) -> None:
        super().__init__(POSITIONS)

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        if not is_positions(value):
            self.fail(f"{value!r}: {EXPECTED}.", param, ctx)
        return value


def positions_option(
    default: str = "those of the vector, as trained or as a sweep recommended; else all",
) -> Decorator:
    """Make ``--positions``; ``default`` is told."""
    return click.option(
        "--positions",
        type=PositionsType(),
        help="At which tokens to steer; steps: those of the answer that end a step; think, answer: a "
        "reasoning model's thought, and what follows it; first:N: the first N of the answer, a thought's included. "
        f"[default: {default}]",
    )


STRICT = f"{__name__}.strict"  # its key in the context's ``meta``, where ``tell_fit`` finds it
strict_option = click.option(
    "--strict",
    is_flag=True,
    expose_value=False,
    callback=lambda ctx, option, value: ctx.meta.__setitem__(STRICT, value),
    help="Refuse a vector that was made for another model, instead of warning of it.",
)

# Read by ``read_steering`` in ``cli/steering.py``.
steering_options = _options(
    vector_option("Without it nothing is steered."),
    strength_option,
    layers_option(),
    positions_option(),
    strict_option,
)

think_options = _options(
    click.option(
        "--think-budget",
        type=click.IntRange(min=1),
        metavar="N",
        help="Of a reasoning model: from N tokens of thought on, steer it as --think-strength says.",
    ),
    click.option(
        "--think-strength",
        type=StrengthType(),
        metavar="S",
        help="As -s, for a thought beyond its budget. [default: a dose of 20% more]",
    ),
    click.option(
        "--think-budget-hard",
        is_flag=True,
        help="End the thought after --think-budget tokens by force; needs no vector.",
    ),
)

max_tokens_option = click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Length of an answer at most.",
)
system_option = click.option("--system", metavar="TEXT", help="System message.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
force_option = click.option("--force", is_flag=True, help="Replace the output if it exists.")


def out_option(
    metavar: str, help: str, *, required: bool = True, folder: bool = False, **settings: Any
) -> Decorator:
    """Make ``-o/--out``: a file, or with ``folder`` a folder."""
    kind = click.Path(file_okay=not folder, dir_okay=folder)
    return click.option(
        "-o", "--out", required=required, type=kind, metavar=metavar, help=help, **settings
    )


vector_out_option = out_option("FILE.npz", "File to write.")
no_nll_option = click.option(
    "--no-nll", is_flag=True, help="Leave out the NLL, which costs a pass over each answer."
)

# How one answer is generated.
answer_options = _options(
    max_tokens_option,
    click.option(
        "--temp",
        type=click.FloatRange(min=0),
        default=0.0,
        show_default=True,
        help="Temperature; 0 is greedy.",
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(0, 1, min_open=True),
        default=1.0,
        show_default=True,
        help="Sample among the likeliest tokens of this total probability.",
    ),
    click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="For a repeatable sample."),
    system_option,
    click.option(
        "--draft-model",
        metavar="MODEL",
        shell_complete=completers.models,
        help="Speculative decoding: a smaller model of the same family proposes tokens. The text "
        "stays the same at temperature 0, near ties aside.",
    ),
    click.option(
        "--draft-tokens",
        type=click.IntRange(1, 16),
        default=3,
        show_default=True,
        help="Tokens that the draft model proposes at a time.",
    ),
    click.option(
        "--no-brake",
        is_flag=True,
        help="Let an overdosed model repeat itself. Without this, repetition is cut off and the "
        "strength lowered.",
    ),
)

# Which problems of a task; read by ``run.load_problems``.
task_options = _options(
    click.option(
        "--split", metavar="NAME", help="Split of the task: test, or train where there is one."
    ),
    click.option(
        "--skip",
        type=click.IntRange(min=0),
        default=0,
        metavar="N",
        help="Leave out the first N problems.",
    ),
    click.option(
        "--limit", type=click.IntRange(min=1), metavar="N", help="Take at most N problems."
    ),
    click.option("--revision", metavar="REV", help="Branch, tag or commit of the data set."),
)

# How the problems of a task are answered.
run_options = _options(
    max_tokens_option,
    click.option(
        "--rows",
        type=click.IntRange(min=1),
        default=16,
        show_default=True,
        help="Answers that are generated together; more need more memory.",
    ),
    system_option,
)


def load_draft(name: str | None, tokens: int) -> "Draft | None":
    """Load the draft model; return ``None`` without a name."""
    if name is None:
        return None
    from ..generation.speculation import Draft
    from ..model.model import load

    return Draft(load(name), tokens)


def output_file(text: str, force: bool, *, ending: str = "") -> Path:
    """Return the path of a file to write; refuse it before work begins that could not be saved."""
    from ..files import file_to_replace

    path = Path(text).expanduser()
    if ending and path.suffix != ending:
        raise click.UsageError(f"--out {text}: expected a name that ends in {ending}.")
    if path.exists() and not force:
        raise click.ClickException(f"{path}: exists already. Choose another name or use --force.")
    file_to_replace(path)
    return path
