"""Jobs and events without a thread: the real worker on the demo model."""

import pytest

pytest.importorskip("starlette")

from mlx_densesteer import Sampling, Steering, SteeringVector
from mlx_densesteer.model.block import SteeredBlock
from mlx_densesteer.server.worker import Job, Said, Worker

QUESTION = list(range(20, 60))
NEXT = list(range(60, 70))


def steering(positions="all", strength=2.0):
    return Steering(SteeringVector.load("demo"), strength, (4,), positions)


def answered(worker, tokens, how, **options):
    """Return the tokens of the first answer, and how many of the prompt's were cached."""
    worker.take(Job(tokens, how, 24, Sampling(temp=0.0), **options))
    last = None
    while worker.busy:
        for _, event in worker.work():
            assert isinstance(event, Said)
            last = event if event.choice == 0 and event.piece.result else last
    return list(last.piece.result.token_ids), last.cached_tokens


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        (None, True),
        (steering(), True),
        (steering("generated", 0.0), True),
        (steering("generated"), False),
        (steering("prompt"), False),
        (steering("steps"), False),
    ],
)
@pytest.mark.parametrize("stop", [(), ("\n",)])
def test_an_answer_is_kept_if_it_was_steered_as_its_prompt(demo_model, how, kept, stop):
    worker = Worker(demo_model, rows=4, cache_bytes=2**24)
    answer, _ = answered(worker, QUESTION, how, stop=stop)
    assert len(answer) > 3
    prompt = [*QUESTION, *answer, *NEXT]
    again, cached = answered(worker, prompt, how)
    most = len(QUESTION) + len(answer)
    assert most - 1 <= cached <= most if kept else cached < len(QUESTION)
    anew, none = answered(Worker(demo_model, rows=4, cache_bytes=0), prompt, how)
    assert (again, none) == (anew, 0)


@pytest.mark.parametrize("how", [None, steering()])
def test_answers_to_prompts_that_were_read_together_are_kept_too(demo_model, monkeypatch, how):
    worker = Worker(demo_model, rows=4, cache_bytes=2**24)
    asked, answers = [QUESTION, QUESTION[::-1]], {}
    for tokens in asked:
        worker.take(Job(tokens, how, 24, Sampling(temp=0.0)))
    while worker.busy:
        for job, event in worker.work():
            if isinstance(event, Said) and event.piece.result:
                answers[tuple(job.tokens)] = list(event.piece.result.token_ids)
    computed, call = [], SteeredBlock.__call__

    def spy(self, x, *args, **options):
        computed.append(x.shape[0] * x.shape[1])
        return call(self, x, *args, **options)

    monkeypatch.setattr(SteeredBlock, "__call__", spy)
    for tokens in asked:
        prompt = [*tokens, *answers[tuple(tokens)], *NEXT]
        computed.clear()
        answer, cached = answered(worker, prompt, how)
        assert cached >= len(prompt) - len(NEXT) - 1
        assert sum(computed) <= 6 * (len(NEXT) + len(answer) + 2)


def test_an_answer_to_another_text_is_used_as_far_as_it_goes(demo_model):
    worker = Worker(demo_model, rows=4, cache_bytes=2**24)
    answer, _ = answered(worker, QUESTION, None)
    _, cached = answered(worker, [*QUESTION, *answer[:5], 3, *NEXT], None)
    assert cached == len(QUESTION) + 5


def test_an_exact_worker_and_several_answers_keep_none(demo_model):
    exact = Worker(demo_model, rows=4, cache_bytes=2**24, exact=True)
    several = Worker(demo_model, rows=4, cache_bytes=2**24)
    for worker, options in ((exact, {}), (several, {"n": 2})):
        answer, _ = answered(worker, QUESTION, None, **options)
        _, cached = answered(worker, [*QUESTION, *answer, *NEXT], None)
        assert cached < len(QUESTION)


def test_a_conversation_is_one_entry_that_grows(demo_model):
    worker = Worker(demo_model, rows=4, cache_bytes=2**24)
    prompt, sizes = QUESTION, []
    for _ in range(4):
        answer, _ = answered(worker, prompt, steering())
        assert len(worker.prompts) == 1
        sizes.append(worker.prompts.nbytes)
        prompt = [*prompt, *answer, *NEXT]
    tokens = len(prompt) - len(NEXT)
    per_token = 6 * 2 * 64 * 4  # blocks, keys and values, one head of 64, float32
    assert sizes == sorted(sizes) and sizes[-1] < 1.2 * tokens * per_token
