"""Reading tool calls: whatever pieces an answer comes in, and whatever a model writes."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tool_parsers import json_tools, mistral, qwen3_coder

from mlx_densesteer.generation.calls import CallReader, ToolCall


def tokenizer(module):
    return SimpleNamespace(
        tool_call_start=module.tool_call_start,
        tool_call_end=module.tool_call_end,
        tool_parser=module.parse_tool_call,
    )


QWEN = tokenizer(json_tools)
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
INNER = '<tool_call>{"name": "add", "arguments": {"a": "</tool_call>"}}</tool_call>'
BARE = '{"name": "add", "arguments": {"a": 1}}'
CALLED = ToolCall("add", '{"a": 1}')


TOOLS = [{"type": "function", "function": {"name": "add"}}]


def read(text, module=QWEN, *, cuts=(), stopped=True):
    """Return content and calls of a text that grows piece by piece."""
    reader = CallReader(module, TOOLS)
    content, calls = "", []
    for end in [*sorted(cut for cut in cuts if cut < len(text)), len(text)]:
        more, new = reader.read(text[:end])
        content, calls = content + more, calls + new
    more, new = reader.read(text, ended=True, stopped=stopped)
    assert calls + new == reader.calls
    return content + more, reader.calls


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Just text.\n", "Just text.\n", 0),
        ("", "", 0),
        (ADD, "", 1),
        (f"I add.\n{ADD}\n{ADD}\n", "I add.", 2),
        (f"{ADD}\n and so", "and so", 1),
        (INNER, "", 1),  # the mark as text
        (f"{INNER} x </tool_call>", "x </tool_call>", 1),
        (
            '<tool_call>{"name": "add", "arguments": 5}</tool_call>',
            '<tool_call>{"name": "add", "arguments": 5}</tool_call>',
            0,
        ),
        (
            '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
            '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
            0,
        ),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", 1),
        ("a < b <tool", "a < b <tool", 0),
        ("<tool_call>\nno JSON\n</tool_call> x", "<tool_call>\nno JSON\n</tool_call> x", 0),
        ("<tool_call>\n[1]\n</tool_call>", "<tool_call>\n[1]\n</tool_call>", 0),
        ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', 0),
        (ADD[:-13], "", 1),  # a stop text took the mark
        (ADD[:30], ADD[:30], 0),
        (BARE, "", 1),
        (f" {BARE}\n{BARE}\n", "", 2),
        (f"```json\n{BARE}\n```", "", 1),
        (f"```json\n{BARE}\n```\nSo.", f"```json\n{BARE}\n```\nSo.", 0),
        (BARE.replace("add", "sub"), BARE.replace("add", "sub"), 0),  # no such tool
        ('{"name": "add"}', '{"name": "add"}', 0),
        ("``x``", "``x``", 0),
        (f"So: {BARE}", f"So: {BARE}", 0),
        (BARE[:-1], BARE[:-1], 0),
    ],
)
@pytest.mark.parametrize("cuts", [(), range(1, 200), (12, 30, 45)])
def test_text_and_calls_are_parted(text, content, calls, cuts):
    called = CALLED if '</tool_call>"' not in text else ToolCall("add", '{"a": "</tool_call>"}')
    assert read(text, cuts=cuts) == (content, [called] * calls)


def test_text_is_held_back_only_while_it_may_be_a_call():
    for text, until in (
        ('{"name": "sub"', 11), ("```python\nx = 1\n```", 11), ("```js", None), ('{"name": "add", "x"', None),
        ('```json\n{"names"', 15), ("x", 1),
    ):  # fmt: skip
        reader = CallReader(QWEN, TOOLS)
        told = [bool(reader.read(text[:end])[0]) for end in range(1, len(text) + 1)]
        assert (told.index(True) + 1 if True in told else None) == until, text
    bare = CallReader(QWEN, TOOLS, bare=False)  # of an answer in JSON
    assert bare.read(BARE, ended=True, stopped=True) == (BARE, [])


def test_one_call_alone_and_strict_tools():
    for text in (f"{ADD}\n{ADD}", f"{BARE}\n{BARE}"):
        reader = CallReader(QWEN, TOOLS, several=False)
        assert reader.read(text, ended=True, stopped=True) == ("", [CALLED])
    strict = [{"type": "function", "function": {"name": "add", "strict": True}}]
    assert CallReader(QWEN, strict).read(BARE, ended=True, stopped=True) == (BARE, [])
    assert CallReader(QWEN, strict).read(ADD, ended=True, stopped=True) == ("", [CALLED])


def test_a_call_that_was_cut_off_stays_text():
    assert read(ADD[:-13], stopped=False) == (ADD[:-13], [])


def test_other_formats():
    text = '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]add[ARGS]{"a": 1}'
    assert read(text, tokenizer(mistral)) == ("", [CALLED, CALLED])
    text = "Yes.\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    assert read(text, tokenizer(qwen3_coder)) == ("Yes.", [ToolCall("add", '{"a": "1"}')])


@given(st.lists(st.sampled_from([ADD, "<tool_call>", "</tool_call>", "x", " ", "\n", "{", ADD[:20], BARE, "```", "```json\n", "`"])),
       st.sets(st.integers(1, 300)))  # fmt: skip
def test_pieces_do_not_matter(parts, cuts):
    text = "".join(parts)
    assert read(text, cuts=cuts) == read(text)
