import mlx.core as mx
import numpy as np
import pytest

from mlx_densesteer.errors import InputError
from mlx_densesteer.model import likelihood
from mlx_densesteer.model.block import patch
from mlx_densesteer.model.likelihood import nll

PROMPTS = [[1, 2, 3], [9] * 17, [1, 2, 3], [5], [7, 7, 8], [1, 2, 3], [9] * 17, [5]]
RESPONSES = [[4, 5], [6], [8] * 21, [3, 1, 4, 1, 5, 9, 2, 6], [2], [4, 5], [5, 4, 3, 2], [5, 5, 5]]


def naive(model, prompt, response):
    """The definition: one sequence, every logit, float64."""
    logits = np.array(model(mx.array([[*prompt, *response]]))[0].astype(mx.float32), np.float64)
    chosen = logits[len(prompt) - 1 : -1]
    largest = chosen.max(axis=-1)
    normaliser = largest + np.log(np.exp(chosen - largest[:, None]).sum(axis=-1))
    return float(np.mean(normaliser - chosen[np.arange(len(response)), response]))


def expected(model, prompts=PROMPTS, responses=RESPONSES):
    return [naive(model, p, r) for p, r in zip(prompts, responses, strict=True)]


def test_it_is_the_definition_for_shared_prompts_and_mixed_lengths(tiny):
    assert nll(tiny, PROMPTS, RESPONSES) == pytest.approx(expected(tiny), abs=2e-5)


@pytest.mark.parametrize("tokens", [1, 8, 24])
def test_batches_and_slices_of_any_size_agree(tiny, monkeypatch, tokens):
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", tokens)
    monkeypatch.setattr(likelihood, "LOGITS", 3 * 128)
    assert nll(tiny, PROMPTS, RESPONSES) == pytest.approx(expected(tiny), abs=2e-5)


def test_an_untied_head_is_used(tiny):
    from mlx_lm.models.qwen2 import Model, ModelArgs

    args = ModelArgs(**{**vars(tiny.args), "tie_word_embeddings": False})
    model = Model(args)
    mx.eval(model.parameters())
    assert nll(model, PROMPTS, RESPONSES) == pytest.approx(expected(model), abs=2e-5)


def test_a_patched_model_is_read_unsteered(tiny):
    before = nll(tiny, PROMPTS, RESPONSES)
    assert nll(patch(tiny), PROMPTS, RESPONSES) == before


def test_bfloat16_weights_give_a_float32_log_softmax(tiny):
    tiny.set_dtype(mx.bfloat16)
    found = nll(tiny, PROMPTS, RESPONSES)
    assert found == pytest.approx(expected(tiny), abs=0.05)
    assert any(value != float(mx.array(value).astype(mx.bfloat16)) for value in found)


def test_a_prompt_is_computed_once_for_all_its_responses(tiny):
    rows = []
    embed = tiny.model.embed_tokens

    class Counting(type(embed)):
        def __call__(self, tokens):
            rows.append(tokens.shape)
            return super().__call__(tokens)

    embed.__class__ = Counting
    nll(tiny, [[1, 2, 3]] * 6, [[4, 5, 6]] * 6)
    assert rows == [(1, 3), (6, 2)]


def test_memory_does_not_grow_with_the_number_of_responses(tiny):
    def peak(count):
        prompts = [[1 + i % 7] * 40 for i in range(count)]
        responses = [[i % 100] * 60 for i in range(count)]
        mx.clear_cache()
        mx.reset_peak_memory()
        nll(tiny, prompts, responses)
        return mx.get_peak_memory()

    assert peak(800) < 1.1 * peak(200)


def test_no_responses_and_wrong_ones(tiny):
    assert nll(tiny, [], []) == []
    for prompts, responses, message in [
        ([[1]], [], "1 prompts for 0 responses"),
        ([[1], []], [[1], [2]], "prompt 1 is empty"),
        ([[1]], [[]], "response 0 is empty"),
    ]:
        with pytest.raises(InputError, match=message):
            nll(tiny, prompts, responses)


@pytest.mark.parametrize("vocabulary", [100, 128, 151936, 151937])
def test_a_large_vocabulary_is_summed_up_exactly(vocabulary):
    logits = np.random.default_rng(0).normal(scale=2.5, size=(4, vocabulary)).astype(np.float32)
    wanted = np.log(np.exp(logits.astype(np.float64)).sum(axis=-1))
    found = likelihood._log_sum_exp(mx.array(logits))
    np.testing.assert_allclose(np.array(found), wanted, rtol=0, atol=1e-5)


@pytest.mark.checkpoint
def test_the_real_model_agrees_with_its_own_logits(real_model):
    model, tokenizer = real_model
    prompts = [tokenizer.encode("Two and two make")] * 2
    responses = [tokenizer.encode(text) for text in (" four.", " a large green elephant today")]
    found = nll(model, prompts, responses)
    assert found == pytest.approx(expected(model, prompts, responses), abs=1e-4)
    assert found[0] < found[1]
