import json

import pytest

from mlx_densesteer.errors import InputError
from mlx_densesteer.extraction.pairs import Pair, pairs_sha256, read_pairs

PAIR = Pair("2+3?", "2+3=5.", "2 and 3.\n\n5.")
OURS = {"id": "a", "prompt": "2+3?", "positive": "2+3=5.", "negative": "2 and 3.\n\n5."}


def write(path, *lines, end="\n", start=b""):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_bytes(start + end.join([*texts, ""]).encode())
    return path


def test_our_own_fields(tmp_path):
    systems = [None, "Be brief.", ""]
    file = write(tmp_path / "p.jsonl", *({**OURS, "system": system} for system in systems))
    texts = PAIR.prompt, PAIR.positive, PAIR.negative
    assert read_pairs(file) == [Pair(*texts, system) for system in systems]
    assert len({pairs_sha256([pair]) for pair in read_pairs(file)}) == 3


@pytest.mark.parametrize("names", [("pos_response", "neg_response"), ("resp_after", "resp_before")])
@pytest.mark.parametrize("shape", [lambda text: text, lambda text: [text], lambda text: [[text]]])
def test_the_fields_of_the_reference(tmp_path, names, shape):
    line = {"doc": {"question": PAIR.prompt, "answer": "#### 5"}}
    line |= {names[0]: shape(PAIR.positive), names[1]: shape(PAIR.negative)}
    assert read_pairs(write(tmp_path / "p.jsonl", line)) == [PAIR]
    line["doc.question"] = line.pop("doc")["question"]
    assert read_pairs(write(tmp_path / "p.jsonl", line)) == [PAIR]


def test_byte_order_mark_crlf_and_blank_lines(tmp_path):
    file = write(tmp_path / "p.jsonl", OURS, "", "  ", OURS, end="\r\n", start=b"\xef\xbb\xbf")
    assert read_pairs(file) == [PAIR, PAIR]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: is not JSON"),
        ("[1]", "line 2: is list, expected a JSON object with named fields. Repair or remove the line"),
        ({"prompt": "x"}, "line 2: expected a field positive or pos_response or resp_after; found prompt"),
        ({"doc": "x"}, "line 2: expected a field prompt or doc.question; found doc"),
        ({**OURS, "positive": ["a", "b"]}, "line 2: positive is a list of 2; expected a text"),
        ({**OURS, "negative": 7}, "line 2: negative is int; expected a text"),
        ({**OURS, "negative": " \n"}, "line 2: negative is empty"),
        ({**OURS, "system": 3}, "line 2: system is int"),
        ({**OURS, "prompt": "\ud800"}, "line 2: is not JSON"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_pair_is_named(tmp_path, line, message):
    with pytest.raises(InputError, match=message):
        read_pairs(write(tmp_path / "p.jsonl", OURS, line))


def test_files_that_hold_no_pairs(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_pairs(tmp_path / "p.jsonl")
    with pytest.raises(InputError, match="is empty"):
        read_pairs(write(tmp_path / "p.jsonl", ""))


def test_the_digest_is_that_of_every_text():
    other = [Pair(*["x" if i == j else t for j, t in enumerate(("p", "a", "b"))]) for i in range(3)]
    pairs = [*other, Pair("p", "a", "b"), Pair("p", "a", "b", "s")]
    assert len({pairs_sha256([pair]) for pair in pairs}) == len(pairs)
    assert pairs_sha256(pairs) != pairs_sha256(pairs[::-1])
