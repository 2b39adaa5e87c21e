"""Making responses denser: by a local model, an endpoint, fixed rules, or a file.

This module has what the rewriters share: their input and output, the request to a model, and how
its answer is read.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ...files import whole_characters
from ...generation.answer import split_steps

INSTRUCTION = 1  # version of the wording below; rewrites of another version are made anew

SYSTEM = "You edit worked solutions. You never solve the problem anew."

_REQUEST = """\
Make the solution below denser: the same reasoning in fewer, fuller paragraphs.

- Merge paragraphs that belong together. Put a calculation into the sentence that needs it.
- Leave out headings, step numbers, announcements of what will be done, and sentences that say \
a result a second time.
- Keep every calculation and its result exactly as it is. Add no fact, no step, no calculation \
and no number of your own, and correct nothing.
- Keep the wording where you can, and the final answer in the form in which it stands at the end.
- At most {paragraphs}, with a blank line between two of them.

Answer with the edited solution alone.

Problem:
{question}

Solution:
{response}"""

_PREFACE = re.compile(
    r"^(?:sure|certainly|of course|okay|here(?:'s| is| are)|the (?:edited|rewritten|denser)|"
    r"(?:edited |rewritten |denser )?solution)\b[^\n]*:\s*\n+",
    re.I,
)
_FENCED = re.compile(r"^(`{3,})[a-z]*\n(.*)\n\1$", re.S)
_THOUGHT = re.compile(r"^\s*<think>.*?</think>", re.S)


@dataclass(frozen=True)
class Original:
    """A correct response to make denser; ``tokens`` are those of the target's tokenizer.

    ``prompt`` is the user turn that it answers: the question, and what the task adds to it.
    """

    id: str
    question: str
    response: str
    tokens: int
    prompt: str


@dataclass(frozen=True)
class Rewrite:
    """A denser response; ``truncated`` if the rewriter was cut off.

    A lone surrogate in ``text`` becomes U+FFFD: no tokenizer and no file takes it.
    """

    text: str
    truncated: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", whole_characters(self.text))


class Rewriter(Protocol):
    """Makes responses denser, or shorter.

    ``name`` identifies the rewriter in files: a rewrite under the same name is not asked for
    again. So the name must change with everything that changes the rewrites. ``shorter`` says what is
    asked of a rewrite: to have fewer tokens, or, without it, fewer and denser steps.
    """

    name: str
    shorter: bool = False

    def rewrite(self, originals: Sequence[Original]) -> Iterator[tuple[int, Rewrite | None]]:
        """Yield ``(index, rewrite)`` as each is ready; ``None`` where the rewriter has none."""


def request(original: Original) -> str:
    """Return the user turn that asks a model to make ``original`` denser."""
    most = max(1, len(split_steps(original.response)) // 3)
    return _REQUEST.format(
        paragraphs=f"{most} paragraphs" if most > 1 else "one paragraph",
        question=original.question.strip(),
        response=original.response.strip(),
    )


def read_answer(text: str) -> str:
    """Return the rewrite without a chat model's thoughts, preface and code fence."""
    text = _THOUGHT.sub("", text).strip()
    text = _PREFACE.sub("", text).strip()
    fenced = _FENCED.match(text)
    return fenced[2].strip() if fenced and "```" not in fenced[2] else text
