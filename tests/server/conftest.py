"""One server of each kind for all tests that can share it."""

import functools
from pathlib import Path

import pytest
from server_process import server_process
from serving import serving

from mlx_densesteer import demo, generate, resolve


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
        assert_clean(running.said)


def assert_clean(text):
    """Check that a text for clients, or a log, has no traceback and no path of this machine."""
    assert "Traceback" not in text and "Exception" not in text
    assert str(Path(demo.__file__).parent) not in text and "/site-packages" not in text


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
