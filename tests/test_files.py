"""Files: the JSON reader and the atomic writers that every room uses."""

import json

import pytest

from mlx_densesteer.errors import InputError, SessionError
from mlx_densesteer.files import MAX_JSON_DEPTH, parse_json


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1] 2", "not JSON"),
        (b"NaN", "the number NaN is not finite"),
        (b"[-Infinity]", "the number -Infinity is not finite"),
        (b"[1e999]", "the number 1e999 is not finite"),
        (b"1" * 100_000, "more than 64 bits"),
        (b"18446744073709551616", "more than 64 bits"),
        (b"-9223372036854775809", "more than 64 bits"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * (MAX_JSON_DEPTH + 1) + b"]" * (MAX_JSON_DEPTH + 1), "nested too deeply"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested too deeply"),
        (b'"\\ud800"', "half of a surrogate pair"),
        (b'{"\\uDFFF": 1}', "half of a surrogate pair"),
        (b'{"a": 1, "b": {"%s": 1, "%s": 2}}' % (b"k" * 9999, b"k" * 9999), "is there twice"),
        (b'"\xff"', "not UTF-8 (byte 0xff at 1)"),
        ("{}".encode("utf-16"), "UTF-16"),
        (b'"' + b"x" * 2**20 + b'"', "expected at most 1,048,576"),
    ],
)
def test_json_that_cannot_be_used_is_refused_in_a_few_words(data, found):
    with pytest.raises(SessionError) as caught:
        parse_json(data, "x.json", error=SessionError, limit=2**20, remedy="Save it again.")
    assert found in str(caught.value) and str(caught.value).startswith("x.json: ")
    assert len(str(caught.value)) < 160


@pytest.mark.parametrize(
    "value",
    [
        None,
        "😀 é \u2028",
        2**64 - 1,
        -(2**63),
        [1.5, -0.0, 1e308],
        {"a": [{"b": {}}], "": "\\ud800"},
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_json_is_read_as_it_was_written(value, ascii_only):
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert parse_json(data, "x") == parse_json(data.decode(), "x") == value
    assert parse_json(b"\xef\xbb\xbf" + data, "x") == value


def test_a_tokenizers_largest_length_is_read_on_request():
    assert parse_json(b"%d" % 10**30, "tokenizer_config.json", bits=128) == 10**30
    with pytest.raises(InputError, match="more than 64 bits"):
        parse_json(b"%d" % 10**30, "config.json")
