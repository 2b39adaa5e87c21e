"""The screen of a terminal: answers as Markdown, the settings in force below them. Needs rich.

Finished blocks of an answer are printed once and scroll like any output. Only the block that is being
written is painted again and again.
"""

import contextlib
import io
import itertools
import re
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline, emphasis, escape
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Heading, Markdown
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ..text import count, one_line, printable, unguarded
from .plain import Now, Screen, ShownAnswer
from .rows import Rows

OFTEN = 0.05  # least number of seconds between two paintings
SHARE = 4  # painting takes at most a quarter of the time
COLUMN = 34  # narrowest readable column; with less the answers go below each other


class TerminalScreen(Screen):
    """Show answers as Markdown, receipts dim, and the settings in force while text comes."""

    def __init__(self) -> None:
        plain = {"highlight": False, "markup": False, "emoji": False}
        self._console = Console(file=unguarded(sys.stdout), **plain)
        self._remarks = Console(file=unguarded(sys.stderr), **plain)

    def note(self, text: str) -> None:
        self._remarks.print(printable(text))

    def receipt(self, text: str) -> None:
        self._remarks.print(printable(text), style="dim")

    def warn(self, text: str) -> None:
        self._remarks.print(printable(text), style="bold")

    def answer(self, now: Now) -> ShownAnswer:
        return _Streaming(self._console, now)

    def compare(self, titles: Sequence[str], rows: Rows, now: Now) -> None:
        def answers() -> RenderableType:
            texts = [
                markdown(printable(row.answer))
                if row.answer or row.thought is None
                else Text("thinking ...", style="dim")
                for row in rows.rows
            ]
            if self.width < 2 * COLUMN:
                first, second = (Text(title, style="bold") for title in titles)
                return Group(first, texts[0], Text(), second, texts[1])
            table = Table(*titles, box=box.MINIMAL, expand=True, pad_edge=False, show_edge=False)
            table.add_row(*texts)
            return table

        self._watch(rows, answers, now)

    def table(self, rows: Rows, lines: Callable[[], Sequence[str]], now: Now) -> None:
        self._watch(rows, lambda: Text("\n".join(lines()), no_wrap=True, overflow="crop"), now)

    def _watch(self, rows: Rows, content: Callable[[], RenderableType], now: Now) -> None:
        """Paint ``content`` while the rows run, and leave it there at the end."""
        with _painting(self._console, now) as foot:
            try:
                for _ in rows:
                    if foot.due:
                        foot.paint(content())
            finally:
                rows.stop()
                foot.keep(content())


class _Streaming(ShownAnswer):
    """An answer as Markdown, block by block."""

    def __init__(self, console: Console, now: Now):
        self._text = ""  # of the block that is being written
        self._stack = contextlib.ExitStack()
        self._foot = self._stack.enter_context(_painting(console, now))

    def think(self, thought: str, tokens: int) -> None:
        if self._foot.due:
            last = thought.rpartition("\n")[2] or thought
            folded = Text(
                f"thinking, {count(tokens, 'token')}: {one_line(printable(last)[-200:], 200)}"
            )
            folded.stylize("dim")
            folded.no_wrap, folded.overflow = True, "ellipsis"
            self._foot.paint(folded)

    def feed(self, piece: str) -> None:
        self._text += printable(piece)
        if not self._foot.due:
            return
        *finished, self._text = blocks(self._text)
        if finished:
            self._foot.keep(markdown("".join(finished)))
        self._foot.paint(markdown(self._text))

    def finish(self) -> None:
        with self._stack:
            if text := self._text.rstrip():
                self._foot.keep(markdown(text))


class _Foot:
    """The foot of the screen: the end of the painted content, as much as fits, above the settings."""

    def __init__(self, console: Console, now: Now):
        self._console, self._now = console, now
        self._content: RenderableType = Text()
        self._next = 0.0
        # not redirected: what others write must pass the guard of terminals (text.py)
        self.live = Live(self, console=console, auto_refresh=False, transient=True,
                         redirect_stdout=False, redirect_stderr=False)  # fmt: skip

    @property
    def due(self) -> bool:
        """Whether it is time to paint."""
        return time.monotonic() >= self._next

    def paint(self, content: RenderableType) -> None:
        began = time.monotonic()
        self._content = content
        with _uninterrupted():
            self.live.refresh()
        ended = time.monotonic()
        self._next = ended + max(OFTEN, SHARE * (ended - began))

    def keep(self, content: RenderableType) -> None:
        """Print ``content`` permanently, in place of what is painted."""
        self._content = Text()
        with _uninterrupted():
            self._console.print(Group(content))  # print would take ``no_wrap`` from a bare Text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        settings = self._now().lines(options.max_width, "Ctrl-C stops")
        room = max(1, console.height - len(settings) - 2)
        for line in console.render_lines(self._content, options, pad=False)[-room:]:
            yield from line
            yield Segment.line()
        yield Text("\n".join(settings), style="reverse")


@contextlib.contextmanager
def _painting(console: Console, now: Now) -> Iterator[_Foot]:
    """Paint at the foot of the screen until the block ends; typed keys are not echoed meanwhile."""
    foot = _Foot(console, now)
    with _no_echo():
        try:
            with _uninterrupted():
                foot.live.start()
            yield foot
        finally:
            with _uninterrupted():
                foot.live.stop()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let a Ctrl-C wait until the block ends.

    Half a painting would not know where it stands, and leave the settings among the answers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda *signalled: came.append(signalled))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(*came[0])


@contextlib.contextmanager
def _no_echo() -> Iterator[None]:
    """Keep the terminal from echoing keys; the next prompt reads them."""
    try:
        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
    except (OSError, termios.error):
        yield
        return
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(number, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(number, termios.TCSANOW, before)


def blocks(text: str) -> list[str]:
    """Cut Markdown at its top-level blocks and list items.

    Text that is added later changes only the last one.
    """
    lines = list(io.StringIO(text))
    begin = [
        token.map[0]
        for token in _PARSER.parse(text)
        if (token.level == 0 and token.map and not token.type.endswith("_list_open"))
        or (token.level == 1 and token.type == "list_item_open")
    ]
    borders = [0, *begin[1:], len(lines)]
    return ["".join(lines[a:b]) for a, b in itertools.pairwise(borders)]


def markdown(text: str) -> RenderableType:
    """Return Markdown as rich shows it."""
    return Group(*(_Block(block) for block in blocks(text)))


class _Heading(Heading):
    """A heading at the left margin, in every release of rich."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text


class _Block(Markdown):
    """One block of Markdown as language models write it.

    A single newline is a line break, ``2*3*4`` is a product, ``\\(x\\)`` keeps its backslashes, HTML is
    text. Blank lines stay where the model wrote them: they separate the steps of a solution.
    """

    elements = Markdown.elements | {"heading_open": _Heading}

    def __init__(self, text: str):
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        self._blank_below = re.search(r"\n[^\S\n]*\n\s*$", text) is not None
        self.parsed = _PARSER.parse(text)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = list(Segment.split_lines(super().__rich_console__(console, options)))
        written = [n for n, line in enumerate(lines) if "".join(part.text for part in line).strip()]
        for line in lines[written[0] : written[-1] + 1] if written else []:
            text = "".join(part.text for part in line).rstrip()
            yield from Segment.adjust_line_length(line, cell_len(text), pad=False)
            yield Segment.line()
        if self._blank_below:
            yield Segment.line()


def _emphasis(state: StateInline, silent: bool) -> bool:
    """Find emphasis, except inside a word."""
    state.scanDelims = lambda start, _: StateInline.scanDelims(state, start, False)
    try:
        return emphasis.tokenize(state, silent)
    finally:
        del state.scanDelims


def _escape(state: StateInline, silent: bool) -> bool:
    """Treat a backslash as an escape before Markdown's signs only; LaTeX keeps its own."""
    following = state.src[state.pos + 1 : state.pos + 2]
    return following in {*"*_`#~|"} and escape(state, silent)


_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
_PARSER.disable(["entity", "reference", "lheading"])
_PARSER.inline.ruler.at("emphasis", _emphasis)
_PARSER.inline.ruler.at("escape", _escape)
