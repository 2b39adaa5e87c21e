"""Speculative decoding: how many drafted tokens are accepted, and the gain in speed."""

from dataclasses import replace

import mlx.nn as nn
from mlx_lm.models.qwen2 import Model as Qwen2
from script import main

from mlx_densesteer.bench.figures import Figure, Measurement, Tell, alternate, quiet, ratio, timed
from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.demo.problems import held_out
from mlx_densesteer.generation.speculation import Draft
from mlx_densesteer.generation.stream import Generation, generate
from mlx_densesteer.model.families import decoder_blocks
from mlx_densesteer.model.model import Model, load
from mlx_densesteer.steering.request import resolve


def run(
    subject: Subject,
    *,
    draft: str | None = None,
    draft_layers: int = 0,
    draft_tokens: int = 3,
    questions: int = 4,
    tokens: int = 64,
    rounds: int = 3,
    seconds: float = 0.0,
    tell: Tell = quiet,
) -> Measurement:
    """Answer questions under a mild steering, greedily, with and without a draft, in turn.

    Without ``draft`` it is a *truncated copy*: the model's own first blocks, final norm and head.
    It was never trained to speak from there, so it shows that the tokens stay the same, and a lower
    bound for a real draft's acceptance. ``speculative_acceptance`` is accepted over proposed
    tokens, ``speculative_ratio`` the speed with the draft over that without (whole responses,
    prompts included), with the plain run once more as the noise, and ``speculative_equal`` says
    whether all tokens were the same.

    Args:
        draft: a smaller model's folder or Hub id; by default the truncated copy.
        draft_layers: blocks of the truncated copy; 0 is a quarter of the model's, at least 1.
        draft_tokens: tokens that the draft proposes at a time.
        questions: arithmetic stories to answer.
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
    steering = resolve(model, subject.vector, "10%", [model.layer_count // 2])
    raw = not model.tokenizer.has_chat_template
    answers: dict[Draft | None, list[Generation]] = {}

    def respond(helper: Draft | None) -> None:
        options = {"steering": steering, "raw": raw, "max_tokens": tokens, "draft": helper}
        answers[helper] = [generate(model, prompt, **options) for prompt in prompts]

    helper = Draft(small, draft_tokens)
    respond(helper)  # warm up
    works = [lambda one=one: timed(lambda: respond(one)) for one in (helper, None, None)]
    drafting, without, again = alternate(works, rounds=rounds, seconds=seconds, tell=tell)
    drafted, plain = answers[helper], answers[None]
    proposed = sum(one.draft_proposed or 0 for one in drafted)
    accepted = sum(one.draft_accepted or 0 for one in drafted)
    equal = sum(a.token_ids == b.token_ids for a, b in zip(drafted, plain, strict=True))
    count = sum(len(one.token_ids) for one in plain)
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
        ]
    )


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
