"""Markdown of language models as lines for a terminal, rendered with rich.

It differs from CommonMark where models do: a single newline is a line break, ``2*3*4`` is a
product, ``\\(x\\)`` keeps its backslashes, and HTML is text.
"""

import re

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.rules_inline.escape import escape
from markdown_it.rules_inline.state_inline import Delimiter
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Heading, Markdown

from .blocks import Blocks

_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_ESCAPED = "*_`#~|"


def render(markup: str, console: Console, width: int) -> list[str]:
    """Return a whole text as lines with styles, at most ``width`` columns wide."""
    blocks = Blocks()
    lines: list[str] = []
    for block in [*blocks.feed(markup), blocks.current]:
        if block.strip():
            lines += [*([""] if lines else []), *render_block(block.strip("\n"), console, width)]
    return lines


def render_block(markup: str, console: Console, width: int) -> list[str]:
    """Return one block (``blocks.Blocks``) as lines with styles."""
    with console.capture() as captured:
        console.print(_Answer(markup), width=width)
    lines = [line.rstrip(" ") for line in captured.get().strip("\n").split("\n")]
    if _BLANK_LINE.search(markup):
        return lines
    # a blank line is the border of two steps: none is shown that the model did not write
    return [line for line in lines if _STYLE.sub("", line).strip()]


def has_table(markup: str) -> bool:
    """Tell whether what precedes may change with what follows: columns grow wider."""
    return any(line.lstrip().startswith("|") for line in markup.split("\n"))


class _Heading(Heading):
    """To the left, whatever its level, and without a frame."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text


class _Answer(Markdown):
    elements = Markdown.elements | {"heading_open": _Heading}

    def __init__(self, markup: str):
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        self.parsed = _PARSER.parse(markup)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


def _emphasis(state: StateInline, silent: bool) -> bool:
    """As markdown-it's rule, but never inside a word: ``2*3*4``. An ``_`` never is."""
    marker = state.src[state.pos]
    if silent or marker not in "_*":
        return False
    scanned = state.scanDelims(state.pos, False)
    for _ in range(scanned.length):
        state.push("text", "", 0).content = marker
        state.delimiters.append(
            Delimiter(
                marker=ord(marker), length=scanned.length, token=len(state.tokens) - 1, end=-1,
                open=scanned.can_open, close=scanned.can_close,
            )
        )  # fmt: skip
    state.pos += scanned.length
    return True


def _escape(state: StateInline, silent: bool) -> bool:
    following = state.src[state.pos + 1 : state.pos + 2]
    return bool(following) and following in _ESCAPED and escape(state, silent)


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    parser.disable(["entity", "reference", "lheading", "html_block", "html_inline"])
    parser.inline.ruler.at("emphasis", _emphasis)
    parser.inline.ruler.at("escape", _escape)
    return parser


_PARSER = _parser()
