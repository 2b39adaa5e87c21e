from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers import same_answer
from mlx_lm.models.qwen2 import Model, ModelArgs

import mlx_densesteer as ds
from mlx_densesteer import demo
from mlx_densesteer.demo.problems import held_out
from mlx_densesteer.errors import InputError
from mlx_densesteer.generation.session import Session
from mlx_densesteer.generation.speculation import Draft
from mlx_densesteer.model.prompt import encode_prompt


@pytest.fixture(scope="module")
def loaded():
    return ds.load("demo")


@pytest.fixture(scope="module")
def steering():
    return ds.Steering(ds.SteeringVector.load(demo.VECTOR), 4.76, (5,))


def truncated(model, layers: int):
    """The model's first blocks, with its embedding and final norm: a smaller sibling."""
    small = Model(ModelArgs(**{**vars(model.args), "num_hidden_layers": layers}))
    small.update(model.parameters() | {"model": model.model.parameters() | {
        "layers": [block.parameters() for block in model.model.layers[:layers]]}})  # fmt: skip
    return small


@pytest.mark.parametrize("tokens", [1, 6])
def test_the_text_is_that_without_a_draft(loaded, steering, tokens):
    model, tokenizer = loaded
    draft = Draft((truncated(model, 5), tokenizer), tokens)
    at_steps = ds.Steering(steering.vector, 9.0, (2, 4), "steps")
    for how in (None, steering, replace(at_steps, strength=3.0, positions="generated"), at_steps):
        for problem in held_out(3):
            alone = ds.generate(*loaded, problem.question, steering=how, max_tokens=90)
            drafted = ds.generate(
                *loaded, problem.question, steering=how, max_tokens=90, draft=draft
            )
            same_answer(model, encode_prompt(tokenizer, problem.question), drafted, alone)
            assert 0 <= drafted.draft_accepted <= drafted.draft_proposed
            assert alone.draft_accepted is None


def test_a_model_drafting_for_itself_is_right_where_nothing_is_steered(loaded, steering):
    draft, rates = Draft(loaded, 4), []
    for how in (None, steering):
        results = [
            ds.generate(*loaded, problem.question, steering=how, max_tokens=90, draft=draft)
            for problem in held_out(4)
        ]
        accepted = sum(result.draft_accepted for result in results)
        rates.append(accepted / sum(result.draft_proposed for result in results))
    assert rates[0] > 0.9 and rates[1] < rates[0]


def test_a_session_with_a_draft(loaded, steering):
    model, tokenizer = loaded
    draft = Draft((truncated(model, 5), tokenizer))
    with_, without = (Session(*loaded, steering, max_tokens=60, draft=one) for one in (draft, None))
    for number, problem in enumerate(held_out(3)):
        for session in (with_, without):
            session.set_strength(2.0 * number)
            for _ in session.send(problem.question):
                pass
        assert with_.turns[-1].reply.token_ids == without.turns[-1].reply.token_ids
        assert with_.turns[-1].reply.draft_proposed


def test_drafts_that_cannot_be(loaded, hf_folder):
    with pytest.raises(InputError, match="tokenizer differs"):
        ds.stream(*loaded, "hello", draft=Draft(ds.load(hf_folder)))
    with pytest.raises(InputError, match="0 draft tokens"):
        Draft(loaded, 0)


def test_added_tokens_may_differ(loaded):
    """As those of the GGUF files of Qwen2.5-Coder 0.5B and 1.5B do."""
    model, _ = loaded
    other = ds.load("demo").tokenizer
    other.add_tokens(["<|only_here|>"], special_tokens=True)
    draft, question = Draft((truncated(model, 5), other)), held_out(1)[0].question
    drafted = ds.generate(*loaded, question, max_tokens=40, draft=draft)
    assert drafted.token_ids == ds.generate(*loaded, question, max_tokens=40).token_ids


@pytest.mark.parametrize("limit", [1, 5, 24])
def test_no_more_is_accepted_than_was_proposed(loaded, limit):
    itself = Draft(loaded, 4)
    result = ds.generate(*loaded, held_out(1)[0].question, max_tokens=limit, draft=itself)
    assert 0 < result.draft_accepted <= result.draft_proposed


@pytest.mark.parametrize(("draft_rows", "rows"), [(0, 64), (64, 0)])
def test_a_draft_of_another_number_of_rows(loaded, draft_rows, rows, monkeypatch):
    """Qwen2.5-7B has 152064 rows, 0.5B 151936, with one tokenizer. mlx reads beyond a matrix."""
    model, tokenizer = loaded
    target, small = padded(model, rows), padded(truncated(model, 5), draft_rows)
    read, call = [], nn.Embedding.__call__

    def embed(embedding, tokens):
        read.append((int(tokens.max()), len(embedding.weight)))
        return call(embedding, tokens)

    monkeypatch.setattr(nn.Embedding, "__call__", embed)
    ids = [*tokenizer.encode(held_out(1)[0].question), model.args.vocab_size + rows - 1]
    for _ in range(2):
        alone, drafted = (
            ds.generate(target, tokenizer, ids, max_tokens=40, draft=draft)
            for draft in (None, Draft((small, tokenizer)))
        )
        same_answer(target, ids, drafted, alone)
        assert drafted.draft_proposed
        ids += [*alone.token_ids, model.args.vocab_size + rows - 1]
    assert len(read) > 100 and all(token < count for token, count in read)


def padded(model, rows: int):
    """The model with more rows, whose tokens it likes best of all."""
    args = vars(model.args)
    padded = Model(ModelArgs(**{**args, "vocab_size": args["vocab_size"] + rows}))
    padded.update(model.parameters())
    weight = model.model.embed_tokens.weight
    padded.model.embed_tokens.weight = mx.concatenate([weight, 3 * weight[200 : 200 + rows]])
    return padded
