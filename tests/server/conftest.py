"""One server of each kind for all tests that can share it."""

import functools

import pytest
from server_process import assert_no_internals, server_process
from serving import serving

from mlx_densesteer import generate, resolve


@pytest.fixture(scope="session")
def server():
    """The demo model and its vector at a dose of 20 %, served in this process."""
    with serving() as running:
        yield running


@pytest.fixture(scope="session")
def process():
    """`densesteer serve -m demo` as its user starts it; at the end its output is searched for leaks."""
    with server_process() as running:
        yield running
        assert_no_internals(running.said)


@pytest.fixture(scope="session")
def solo(demo_model):
    """Return a function that answers alone, as `densesteer generate` does; each answer is made once."""

    @functools.cache
    def answer(prompt, strength=0, layers=(5,), positions="all", **options):
        steering = resolve(demo_model, "demo", strength, layers, positions)
        if isinstance(prompt, tuple):
            messages = [dict(message) for message in prompt]
            prompt = list(
                demo_model.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            )
        return generate(demo_model, prompt, steering=steering, **options)

    answer.model = demo_model
    return answer
