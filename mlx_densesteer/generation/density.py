"""Steps and density of a response: pure functions on text and counts.

Source: arXiv 2605.29247, section 2. A step is a block of the response; blocks are
separated by a blank line. Density is tokens per step, rho = N_tokens / N_steps.
"""

import re

_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")


def split_steps(text: str) -> list[str]:
    """Return the steps of a response, stripped, in order; blank blocks are none."""
    return [step.strip() for step in _BLANK_LINE.split(text) if step.strip()]


def density(tokens: int, steps: int) -> float | None:
    """Return tokens per step, or ``None`` for a response without a step."""
    return tokens / steps if steps else None
