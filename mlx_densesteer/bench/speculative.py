"""Speculative decoding: how many drafted tokens are taken, and what it gains."""

from dataclasses import replace

import mlx.nn as nn
from mlx_lm.models.qwen2 import Model

from ..generation.speculation import Draft
from ..generation.stream import Generation, generate
from ..model.block import decoder_blocks, patch
from ..model.model import load
from .report import Row, ratio
from .subject import Subject
from .timing import Tell, alternate, over, quiet, spread, timed

FIGURES = ("speculative_acceptance", "speculative_ratio", "speculative_equal")
SUITE = {"questions": 2, "tokens": 24, "rounds": 10, "seconds": 30.0}
QUICK = {"questions": 1, "tokens": 16, "rounds": 2, "seconds": 5.0}


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
) -> dict[str, object]:
    """Answer questions under a mild steering, greedily, with and without a draft, in turn.

    Without a smaller model of the family at hand the draft is a *truncated copy*: the model's own
    first blocks, its final norm and head, sharing the weights. Such a copy is a poor draft, as it
    was never trained to speak from there, so its acceptance is a lower bound for a real draft's.
    ``speculative_acceptance`` is accepted over proposed tokens, ``speculative_ratio`` the speed
    with the draft over that without (whole responses, prompts included), with the plain run once
    more as the null, and ``speculative_equal`` whether all tokens were the same.

    Args:
        draft: a smaller model's folder or Hub id; without one the truncated copy.
        draft_layers: blocks of the truncated copy; 0 is a quarter of the model's, at least 1.
        draft_tokens: tokens that the draft proposes at a time.
        questions: arithmetic stories to answer.
        tokens: tokens of an answer at most.
        rounds: answers to each question and side.
        seconds: then no new round is begun; 0 is no limit.
    """
    if draft is None:
        blocks = draft_layers or max(1, subject.layer_count // 4)
        small, words = truncated(subject.model, blocks), subject.tokenizer
        what = f"its own first {blocks} of {subject.layer_count} blocks"
    else:
        (small, words), what = load(draft), draft
    helper = Draft(small, words, draft_tokens)
    prompts, steering = subject.questions(questions), subject.mild(subject.layer_count // 2)
    answers: dict[bool, list[Generation]] = {}

    def respond(*, drafted: bool) -> None:
        answers[drafted] = [
            generate(
                subject.model, subject.tokenizer, prompt, steering=steering, max_tokens=tokens,
                draft=helper if drafted else None,
            )
            for prompt in prompts
        ]  # fmt: skip

    respond(drafted=True)  # warm up
    with_draft, without, again = alternate(
        [lambda: timed(lambda: respond(drafted=True)), *[lambda: timed(lambda: respond(drafted=False))] * 2],
        rounds=rounds, seconds=seconds, tell=tell,
    )  # fmt: skip
    pairs = list(zip(answers[True], answers[False], strict=True))
    proposed = sum(one.draft_proposed or 0 for one in answers[True])
    accepted = sum(one.draft_accepted or 0 for one in answers[True])
    speed = spread(over(without, with_draft))
    return {
        "speculative_acceptance": accepted / proposed if proposed else None,
        "speculative_ratio": speed["median"],
        "speculative_equal": all(a.token_ids == b.token_ids for a, b in pairs),
        "details": {
            "speed": {"ratio": speed, "null": spread(over(without, again))},
            "draft": what,
            "draft_tokens": draft_tokens,
            "proposed": proposed,
            "accepted": accepted,
            "questions": len(prompts),
            "tokens": sum(len(one.token_ids) for one in answers[False]),
            "equal_answers": sum(a.token_ids == b.token_ids for a, b in pairs),
        },
    }


def rows(result: dict) -> list[Row]:
    """Return the table's rows."""
    d, acceptance = result["details"], result["speculative_acceptance"]
    return [
        Row("drafted tokens accepted", "-" if acceptance is None else f"{acceptance:.3f}",
            remark=f"{d['accepted']} of {d['proposed']}; draft: {d['draft']}, {d['draft_tokens']} at a time"),
        ratio("speed with the draft / without", d["speed"]["ratio"], d["speed"]["null"],
              f"{d['equal_answers']} of {d['questions']} answers with equal tokens ({d['tokens']} tokens)"),
    ]  # fmt: skip


def truncated(model: nn.Module, blocks: int) -> nn.Module:
    """Return a model of the first ``blocks`` blocks that shares the weights of ``model``."""
    copy = Model(replace(model.args, num_hidden_layers=blocks))
    copy.model.embed_tokens, copy.model.norm = model.model.embed_tokens, model.model.norm
    copy.model.layers = [decoder_blocks(model)[layer] for layer in range(blocks)]
    if not model.args.tie_word_embeddings:
        copy.lm_head = model.lm_head
    return patch(copy.eval())
