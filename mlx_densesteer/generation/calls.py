"""Tool calls in an answer: parted from its text while it grows, and read by mlx-lm's parser for the model."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools

from .answer import could_begin

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
    """

    def __init__(self, tokenizer: TokenizerWrapper, tools: Sequence[Mapping[str, object]]):
        self.calls: list[ToolCall] = []
        self._tokenizer, self._tools = tokenizer, list(tools)
        self._opens, self._closes = tokenizer.tool_call_start, tokenizer.tool_call_end
        self._at = 0  # characters read so far
        self._blanks = ""  # at the end of the text, told once more text follows
        self._inside = False
        # Whether the answer may be calls without marks; it is then held back.
        self._bare = tokenizer.tool_parser is json_tools.parse_tool_call

    def read(
        self, answer: str, *, ended: bool = False, stopped: bool = False
    ) -> tuple[str, list[ToolCall]]:
        """Return the text and the calls that are new in an answer, which grows from one time to the next.

        Args:
            ended: the answer is whole.
            stopped: and it was not cut off: its last call may lack its closing mark.
        """
        text, before = "", len(self.calls)
        self._bare = self._bare and _may_be_bare(answer)
        if self._bare:
            if ended and stopped:
                self.calls = self._without_marks(answer)
            if self.calls or not ended:
                return "", self.calls
            self._bare = False
        while True:
            rest = answer[self._at :]
            if not self._inside:
                at = rest.find(self._opens)
                self._inside = at >= 0
                count = (
                    at
                    if self._inside
                    else len(rest) - (0 if ended else could_begin([self._opens], rest))
                )
                text += self._say(rest[:count])
                self._at += count + len(self._opens) * self._inside
                if not self._inside:
                    break
                continue
            end = rest.find(self._closes or self._opens)
            if end < 0 and not ended:
                break
            whole = end >= 0
            inner = rest[:end] if whole else rest
            self._at += len(inner) + len(self._closes) * whole
            found = self._parse(inner) if whole or stopped else []
            if not found:
                text += self._say(self._opens + inner + self._closes * whole)
            else:
                self._blanks = ""
            self.calls += found
            self._inside = False
        if ended and not self.calls:
            text, self._blanks = text + self._blanks, ""
        return text, self.calls[before:]

    def _say(self, text: str) -> str:
        """Return text to tell: without the blanks at its end, and after a call without those at its beginning."""
        whole = self._blanks + text
        told = whole.rstrip()
        self._blanks = whole[len(told) :]
        return told

    def _without_marks(self, answer: str) -> list[ToolCall]:
        """Read one call or more, of tools that there are, perhaps in a block of code; none if there is more."""
        rest = _FENCED.sub(r"\1", answer.strip())
        names = [tool["function"]["name"] for tool in self._tools]
        calls: list[ToolCall] = []
        while rest := rest.strip():
            try:
                value, end = json.JSONDecoder().raw_decode(rest)
            except ValueError:
                return []
            one = _calls(value)
            if not one or any(call.name not in names for call in one) or "arguments" not in value:
                return []
            calls, rest = calls + one, rest[end:]
        return calls

    def _parse(self, inner: str) -> list[ToolCall]:
        try:
            return _calls(self._tokenizer.tool_parser(inner, self._tools))
        except Exception:  # a model's own text: it may be anything
            return []


def _may_be_bare(answer: str) -> bool:
    """Tell whether an answer, or what it may become, is JSON or a block of code."""
    begin = answer.lstrip()[:3]
    return begin[:1] == "{" or "```".startswith(begin)


def _calls(found: object) -> list[ToolCall]:
    """Return the calls in what mlx-lm's parser returns; none if one of them is no call."""
    calls = []
    for one in found if isinstance(found, list) else [found]:
        name = one.get("name") if isinstance(one, dict) else None
        if not isinstance(name, str) or not name:
            return []
        arguments = one.get("arguments", {})
        text = (
            arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        )
        calls.append(
            ToolCall(name, text, one.get("id") if isinstance(one.get("id"), str) else None)
        )
    return calls
