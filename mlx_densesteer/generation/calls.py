"""Tool calls in an answer: parted from its text while it grows, and read by mlx-lm's parser for the model."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools

from .answer import could_begin

_FENCE = re.compile(r"```\w*\n")
_PART_OF_FENCE = re.compile(r"`{0,2}|```\w*")
_FENCED = re.compile(r"^```\w*\n(.*?)\n?```$", re.DOTALL)


class ToolCall(NamedTuple):
    """A call of a function; ``arguments`` is a JSON object as text. ``id`` is the model's own, if it has one."""

    name: str
    arguments: str
    id: str | None = None


class CallReader:
    """Reads the tool calls in one answer.

    A call that cannot be read stays text, as the model wrote it. Blanks beside a call are dropped. An answer that
    is nothing but the JSON of calls is one too: Qwen2.5-Coder leaves the marks out.

    Args:
        tools: as the chat template got them; some models' arguments are read by their schemas.
        several: whether an answer may have more calls than one; the first is taken.
        bare: whether calls may lack their marks.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        tools: Sequence[Mapping[str, object]],
        *,
        several: bool = True,
        bare: bool = True,
    ):
        self.calls: list[ToolCall] = []
        self._tokenizer, self._tools, self._several = tokenizer, list(tools), several
        self._opens, self._closes = tokenizer.tool_call_start, tokenizer.tool_call_end
        self._at = 0  # characters read so far
        self._blanks = ""  # at the end of the text, told once more text follows
        self._inside = self._called = False  # in a call; just after one
        # Whether the answer may be calls without marks; it is then held back.
        self._bare = bare and tokenizer.tool_parser is json_tools.parse_tool_call
        functions = [tool["function"] for tool in tools]
        self._names = [one["name"] for one in functions if not one.get("strict")]

    def read(
        self, answer: str, *, ended: bool = False, stopped: bool = False
    ) -> tuple[str, list[ToolCall]]:
        """Return the text and the calls that are new in an answer, which grows from one time to the next.

        Args:
            ended: the answer is whole.
            stopped: and it was not cut off: its last call may lack its closing mark.
        """
        text, before = "", len(self.calls)
        self._bare = self._bare and _may_be_bare(answer, self._names)
        if self._bare:
            if ended and stopped:
                self._add(self._without_marks(answer))
            if self.calls or not ended:
                return "", self.calls
            self._bare = False
        while True:
            rest = answer[self._at :]
            if not self._inside:
                at = rest.find(self._opens)
                self._inside = at >= 0
                if not self._inside:
                    at = len(rest) - (0 if ended else could_begin([self._opens], rest))
                text += self._say(rest[:at])
                self._at += at + len(self._opens) * self._inside
                if not self._inside:
                    break
                continue
            inner, mark, found = self._find_call(rest, ended=ended, stopped=stopped)
            if not found and not ended:
                break
            self._at += len(inner) + len(mark)
            if found:
                self._add(found)
                self._blanks, self._called = "", True
            else:
                text += self._say(self._opens + inner + mark)
            self._inside = False
        if ended and not self.calls:
            text, self._blanks = text + self._blanks, ""
        return text, self.calls[before:]

    def _find_call(
        self, rest: str, *, ended: bool, stopped: bool
    ) -> tuple[str, str, list[ToolCall]]:
        """Return the text of a call, its closing mark, and what it calls; nothing if that cannot be read.

        A closing mark may be text within the call: so the next one may end it.
        """
        mark = (
            self._closes or self._opens
        )  # of a model without closing marks the next call ends one
        first = end = rest.find(mark)
        while end >= 0:
            if found := self._parse(rest[:end]):
                return rest[:end], self._closes, found
            end = rest.find(mark, end + 1)
        if ended and stopped and (found := self._parse(rest)):
            return rest, "", found
        if first < 0:
            return rest, "", []
        return rest[:first], self._closes, []

    def _add(self, calls: Sequence[ToolCall]) -> None:
        room = len(calls) if self._several else 1 - len(self.calls)
        self.calls += calls[:room]

    def _say(self, text: str) -> str:
        """Return text to tell: without the blanks at its end, and after a call without those at its beginning."""
        whole = self._blanks + text
        if self._called:
            whole = whole.lstrip()
            self._called = not whole
        told = whole.rstrip()
        self._blanks = whole[len(told) :]
        return told

    def _without_marks(self, answer: str) -> list[ToolCall]:
        """Read one call or more, perhaps in a block of code; none if there is more.

        They have to be of tools that there are, and not of strict ones: no grammar saw them.
        """
        rest = _FENCED.sub(r"\1", answer.strip())
        calls: list[ToolCall] = []
        while rest := rest.strip():
            try:
                value, end = json.JSONDecoder().raw_decode(rest)
            except ValueError:
                return []
            one = _calls(value)
            if (
                not one
                or any(call.name not in self._names for call in one)
                or "arguments" not in value
            ):
                return []
            calls, rest = calls + one, rest[end:]
        return calls

    def _parse(self, inner: str) -> list[ToolCall]:
        try:
            return _calls(self._tokenizer.tool_parser(inner, self._tools))
        except Exception:  # a model's own text: it may be anything
            return []


def _may_be_bare(answer: str, names: Sequence[str]) -> bool:
    """Tell whether an answer, or what it may become, begins with a call of one of these functions."""
    rest = answer.lstrip()
    if fence := _FENCE.match(rest):
        rest = rest[fence.end() :]
    elif _PART_OF_FENCE.fullmatch(rest):
        return bool(names)
    begin = re.sub(r"\s+", "", rest)
    heads = [f'{{"name":"{name}"' for name in names]
    return any(begin.startswith(head) or head.startswith(begin) for head in heads)


def _calls(found: object) -> list[ToolCall]:
    """Return the calls in what mlx-lm's parser returns; none if one of them is no call of an object."""
    calls = []
    for one in found if isinstance(found, list) else [found]:
        name, number = (one.get(key) if isinstance(one, dict) else None for key in ("name", "id"))
        arguments = one.get("arguments", {}) if isinstance(one, dict) else None
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(name, str) or not name or not isinstance(arguments, dict):
            return []
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        calls.append(ToolCall(name, text, number if isinstance(number, str) else None))
    return calls
