import pytest

from mlx_densesteer.generation.answer import density, split_steps


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        ("\n\n \n", []),
        ("one", ["one"]),
        ("one\nstill one", ["one\nstill one"]),
        ("one\n\ntwo", ["one", "two"]),
        ("one\n \t\ntwo\n\n\n\nthree\n\n", ["one", "two", "three"]),
        ("one\r\n\r\ntwo", ["one", "two"]),
    ],
)
def test_steps_are_blocks_between_blank_lines(text, steps):
    assert split_steps(text) == steps


def test_density_is_tokens_per_step():
    assert density(90, 4) == 22.5
    assert density(3, 0) is None
