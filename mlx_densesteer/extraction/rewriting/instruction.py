"""What a rewriting model is told, and how its answer is read."""

import re

from .draft import Draft

VERSION = 1  # of the wording: rewrites asked for with another one are made anew

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


def request(draft: Draft, steps: int) -> str:
    """Return the user turn that asks for ``draft``, now of so many ``steps``, to be made denser."""
    most = max(1, steps // 3)
    return _REQUEST.format(
        paragraphs=f"{most} paragraphs" if most > 1 else "one paragraph",
        question=draft.question.strip(),
        response=draft.response.strip(),
    )


def read_answer(text: str) -> str:
    """Return the rewrite without what a chat model says around it."""
    text = _THOUGHT.sub("", text).strip()
    text = _PREFACE.sub("", text).strip()
    fenced = _FENCED.match(text)
    return fenced[2].strip() if fenced and "```" not in fenced[2] else text
