"""``densesteer generate``."""

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..distributed.ranks import launched_rank
from ..errors import InputError
from ..files import parse_json
from ..text import note
from .options import (
    answer_options,
    load_draft,
    model_option,
    read_think_budget,
    steering_options,
    think_options,
)
from .steering import described, read_steering, steering_for

if TYPE_CHECKING:
    from ..distributed.ranks import Ranks
    from ..generation.answer import Generation
    from ..model.model import Model
    from ..steering.places import Positions
    from ..steering.request import Amount


@click.command()
@model_option()
@steering_options
@think_options
@answer_options
@click.option(
    "--show-thinking",
    is_flag=True,
    help="Print a reasoning model's thought too, to standard error.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End at this text; may be repeated.")
@click.option(
    "--json-schema",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Answer with JSON that matches the JSON Schema in FILE (extra: json). Ask for JSON in the prompt too.",
)
@click.option("--raw", is_flag=True, help="No chat template: continue the prompt as it is.")
@click.option(
    "--special-tokens",
    is_flag=True,
    help="Read control tokens such as <|im_end|> in the prompt as such, not as text.",
)
@click.option(
    "--pipeline",
    is_flag=True,
    help="Under mlx.launch: give every rank some of the blocks, not a slice of each.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.argument("prompt", nargs=-1, metavar="[PROMPT]")
def generate(
    model: str,
    vector: str | None,
    strength: "Amount | None",
    layers: tuple[str, ...],
    positions: "Positions | None",
    think_budget: int | None,
    think_strength: "Amount | None",
    think_budget_hard: bool,
    show_thinking: bool,
    max_tokens: int,
    temp: float,
    top_p: float,
    seed: int | None,
    system: str | None,
    draft_model: str | None,
    draft_tokens: int,
    no_brake: bool,
    stop: tuple[str, ...],
    json_schema: Path | None,
    raw: bool,
    special_tokens: bool,
    pipeline: bool,
    as_json: bool,
    prompt: tuple[str, ...],
) -> None:
    """Generate text, steered if a vector is given.

    Without PROMPT, or with "-", the prompt is read from standard input; its last newline is
    removed unless --raw. The text goes to standard output as it is generated, everything else to
    standard error. Of a reasoning model's answer the thought is left out. Under mlx.launch the model is spread over the ranks (docs/distributed.md).
    """
    text = _read_prompt(prompt, raw)
    if pipeline and launched_rank() is None:
        raise click.UsageError(
            "--pipeline is for several ranks: mlx.launch -n 2 -- densesteer generate --pipeline ..."
        )
    if draft_model is not None and launched_rank() is not None:
        raise click.UsageError("--draft-model does not go with mlx.launch: leave it out.")
    if json_schema is not None and launched_rank() is not None:
        raise click.UsageError("--json-schema does not go with mlx.launch: leave it out.")
    budget, limit = read_think_budget(think_budget, think_strength, think_budget_hard)
    request = read_steering(vector, strength, layers, positions, budget, think_strength)

    from ..distributed.stream import settle, stream_over_ranks
    from ..generation.answer import brake_lines, receipt
    from ..generation.brake import Brake
    from ..generation.grammar import check_schema, json_grammar
    from ..generation.sampling import Sampling
    from ..model.prompt import encode_prompt

    schema = None
    if json_schema is not None:
        schema = parse_json(json_schema.read_bytes(), str(json_schema))
        check_schema(schema, str(json_schema))
    _tell_demo(model, text)
    loaded, ranks = _load_over_ranks(model, pipeline)
    steering = steering_for(request, loaded)
    loaded.check_length(text, system)
    pieces = stream_over_ranks(
        loaded,
        ranks,
        encode_prompt(
            loaded.tokenizer, text, system=system, raw=raw, special_tokens=special_tokens
        ),
        steering=steering,
        max_tokens=max_tokens,
        sampling=Sampling(temp, top_p, seed),
        stop=stop,
        draft=load_draft(draft_model, draft_tokens),
        brake=None if no_brake else Brake(),
        think_limit=limit,
        grammar=None if schema is None else json_grammar(loaded, schema),
    )
    interrupt = None
    thought, answer = Growing(err=True), Growing()
    try:
        for _ in pieces:
            thinks, says = pieces.shown
            if show_thinking and thinks:
                thought.tell(thinks, end=bool(says))
            if not as_json:
                answer.tell(says)
    except KeyboardInterrupt as error:
        interrupt = error  # the text so far is kept
    settle(ranks)
    result = pieces.result
    if show_thinking and result.thought:
        thought.tell(result.thought, end=True)
    if as_json:
        click.echo(json.dumps(_to_json(result, loaded), ensure_ascii=False, allow_nan=False))
    else:
        answer.tell(result.answer, end=True)  # also what was held back for a stop text
    for line in [*brake_lines(result), receipt(result, loaded.context)]:
        note(line)
    if interrupt:
        raise interrupt


class Growing:
    """Prints a text that grows."""

    def __init__(self, *, err: bool = False):
        self._told, self._err, self._ended = 0, err, False

    def tell(self, text: str, *, end: bool = False) -> None:
        """Print what is new of the text, and with ``end`` a line break, after which nothing is printed."""
        if not self._ended and (end or len(text) > self._told):
            click.echo(text[self._told :], nl=end, err=self._err)
            self._told, self._ended = len(text), end


def _read_prompt(prompt: tuple[str, ...], raw: bool) -> str:
    """Return the prompt, which is not empty. ``echo TEXT |`` gives the same as the argument TEXT."""
    if len(prompt) > 1:
        quoted = shlex.quote(" ".join(prompt))
        raise click.UsageError(
            f"{len(prompt)} prompts, expected one; quote it: densesteer generate ... {quoted}"
        )
    text = prompt[0] if prompt not in ((), ("-",)) else _read_input(prompt, raw)
    if not text.strip():  # told before mlx is imported
        raise InputError("the prompt is empty; give it as an argument or on standard input.")
    return text


def _read_input(prompt: tuple[str, ...], raw: bool) -> str:
    """Return what standard input has, without its last newline unless ``raw``."""
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
    """Say what the embedded model is for, if the prompt is not of the kind that it knows."""
    from .. import demo
    from ..demo.problems import held_out, is_familiar

    if model == demo.NAME and not is_familiar(prompt):
        note(
            "the demo model is a toy that was trained on one kind of arithmetic story and on nothing "
            f'else, so do not expect sense. Ask it this: "{held_out(1)[0].question}"'
        )


def _load_over_ranks(name: str, pipeline: bool) -> "tuple[Model, Ranks]":
    """Return this rank's part of a model and the ranks; tell how several ranks share the model."""
    from ..distributed.loading import load_over_ranks
    from ..distributed.ranks import Ranks
    from ..steering.vector import format_layers

    ranks = Ranks.connect()
    model = load_over_ranks(name, ranks, pipeline=pipeline)
    if ranks.size > 1 and pipeline:
        parts = "; ".join(
            f"rank {rank}: {format_layers(layers)}"
            for rank, layers in enumerate(ranks.gather(model.own_layers))
        )
        note(f"{model.name} as a pipeline, layers of {parts}")
    elif ranks.size > 1:
        note(f"{model.name} tensor-parallel on {ranks.size} ranks")
    return model, ranks


def _to_json(result: "Generation", model: "Model") -> dict[str, object]:
    draft = None
    if result.draft_proposed is not None:
        draft = {"accepted": result.draft_accepted, "proposed": result.draft_proposed}
    return {
        "text": result.text,
        "thought": result.thought,
        "answer": result.answer,
        "tokens": result.tokens,
        "thought_tokens": result.thought_tokens,
        "thought_closed": result.thought_closed,
        "thought_limit": result.thought_limit,
        "steps": result.steps,
        "density": result.density,
        "prompt_tokens": result.prompt_tokens,
        "tokens_per_second": result.tokens_per_second,
        "time_to_first_token": result.time_to_first_token,
        "peak_memory_bytes": result.peak_memory_bytes,
        "finish_reason": result.finish_reason,
        "gave_up": result.gave_up,
        "draft": draft,
        "brakes": [asdict(one) for one in result.brakes],
        "steering": described(result.steering, model),
    }
