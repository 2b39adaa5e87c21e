"""Speculative decoding: how many drafted tokens are accepted, and the gain in speed."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.qwen2 import Model as Qwen2
from script import main

from mlx_densesteer.bench.figures import Figure, Measurement, Tell, alternate, quiet, ratio, timed
from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.demo.problems import DemoProblem, held_out
from mlx_densesteer.generation.batch import generate_batch
from mlx_densesteer.generation.sampling import GREEDY, Sampling
from mlx_densesteer.generation.speculation import Draft
from mlx_densesteer.generation.stream import Generation, generate
from mlx_densesteer.model.families import decoder_blocks
from mlx_densesteer.model.model import Model, load
from mlx_densesteer.model.prompt import encode_prompt
from mlx_densesteer.steering.request import resolve
from mlx_densesteer.steering.steering import Steering

MOST = 6  # drafted tokens at a time
WARM = Sampling(0.7, seed=0)


def run(
    subject: Subject,
    *,
    draft: str | None = None,
    draft_layers: int = 0,
    draft_tokens: int = 3,
    questions: int = 4,
    answers: int = 0,
    vector: str | None = None,
    tokens: int = 64,
    rounds: int = 3,
    seconds: float = 0.0,
    tell: Tell = quiet,
) -> Measurement:
    """Answer questions steered, greedily, with and without a draft, in turn.

    Without ``draft`` it is a *truncated copy*: the model's own first blocks, final norm and head.
    It was never trained to speak from there, so it shows that the tokens stay the same, and a lower
    bound for a real draft's acceptance. ``speculative_acceptance`` is accepted over proposed
    tokens, ``speculative_ratio`` the speed with the draft over that without (whole responses,
    prompts included), with the plain run once more as the noise, and ``speculative_equal`` says
    whether all tokens were the same.

    With ``answers`` it also works out, from the draft's chances of the target's own tokens, how many tokens
    a pass of the target gives at 1 to 6 drafted ones: unsteered and steered, greedy and at temperature 0.7.

    Args:
        draft: a smaller model's folder or Hub id; by default the truncated copy.
        draft_layers: blocks of the truncated copy; 0 is a quarter of the model's, at least 1.
        draft_tokens: tokens that the draft proposes at a time.
        questions: arithmetic stories to answer.
        answers: stories whose answers are looked at for 1 to 6 drafted tokens; 0 leaves that out.
        vector: a vector's file, steered as it says; by default a random one at 10 % of the middle layer.
        tokens: tokens of an answer at most.
        rounds: answers to each question and side.
        seconds: after which no new round begins; 0 is no limit.
    """
    model = subject.model
    if draft is None:
        blocks = draft_layers or max(1, model.layer_count // 4)
        small = Model(truncated(model.network, blocks), model.tokenizer)
        what = f"its own first {blocks} of {model.layer_count} blocks"
    else:
        small, what = load(draft), draft
    prompts = [problem.question for problem in held_out(questions)]
    mild = subject.vector, "10%", [model.layer_count // 2]
    steering = resolve(model, *(mild if vector is None else (vector,)))
    raw = not model.tokenizer.has_chat_template
    given: dict[Draft | None, list[Generation]] = {}

    def respond(helper: Draft | None) -> None:
        options = {"steering": steering, "raw": raw, "max_tokens": tokens, "draft": helper}
        given[helper] = [generate(model, prompt, **options) for prompt in prompts]

    helper = Draft(small, draft_tokens)
    respond(helper)  # warm up
    works = [lambda one=one: timed(lambda: respond(one)) for one in (helper, None, None)]
    drafting, without, again = alternate(works, rounds=rounds, seconds=seconds, tell=tell)
    drafted, plain = given[helper], given[None]
    proposed = sum(one.draft_proposed or 0 for one in drafted)
    accepted = sum(one.draft_accepted or 0 for one in drafted)
    equal = sum(a.token_ids == b.token_ids for a, b in zip(drafted, plain, strict=True))
    count = sum(len(one.token_ids) for one in plain)
    table = []
    if answers:
        table = _tokens_a_pass(model, helper, held_out(answers), steering, tokens=tokens, tell=tell)
    return Measurement(
        [
            Figure(
                "speculative_acceptance",
                "drafted tokens accepted",
                accepted / proposed if proposed else None,
                remark=f"{accepted} of {proposed}; draft: {what}, {draft_tokens} at a time",
            ),
            Figure.of(
                "speculative_ratio",
                "speed with the draft / without",
                ratio(without, drafting),
                ratio(without, again),
            ),
            Figure(
                "speculative_equal",
                "all tokens are equal",
                equal == len(prompts),
                remark=f"{equal} of {len(prompts)} answers, {count} tokens",
            ),
            *table,
        ]
    )


def _tokens_a_pass(
    model: Model,
    helper: Draft,
    problems: Sequence[DemoProblem],
    steering: Steering,
    *,
    tokens: int,
    tell: Tell,
) -> list[Figure]:
    """Return the tokens that a pass of the target gives, for each way to answer."""
    raw = not model.tokenizer.has_chat_template
    prompts = [encode_prompt(model.tokenizer, one.question, raw=raw) for one in problems]
    table = []
    for sampling, how in product((GREEDY, WARM), (None, steering)):
        name = (
            f"{'greedy' if sampling == GREEDY else 'sampled'}, {'steered' if how else 'unsteered'}"
        )
        tell(name)
        draws = [replace(sampling, seed=n) for n in range(len(prompts))]
        options = {"steering": how, "max_tokens": tokens, "sampling": draws}
        found = dict(generate_batch(model, prompts, **options))
        known = [
            chances(helper, model.vocabulary, prompt, whole(model, prompt, found[n]), sampling)
            for n, prompt in enumerate(prompts)
        ]
        length = sum(map(len, known))
        most = max(MOST, helper.tokens)
        each = [length / sum(passes(one, k) for one in known) for k in range(1, most + 1)]
        key = "speculative_tokens_" + name.replace(", ", "_")
        told = ", ".join(f"{one:.2f}" for one in each)
        figure = f"tokens a pass of the model, {name}"
        remark = f"at 1 to {most} drafted: {told}; {len(known)} answers, {length} tokens"
        table.append(Figure(key, figure, each[helper.tokens - 1], remark=remark))
    return table


def whole(model: Model, prompt: Sequence[int], found: Generation) -> list[int]:
    """Return the tokens of an answer with the one that ends it: that takes a pass too."""
    ends = sorted(model.ends(prompt))[:1] if found.finish_reason == "stop" else []
    return [*found.token_ids, *ends]


def chances(
    helper: Draft, vocabulary: int, prompt: Sequence[int], answer: Sequence[int], sampling: Sampling
) -> np.ndarray:
    """Return how likely the draft proposes each token of an answer, after those before it.

    Greedily that is 0 or 1. A drawn proposal is kept if the target draws the same.
    """
    network = helper.network(vocabulary)
    logits = network(mx.array([[*prompt, *answer[:-1]]]))[0, len(prompt) - 1 :]
    ids = mx.array(list(answer))
    if not sampling.temp:
        return np.array(mx.argmax(logits, axis=-1) == ids, dtype=float)
    scaled = logits.astype(mx.float32) / sampling.temp
    own = mx.take_along_axis(scaled, ids[:, None], axis=-1)[:, 0]
    return np.array(mx.exp(own - mx.logsumexp(scaled, axis=-1)), dtype=float)


def passes(chances: Sequence[float], drafted: int) -> float:
    """Return how many passes of the target an answer is expected to take with so many tokens drafted.

    A pass gives the proposals up to the first that is refused, and a token of the target's own.
    """
    count = [0.0] * (len(chances) + drafted + 2)  # from each token on
    for start in reversed(range(len(chances))):
        alive, count[start] = 1.0, 1.0
        for n in range(drafted):
            chance = chances[start + n] if start + n < len(chances) else 0.0
            count[start] += alive * (1 - chance) * count[start + n + 1]
            alive *= chance
        count[start] += alive * count[start + drafted + 1]
    return count[0]


def truncated(network: nn.Module, blocks: int) -> nn.Module:
    """Return a network of the first ``blocks`` blocks that shares the weights of ``network``."""
    copy = Qwen2(replace(network.args, num_hidden_layers=blocks))
    copy.model.embed_tokens, copy.model.norm = network.model.embed_tokens, network.model.norm
    copy.model.layers = [decoder_blocks(network)[layer] for layer in range(blocks)]
    if not network.args.tie_word_embeddings:
        copy.lm_head = network.lm_head
    return copy.eval()


if __name__ == "__main__":
    main(run)
