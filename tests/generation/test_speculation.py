import pytest
from mlx_lm.models.qwen2 import Model, ModelArgs

import mlx_densesteer as ds
from mlx_densesteer import demo
from mlx_densesteer.demo.problems import held_out
from mlx_densesteer.errors import InputError, VectorMismatchError
from mlx_densesteer.generation.session import Session
from mlx_densesteer.generation.speculation import Draft


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


@pytest.mark.parametrize("tokens", [1, 3, 6])
def test_the_text_is_that_without_a_draft(loaded, steering, tokens):
    model, tokenizer = loaded
    draft = Draft(truncated(model, 5), tokenizer, tokens)
    for how in (None, steering, ds.Steering(steering.vector, 3.0, (2, 4), "generated")):
        for problem in held_out(3):
            alone = ds.generate(*loaded, problem.question, steering=how, max_tokens=90)
            drafted = ds.generate(
                *loaded, problem.question, steering=how, max_tokens=90, draft=draft
            )
            assert drafted.token_ids == alone.token_ids
            assert drafted.text == alone.text and drafted.finish_reason == alone.finish_reason
            assert 0 <= drafted.draft_accepted <= drafted.draft_proposed
            assert alone.draft_accepted is None


def test_a_model_drafting_for_itself_is_right_and_unsteered_less_often(loaded, steering):
    model, tokenizer = loaded
    drafts = [Draft(model, tokenizer, 4, steering.vector, steering.layers), Draft(*loaded, 4)]
    accepted, proposed = [0, 0], [0, 0]
    for problem in held_out(4):
        for number, draft in enumerate(drafts):
            result = ds.generate(
                *loaded, problem.question, steering=steering, max_tokens=90, draft=draft
            )
            accepted[number] += result.draft_accepted
            proposed[number] += result.draft_proposed
    assert accepted[0] / proposed[0] > 0.9
    assert accepted[1] / proposed[1] < accepted[0] / proposed[0]


def test_a_session_with_a_draft(loaded, steering):
    model, tokenizer = loaded
    draft = Draft(truncated(model, 5), tokenizer)
    with_, without = (Session(*loaded, steering, max_tokens=60, draft=one) for one in (draft, None))
    for number, problem in enumerate(held_out(3)):
        for session in (with_, without):
            session.set_strength(2.0 * number)
            for _ in session.send(problem.question):
                pass
        assert with_.turns[-1].reply.token_ids == without.turns[-1].reply.token_ids
        assert with_.turns[-1].reply.draft_proposed


def test_the_drafts_vector_follows_the_dial(loaded, steering):
    model, tokenizer = loaded
    draft = Draft(model, tokenizer, 3, steering.vector, (4,), factor=0.5)
    followed = draft.steering(ds.Steering(steering.vector, 3.0, (5,), "generated"))
    assert (followed.strength, followed.layers, followed.positions) == (1.5, (4,), "generated")
    assert draft.steering(None) is None
    assert Draft(model, tokenizer).steering(steering) is None


def test_drafts_that_cannot_be(loaded, hf_folder, make_vector):
    other, its_tokenizer = ds.load(hf_folder)
    with pytest.raises(InputError, match="tokenizer differs"):
        ds.stream(*loaded, "hello", draft=Draft(other, its_tokenizer))
    with pytest.raises(InputError, match="0 draft tokens"):
        Draft(*loaded, 0)
    with pytest.raises(VectorMismatchError):
        Draft(*loaded, 3, make_vector())


@pytest.mark.parametrize("limit", [1, 5, 24])
def test_no_more_is_accepted_than_was_proposed(loaded, limit):
    itself = Draft(*loaded, 4)
    result = ds.generate(*loaded, held_out(1)[0].question, max_tokens=limit, draft=itself)
    assert 0 < result.draft_accepted <= result.draft_proposed
