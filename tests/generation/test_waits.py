"""One step ahead: how often a loop waits for the device, and that the next step is enqueued before.

A wait costs nothing on the CPU backend, so no speed shows a loop that lets a GPU stand idle.
"""

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator, speculative_generate_step
from mlx_lm.models.cache import make_prompt_cache

import mlx_densesteer as ds
from mlx_densesteer.generation import batch as batch_module
from mlx_densesteer.generation.batch import Batch
from mlx_densesteer.generation.session import Session
from mlx_densesteer.generation.speculation import Draft

PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [8, 9], [10]]


@pytest.fixture
def steering(make_vector):
    return ds.Steering(make_vector(), 1.0, layers=(1, 2))


@pytest.mark.parametrize(
    "options",
    [{}, {"positions": "generated"}, {"positions": "steps"}, {"brake": ds.Brake()},
     {"sampling": ds.Sampling(temp=0.7, top_p=0.9, seed=1)}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("in_session", [False, True], ids=["stream", "session"])
def test_an_answer_waits_once_a_token_and_enqueues_the_next_one_first(
    model, steering, metal_like, options, in_session
):
    options = dict(options)
    steering = ds.Steering(steering.vector, 1.0, (1, 2), options.pop("positions", "all"))

    def say(tokens):
        if in_session:
            pieces = Session(model, steering, max_tokens=tokens, **options).send("2 + 2?")
        else:
            pieces = ds.stream(model, "2 + 2?", steering=steering, max_tokens=tokens, **options)
        metal_like.calls.clear()
        for _ in pieces:
            pass
        assert pieces.result.tokens == tokens
        return metal_like.waits

    assert (say(30) - say(10)) / 20 <= 1
    told = metal_like.calls
    waits = [at for at, name in enumerate(told) if name == "item"]
    assert len(waits) == 10
    for number, at in enumerate(waits[:-1]):
        assert told[:at].count("async_eval") >= number + 2


def waits_a_step(batch, step, metal_like) -> float:
    for _ in range(3):  # read the prompts
        step()
    metal_like.calls.clear()
    for _ in range(10):
        assert step()
    return metal_like.waits / 10


def stock_batch(model, rows):
    stock = BatchGenerator(model.network)
    stock.insert(PROMPTS[:rows], max_tokens=[99] * rows)
    return stock


@pytest.mark.parametrize("rows", [1, 4])
def test_a_batch_waits_as_often_as_that_of_mlx_lm(model, steering, metal_like, rows):
    stock = stock_batch(model, rows)
    wanted = waits_a_step(stock, lambda: stock.next()[1], metal_like)
    with Batch(model) as batch:
        for prompt in PROMPTS[:rows]:
            batch.add(prompt, steering=steering, max_tokens=99)
        assert waits_a_step(batch, lambda: batch.step() or True, metal_like) <= wanted <= 2


@pytest.mark.parametrize("rows", [1, 4])
def test_log_probabilities_wait_once_more_whatever_the_rows(model, metal_like, rows):
    with Batch(model) as batch:
        for number, prompt in enumerate(PROMPTS[:rows]):
            batch.add(prompt, max_tokens=99, logprobs=number)
        batch.add(PROMPTS[0], max_tokens=99)
        assert waits_a_step(batch, lambda: batch.step() or True, metal_like) <= 3


def test_the_likeliest_tokens_are_found_without_sorting_the_vocabulary(monkeypatch):
    """Metal sorts up to 2,048 numbers in one kernel; its partition is a sort too."""
    logprobs = mx.random.normal((3, 151_936), key=mx.random.key(0))
    wanted = mx.argsort(-logprobs, axis=-1)[:, :20].tolist()
    sizes = []
    for name in ("sort", "argsort", "partition", "argpartition", "topk"):
        real = getattr(mx, name)

        def spied(a, *arguments, real=real, **options):
            sizes.append(a.shape[-1])
            return real(a, *arguments, **options)

        monkeypatch.setattr(mx, name, spied)
    assert batch_module._likeliest(logprobs, 20).tolist() == wanted
    assert max(sizes) <= 2048


@pytest.mark.same_bits
def test_log_probabilities_are_those_of_the_vocabulary_sorted(model):
    with Batch(model) as batch:
        rows = [batch.add(PROMPTS[n], max_tokens=4, logprobs=n * 100) for n in (0, 1, 2, 3)]
        told = {row: [] for row in rows}
        while batch.running:
            for piece in batch.step():
                told[piece.row] += piece.logprobs
    for n, row in enumerate(rows):
        tokens = list(PROMPTS[n])
        for one in told[row]:
            logits = model.network(mx.array([tokens]))[0, -1]
            logprobs = logits - mx.logsumexp(logits)
            order = mx.argsort(-logprobs)[: n * 100].tolist()
            assert one.logprob == pytest.approx(logprobs[one.token].item(), abs=1e-4)
            assert [value for _, value in one.top] == pytest.approx(
                logprobs[mx.array(order, mx.int32)].tolist(), abs=1e-4
            )
            assert len({token for token, _ in one.top}) == min(n * 100, model.vocabulary)
            tokens.append(one.token)


def test_speculation_waits_as_often_as_that_of_mlx_lm(model, metal_like):
    draft = Draft(model, 3)
    prompt = [1, 2, 3, 4]

    def ours(tokens):
        assert ds.generate(model, prompt, max_tokens=tokens, draft=draft).tokens == tokens

    def stock(tokens):
        caches = make_prompt_cache(model.network) + make_prompt_cache(model.network)
        steps = speculative_generate_step(
            mx.array(prompt), model.network, model.network, num_draft_tokens=3, max_tokens=tokens,
            prompt_cache=caches,
        )  # fmt: skip
        assert len(list(steps)) == tokens

    found = []
    for say in (ours, stock):
        counts = []
        for tokens in (12, 36):
            metal_like.calls.clear()
            say(tokens)
            counts.append(metal_like.waits)
        found.append(counts[1] - counts[0])
    assert found[0] <= found[1]
    assert found[1] <= 3 * 24  # three for a round, which gives one token or more
