import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper, load
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mlx_densesteer.errors import InputError
from mlx_densesteer.generation.answer import (
    Detokenizer,
    PartialAnswer,
    StopTexts,
    check_limits,
    density,
    split_steps,
    step_starts,
)
from mlx_densesteer.generation.brake import Brake
from mlx_densesteer.model.prompt import decode


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        ("\n\n \n", []),
        ("one", ["one"]),
        ("one\nstill one", ["one\nstill one"]),
        ("one\n\ntwo", ["one", "two"]),
        ("one\n \t\ntwo\n\n\n\nthree\n\n", ["one", "two", "three"]),
        ("one\r\n\r\ntwo", ["one", "two"]),
    ],
)
def test_steps_are_blocks_between_blank_lines(text, steps):
    assert split_steps(text) == steps


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        ("one\n\ntwo\n \t\nthree\n", ["one", "two", "three"]),
        ("So:\n```py\na = 1\n\nb = 2\n```\n\nDone.", ["So:\n```py\na = 1\n\nb = 2\n```", "Done."]),
        ("~~~~\na\n\n~~~\n\nb\n~~~~\n\nend", ["~~~~\na\n\n~~~\n\nb\n~~~~", "end"]),
        ("```\nnever\n\nclosed", ["```\nnever\n\nclosed"]),
        ("```x``` is code\n\nend", ["```x``` is code", "end"]),
        ("The parts:\n\n- a\n\n- b\n\nSum.", ["The parts:", "- a\n\n- b", "Sum."]),
        ("The parts:\n* a\n\n  more of a\n\n* b\n\nSum.", ["The parts:\n* a\n\n  more of a\n\n* b", "Sum."]),
        ("1. First\n\n   - 4 * 2\n\n   = 8\n\n2. Then", ["1. First\n\n   - 4 * 2\n\n   = 8", "2. Then"]),
        ("1. First\n\n1. Then", ["1. First", "1. Then"]),
        ("1. First\n\n 2. Then", ["1. First", "2. Then"]),
        ("10. First\n11. Then\n\n    so\n\n   12. Last", ["10. First\n11. Then\n\n    so", "12. Last"]),
        ("- a\n  * b\n\n  * c\n\n - d", ["- a\n  * b\n\n  * c\n\n - d"]),
        ("- a\n## B\n\n- c", ["- a\n## B", "- c"]),
        ("- a\n```\nx\n```\n\n- b", ["- a\n```\nx\n```", "- b"]),
        ("- a\n  ```\n- x\n\n# y\n  ```\n\n- b", ["- a\n  ```\n- x\n\n# y\n  ```\n\n- b"]),
        ("a\n\n```\nx\n```\n- b\n\n- c", ["a", "```\nx\n```\n- b\n\n- c"]),
        ("1. a\n- b\n\n- c", ["1. a\n- b\n\n- c"]),
        ("-5 + 8 = 3\n\n-1 more", ["-5 + 8 = 3", "-1 more"]),
    ],
)  # fmt: skip
def test_steps_with_code_and_lists_kept_whole(text, steps):
    starts = step_starts(text)
    assert [text[a:b].strip() for a, b in pairwise([*starts, len(text)])] == steps


@given(st.text(alphabet="a `-1.\n \t\r", max_size=40))
def test_whole_steps_begin_where_blocks_begin(text):
    starts = step_starts(text)
    assert len(starts) <= len(split_steps(text)) and bool(starts) == bool(text.strip())
    joined = [text[a:b] for a, b in pairwise([*starts, len(text)])]
    assert [step for one in joined for step in split_steps(one)] == split_steps(text)


def test_density_is_tokens_per_step():
    assert density(90, 4) == 22.5
    assert density(3, 0) is None


def test_limits_are_checked():
    check_limits(1, [])
    check_limits(9, ["\n", "END"])
    with pytest.raises(InputError, match="max tokens 0: expected at least 1"):
        check_limits(0, [])
    with pytest.raises(InputError, match="a stop text is empty"):
        check_limits(1, ["END", ""])


def test_text_is_held_back_only_while_it_could_become_a_stop():
    for text, stop, held in (
        ("abc", "cde", "c"),
        ("abcd", "cde", "cd"),
        ("abcd", "xyz", ""),
        ("aaaa", "aaab", "aaa"),
    ):
        texts = StopTexts([stop])
        texts.feed(text)
        assert (texts.text + texts.held, texts.held) == (text, held)


def test_without_stop_texts_everything_is_said_at_once():
    texts = StopTexts()
    for piece, said in (("one", "one"), ("", "one"), (" two", "one two")):
        texts.feed(piece)
        assert (texts.text, texts.held, texts.stopped) == (said, "", False)


def test_what_was_held_comes_when_it_is_no_stop_text():
    texts = StopTexts(["<end>"])
    texts.feed("a <e")
    assert (texts.text, texts.held) == ("a ", "<e")
    texts.feed("l> <en")
    assert (texts.text, texts.held, texts.stopped) == ("a <el> ", "<en", False)


def test_a_stop_text_ends_it_for_good():
    texts = StopTexts(["STOP", "a"])
    for piece in ("xyST", "OP more a", "late"):
        texts.feed(piece)
    assert (texts.text, texts.held, texts.stopped) == ("xy", "", True)


def test_any_cut_into_pieces_gives_the_text_before_the_first_stop_text():
    rng = random.Random(4)
    for _ in range(300):
        text = "".join(rng.choices("ab", k=rng.randrange(30)))
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 6))) for _ in range(rng.randrange(3))]
        texts, left = StopTexts(stops), text
        while left:
            size = rng.randrange(1, 5)
            texts.feed(left[:size])
            left = left[size:]
            assert not any(stop in texts.text for stop in stops)
        ends = [at for at in map(text.find, stops) if at >= 0]
        said = texts.text + texts.held
        assert texts.stopped == bool(ends)
        if not ends:
            assert said == text
        else:  # two stop texts that overlap: the one that is complete first counts
            first = min(text.find(stop) + len(stop) for stop in stops if stop in text)
            assert text.startswith(said) and len(said) < first


class Letters:
    """A tokenizer of which token N is the N-th letter."""

    has_thinking = False

    def decode(self, tokens, **_):
        return "".join(chr(97 + token) for token in tokens)


def test_text_without_repeats_is_shown_with_each_token():
    answer = PartialAnswer(Letters(), Brake())
    for token in range(26):
        answer.add(token)
        assert answer.show() == chr(97 + token)


@given(st.lists(st.integers(0, 3), max_size=400), st.booleans())
def test_what_was_shown_is_never_taken_back(tokens, rest):
    answer, shown = PartialAnswer(Letters(), Brake(limit=8, window=32)), ""
    for token in tokens:
        answer.add(token)
        shown += answer.show()
        assert answer.text.startswith(shown)
        if answer.loop_start is not None:
            answer = answer.before_the_loop(watch=rest)
            assert answer.text.startswith(shown) and len(answer.ids) >= len(shown)
    assert shown + answer.show_rest() == answer.text


@pytest.fixture(scope="module", params=["words", "bytes", "SentencePiece"])
def tokenizer(request, demo_model, tiny_tokenizer_files):
    """Tokenizers of words or single bytes, and one that strips the space of a text's first word."""
    if request.param == "words":
        return demo_model.tokenizer
    made = load(tiny_tokenizer_files)
    if request.param == "SentencePiece":
        names = ["\u2581a", "\u2581", "b", "\n", "\u2581\u2581"]
        steps = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
        space = decoders.Replace("\u2581", " ")
        steps.decoder = decoders.Sequence([space, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        made = TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=steps))
    return made


CODE = "if x:\n    y = 1\nelse:\n\ty = '\U0001f34e \u00e9 \u65e5\u672c' # <|im_end|>\n\n\n  \r\n"


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(["", " ", "\ufffd"]))
def test_the_text_is_that_of_all_tokens(tokenizer, data, stop):
    """Words, special tokens, characters cut in two, numbers without a token: pieces are ``decode``."""
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), max_size=80))
    if data.draw(st.booleans()):
        code = tokenizer.encode(CODE, add_special_tokens=False)
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(code))] * 2)))
        tokens = code[start:end] + tokens
    whole = decode(tokenizer, tokens)
    stops = (stop,) if stop else ()
    answer, plain = PartialAnswer(tokenizer, stops=stops), PartialAnswer(tokenizer)
    shown, made = "", ""
    for token in tokens:
        made += answer.add(token)
        plain.add(token)
        shown += answer.show()
        assert whole.startswith(made)
        assert plain.text == made
    made += answer.finalize()
    shown += answer.show_rest()
    assert made == whole
    assert shown == answer.text == (whole.partition(stop)[0] if stop else whole)


def test_a_token_takes_no_longer_for_many_bytes_before_it(tokenizer):
    """Bytes that are no text are told after a while, and not decoded again with each token."""
    names = tokenizer.get_vocab()
    if (lone := names.get("\u00e2")) is None:
        pytest.skip("no single bytes")
    detokenizer, most, text = Detokenizer(tokenizer), 0, ""
    for _ in range(500):
        text += detokenizer.add(lone)
        most = max(most, len(detokenizer._tokens))
    assert most < 60
    assert text + detokenizer.finish() == decode(tokenizer, [lone] * 500)
