"""Rewriting without a model, by fixed rules: merge adjacent steps, or leave out what is said twice.

The rules of ``merge_steps`` remove blank lines, headings, the numbers of steps, an announced plan without a
calculation, and sentences that only repeat the last result. Every other sentence, every
calculation, code and the final answer stay. The only thing added is a colon.

``shorten`` removes less and merges nothing: the plan at the beginning, and the words of equations that have numbers.
The model's own way to calculate stays, and with it, so far, its right answers (docs/results.md).
"""

import re
from collections.abc import Iterator, Sequence
from itertools import islice

from ...generation.answer import split_steps
from ..verification import given, written
from . import Original, Rewrite, Rewriter, notation

VERSION = 3  # of the rules; rewrites of another version are made anew

_FENCE = re.compile(r"^\s*(```|~~~)")
_CALCULATION = re.compile(r"=|≈|\\approx")
_ANSWER = re.compile(r"\\boxed|^[^\S\n]*####\s*[-−+$€£¥₹(\\]*[0-9.]", re.M)
_HEADING = re.compile(r"^(?:#{1,6}\s+.*|(?:[0-9]+[.)]\s+|[-*]\s+)?\*\*[^*]+\*\*:?)$")
_RULE = re.compile(r"^[-*_]{3,}$")
_STEP = re.compile(r"^(?:#{1,6}\s+)?(?:\*\*)?step\s+[0-9]+\s*[:.)](?:\*\*)?\s*", re.I)
_ITEM = re.compile(r"^(?:[0-9]+[.)]|[-*•])\s+")
_NUMBERED = re.compile(r"^[0-9]+[.)]\s+")
_ANNOUNCEMENT = re.compile(r"step[- ]by[- ]step|\b(?:these|following|the|few) steps\b", re.I)
_REFERENCE = re.compile(r"[a-z,] steps?\s+[0-9]")  # "the costs from steps 1 and 2"
_SENTENCES = re.compile(
    r"(?<=[.!?:])(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)\s+(?=[A-Z])"
)
_SAID_AGAIN = re.compile(r"^(?:so|thus|therefore|hence|that|this|which)\b", re.I)
_BARE_SUM = re.compile(r"^[-+*/×÷·x().,$%0-9\s]*=[-+*/×÷·x().,$%0-9\s=]*$")
_ENDED = re.compile(r"[.!?:;,)]\**$")
_OWN_LINE = re.compile(r"^(?:[-*•|>]|#{1,6}\s|\\\[|\\begin|\$\$|```|~~~)|(?:\\\]|\$\$|```|~~~)$")

# of ``shorten``
_PARAGRAPH = re.compile(r"\S[^\n]*(?:\n[^\S\n]*\S[^\n]*)*")
_PARAGRAPHS = 12  # that a plan can have, at most
_PLAN = re.compile(
    r"to\s[^\n]*\b(?:we|let['’]s|follow\w*)\b|we (?:need|will|can|must|should|have to)\b|here(?:['’]s| is| are)\b|"
    r"(?:let['’]s|let us) (?:break|calculate|determine|find|first|follow|go|look|see|solve|start|think|use|work)\b",
    re.I,
)
_TASK = re.compile(
    r"\W*(?:[0-9]+\W+)?(?:add|calculate|compare|compute|convert|count|determine|divide|find|identify|multiply|solve|subtract|sum|use)\b",
    re.I,
)
_SAYS_MORE = re.compile(  # than what will be calculated
    r"\\[(\[]|```|~~~|\b(?:know|given that|denote|define|substitut\w*|because|since|therefore)\b",
    re.I,
)
_GOES_ON = re.compile(
    r"(?:next|then|now|so|thus|therefore|hence|also|this|these|that|as|second|secondly|finally)\b|(?:step )?(?:[2-9]|[1-9]\d)[.):]\s|\\\[|\$\$",
    re.I,
)

Block = list[str]  # the lines of a step; only code keeps its blank lines


class RulesRewriter(Rewriter):
    """Merges steps by the rules of this module; ``plain``: formulas become plain text (``notation``)."""

    def __init__(self, *, plain: bool = False):
        self._plain = plain
        self.name = f"rules {VERSION}" + (f", plain {notation.VERSION}" if plain else "")

    def rewrite(self, originals: Sequence[Original]) -> Iterator[tuple[int, Rewrite]]:
        for index, original in enumerate(originals):
            text = original.response
            yield index, Rewrite(merge_steps(notation.plain(text) if self._plain else text))


class BriefRewriter(Rewriter):
    """Leaves out what a response says twice, by ``shorten``; its rewrites are shorter, seldom denser."""

    name = f"brief {VERSION}.{notation.VERSION}"
    shorter = True

    def rewrite(self, originals: Sequence[Original]) -> Iterator[tuple[int, Rewrite]]:
        for index, original in enumerate(originals):
            yield index, Rewrite(shorten(original.response))


def shorten(response: str) -> str:
    """Return ``response`` without the plan at its beginning and without the words of its equations."""
    return notation.without_words(_from_first_calculation(response))


def _from_first_calculation(response: str) -> str:
    """Drop the first paragraphs that only say what will be calculated, if what follows can begin an answer."""
    begin = 0
    for paragraph in islice(_PARAGRAPH.finditer(response), _PARAGRAPHS):
        text, start = paragraph[0], paragraph.start()
        is_plan = _is_plan(text, response[paragraph.end() :])
        indented = start > 0 and response[start - 1] != "\n"
        announced = not is_plan and "\n" in text and _is_list(_lines(text))
        if not (indented or announced or _GOES_ON.match(text)):
            begin = start
        if not is_plan:
            break
    return response[begin:]


def _is_plan(text: str, later: str) -> bool:
    """Tell whether ``text`` only says what ``later`` does: an announcement, or a list of tasks."""
    lines = _lines(text)
    tasks = _is_list(lines) and (not written(text) or all(map(_TASK.match, lines)))
    return (
        bool(_PLAN.match(text) or tasks)
        and not _SAYS_MORE.search(text)
        and _may_go(text, later, later)
    )


def _lines(text: str) -> Block:
    return [line.strip() for line in text.splitlines()]


def merge_steps(response: str) -> str:
    """Return ``response`` with its steps merged into one."""
    blocks = _without_plan(list(_blocks(response)))
    numbered = bool(_REFERENCE.search(response))
    blocks = [kept for block in blocks if (kept := _without_labels(block, numbered))]
    merged = _join(_without_repetition(blocks))
    return merged if split_steps(merged) else response


def _blocks(response: str) -> Iterator[Block]:
    block: Block = []
    fence = ""
    for line in response.strip().splitlines():
        mark = _FENCE.match(line)
        if fence:
            block.append(line)
            if mark and mark[1] == fence:
                yield block
                block, fence = [], ""
        elif mark:
            if block:
                yield block
            block, fence = [line], mark[1]
        elif line.strip():
            block.append(line.strip())
        elif block:
            yield block
            block = []
    if block:
        yield block


def _is_code(block: Block) -> bool:
    return bool(_FENCE.match(block[0]))


def _without_plan(blocks: list[Block]) -> list[Block]:
    """Drop the sentence that announces steps, and the list of what will be calculated."""
    kept: list[Block] = []
    announced = False
    for number, block in enumerate(blocks):
        text, before, later = _text([block]), _text(kept), _text(blocks[number + 1 :])
        if _is_code(block) or not _may_go(text, f"{before}\n{later}", later):
            kept.append(block)
            announced = False
        elif block[0].endswith(":") and _is_list(block[1:]):
            continue
        elif not (announced and _is_list(block)):
            announced = block[-1].endswith(":")
            if rest := _without_announcement(block):
                kept.append(rest)
    return kept


def _text(blocks: list[Block]) -> str:
    return "\n".join(line for block in blocks for line in block)


def _is_list(lines: Block) -> bool:
    return bool(lines) and all(_ITEM.match(line) for line in lines)


def _may_go(text: str, others: str, later: str) -> bool:
    """Tell whether nothing is lost with ``text``: no calculation, no number of its own."""
    return (
        not _CALCULATION.search(text)
        and not _ANSWER.search(text)
        and bool(_CALCULATION.search(later))
        and not _REFERENCE.search(later)
        and written(text) <= given(others)
    )


def _without_announcement(block: Block) -> Block:
    """Drop a last sentence that only announces steps."""
    if len(block) > 1 or not block[0].endswith((".", ":")):
        return block
    *sentences, last = _SENTENCES.split(block[0])
    if not _ANNOUNCEMENT.search(last):
        return block
    return [" ".join(sentences)] if sentences else []


def _without_labels(block: Block, numbered: bool) -> Block:
    """Drop headings and "Step 1:"; numbers of a list too, unless ``numbered``."""
    if _is_code(block):
        return block
    kept = []
    for line in block:
        said = bool(_CALCULATION.search(line) or _ANSWER.search(line))
        if _RULE.match(line) or (_HEADING.match(line) and not said):
            continue
        bare = _STEP.sub("", line)
        if bare != line and not said and not bare.endswith((".", "!")) and not written(bare):
            continue  # "Step 2: The cost of the pens"
        if bare := bare if numbered else _NUMBERED.sub("", bare):
            kept.append(bare)
    return kept


def _without_repetition(blocks: list[Block]) -> list[Block]:
    """Drop sentences whose only number is the result of the calculation before them."""
    text, kept = "", []
    for number, block in enumerate(blocks):
        if _is_code(block):
            kept.append(block)
            continue
        lines = []
        for place, line in enumerate(block):
            later = _text([block[place + 1 :], *blocks[number + 1 :]])
            sentences = _SENTENCES.split(line)
            rest = " ".join(s for s in sentences if not _says_again(s, text, later))
            if rest:
                lines.append(rest)
                text += rest + "\n"
        if lines:
            kept.append(lines)
    return kept


def _says_again(sentence: str, before: str, later: str) -> bool:
    if not _SAID_AGAIN.match(sentence) or _CALCULATION.search(sentence):
        return False
    if _ANSWER.search(sentence) or not (_CALCULATION.search(later) or _ANSWER.search(later)):
        return False
    _, equals, result = before.rpartition("=")
    numbers = written(sentence)
    return bool(equals) and len(numbers) == 1 and numbers <= written(result)


def _join(blocks: list[Block]) -> str:
    text = last = ""
    for block in blocks:
        body, first = "\n".join(block), block[0]
        if not text:
            text = body
        elif _BARE_SUM.match(first) and last.endswith(".") and not _CALCULATION.search(last):
            text = f"{text[:-1]}: {body}"
        elif _OWN_LINE.search(last) or _OWN_LINE.search(first) or not _ENDED.search(last):
            text = f"{text}\n{body}"
        else:
            text = f"{text} {body}"
        last = block[-1]
    return text
