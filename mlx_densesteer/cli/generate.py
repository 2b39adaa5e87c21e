"""``densesteer generate``."""

import json
import shlex
import sys
from typing import TYPE_CHECKING

import click

from ..distributed.ranks import launched_rank
from ..text import count, note
from .options import decoding_options, model_option, steering_options
from .speculate import load_draft, tell_brakes, tell_draft
from .spread import check_spread, load_spread
from .steering import read_steering, steering_for

if TYPE_CHECKING:
    from ..generation.answer import Generation
    from ..model.model import Model
    from ..steering.request import Amount
    from ..steering.steering import Positions


@click.command()
@model_option
@steering_options
@click.option(
    "-n", "--max-tokens", type=click.IntRange(min=1), default=2048, show_default=True,
    help="Length of the response at most.",
)  # fmt: skip
@click.option(
    "--temp",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Temperature; 0 is greedy.",
)
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True,
    help="Sample among the likeliest tokens of this total probability.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="For a repeatable sample.")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End at this text; may be repeated.")
@click.option("--raw", is_flag=True, help="No chat template: continue the prompt as it is.")
@decoding_options
@click.option("--pipeline", is_flag=True,
              help="Under mlx.launch: give every rank some of the blocks, not a slice of each.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.argument("prompt", nargs=-1, metavar="[PROMPT]")
def generate(model: str, vector: str | None, strength: "Amount | None", layers: tuple[str, ...],
             positions: "Positions | None", max_tokens: int, temp: float, top_p: float, seed: int | None,
             system: str | None, stop: tuple[str, ...], raw: bool, draft_model: str | None,
             draft_tokens: int, no_brake: bool, pipeline: bool, as_json: bool,
             prompt: tuple[str, ...]) -> None:  # fmt: skip
    """Generate text, steered if a vector is given.

    PROMPT is read from standard input where it is missing or "-", without its last newline unless
    --raw. The text goes to standard output as it is made, everything else to standard error. Under
    mlx.launch the model is spread over the ranks (docs/distributed.md).
    """
    text = _read_prompt(prompt, raw)
    check_spread(pipeline, draft_model)
    request = read_steering(vector, strength, layers, positions)

    from ..distributed.stream import settle, stream_over_ranks
    from ..generation.brake import Brake
    from ..generation.sampling import Sampling
    from ..model.prompt import encode_prompt

    _tell_demo(model, text)
    loaded, ranks = load_spread(model, pipeline=pipeline)
    steering = steering_for(request, loaded)
    pieces = stream_over_ranks(
        loaded, ranks, encode_prompt(loaded.tokenizer, text, system=system, raw=raw), steering=steering,
        max_tokens=max_tokens, sampling=Sampling(temp, top_p, seed), stop=stop,
        draft=load_draft(draft_model, draft_tokens, loaded), brake=None if no_brake else Brake(),
    )  # fmt: skip
    interrupt, shown = None, 0
    try:
        for piece in pieces:
            shown += len(piece)
            if not as_json:
                click.echo(piece, nl=False)
    except KeyboardInterrupt as error:
        interrupt = error  # what was said is kept
    settle(ranks)
    result = pieces.result
    if as_json:
        click.echo(json.dumps(_to_json(result, loaded), ensure_ascii=False, allow_nan=False))
    else:
        click.echo(result.text[shown:])  # after an interruption, what was held back for a stop
    tell_brakes(result)
    note(_receipt(result, loaded.context))
    if interrupt:
        raise interrupt


def _read_prompt(prompt: tuple[str, ...], raw: bool) -> str:
    """Return the prompt; ``echo TEXT |`` is the same as the argument TEXT, as ``$(...)`` would make it."""
    if len(prompt) > 1:
        raise click.UsageError(
            f"{len(prompt)} prompts, expected one; quote it: densesteer generate ... {shlex.quote(' '.join(prompt))}"
        )
    if prompt not in ((), ("-",)):
        return prompt[0]
    if launched_rank() is not None:
        raise click.UsageError(
            "under mlx.launch the prompt is an argument: mlx.launch never ends standard input. For a "
            'file: "$(cat problem.txt)".'
        )
    if not prompt and sys.stdin.isatty():
        raise click.UsageError("no prompt: give it as an argument or on standard input.")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"standard input is not UTF-8 text ({error}).") from error
    return text if raw else text.removesuffix("\n").removesuffix("\r")


def _tell_demo(model: str, prompt: str) -> None:
    """Say what the embedded model is when it is asked something that it cannot know."""
    from .. import demo
    from ..demo.problems import held_out, is_familiar

    if model == demo.NAME and not is_familiar(prompt):
        note(
            "the demo model is a toy that was trained on one kind of arithmetic story and on nothing "
            f'else, so do not expect sense. Ask it this: "{held_out(1)[0].question}"'
        )


def _to_json(result: "Generation", model: "Model") -> dict[str, object]:
    steering = None
    if result.steering:
        steering = result.steering.describe() | {"dose": model.dose(result.steering)}
    return {
        "text": result.text,
        "tokens": result.tokens,
        "steps": result.steps,
        "density": result.density,
        "prompt_tokens": result.prompt_tokens,
        "tokens_per_second": result.tokens_per_second,
        "time_to_first_token": result.time_to_first_token,
        "peak_memory_bytes": result.peak_memory_bytes,
        "finish_reason": result.finish_reason,
        "draft": {"accepted": result.draft_accepted, "proposed": result.draft_proposed}
        if result.draft_proposed is not None else None,
        "brakes": [one.describe() for one in result.brakes],
        "steering": steering,
    }  # fmt: skip


def _receipt(result: "Generation", context: int) -> str:
    full = result.prompt_tokens + result.tokens >= context
    ends = {
        "stop": "",
        "length": f"; cut off at {f'the context of {context} tokens' if full else '--max-tokens'}",
        "interrupted": "; interrupted",
    }[result.finish_reason]
    density = f", density {result.density:.1f}" if result.density else ""
    return (
        f"{count(result.tokens, 'token')}, {count(result.steps, 'step')}{density}, first token after "
        f"{result.time_to_first_token:.2f} s, then {result.tokens_per_second:.1f} tokens/s{tell_draft(result)}{ends}"
    )
