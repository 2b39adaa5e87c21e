import random

import pytest
from mlx_densesteer.generation.stopping import Pending, _held_back

from mlx_densesteer.errors import InputError
from mlx_densesteer.generation.answer import check_limits


def test_limits_are_checked():
    check_limits(1, [])
    check_limits(9, ["\n", "END"])
    with pytest.raises(InputError, match="max tokens 0: expected at least 1"):
        check_limits(0, [])
    with pytest.raises(InputError, match="a stop text is empty"):
        check_limits(1, ["END", ""])


def test_text_is_held_back_only_while_it_could_become_a_stop():
    assert _held_back("abc", ["cde"]) == 1
    assert _held_back("abcd", ["cde"]) == 2
    assert _held_back("abcd", ["xyz"]) == 0
    assert _held_back("aaaa", ["aaab"]) == 3
    assert _held_back("abc", []) == 0


def test_without_stop_texts_everything_is_said_at_once():
    pending = Pending()
    assert [pending.feed(piece) for piece in ("one", "", " two")] == ["one", "", " two"]
    assert (pending.text, pending.held, pending.stopped) == ("one two", "", False)
    assert pending.finish() == ""


def test_what_was_held_comes_when_it_is_no_stop_text_or_at_the_end():
    pending = Pending(["<end>"])
    assert pending.feed("a <e") == "a "
    assert (pending.text, pending.held) == ("a ", "<e")
    assert pending.feed("l> <en") == "<el> "
    assert pending.finish() == "<en"
    assert (pending.text, pending.held, pending.stopped) == ("a <el> <en", "", False)


def test_a_stop_text_ends_it_for_good():
    pending = Pending(["STOP", "a"])
    assert pending.feed("xyST") == "xy"
    assert pending.feed("OP more a") == ""
    assert pending.stopped
    assert pending.feed("late") == pending.finish() == ""
    assert (pending.text, pending.held) == ("xy", "")


def test_any_cut_into_pieces_gives_the_text_before_the_first_stop_text():
    rng = random.Random(4)
    for _ in range(300):
        text = "".join(rng.choices("ab", k=rng.randrange(30)))
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 6))) for _ in range(rng.randrange(3))]
        pending, said, left = Pending(stops), "", text
        while left:
            size = rng.randrange(1, 5)
            said += pending.feed(left[:size])
            left = left[size:]
            assert not any(stop in said for stop in stops)
        said += pending.finish()
        ends = [at for at in map(text.find, stops) if at >= 0]
        assert pending.text == said
        assert pending.stopped == bool(ends)
        if not ends:
            assert said == text
        else:  # two stop texts that overlap: the one that is complete first counts
            first = min(text.find(stop) + len(stop) for stop in stops if stop in text)
            assert text.startswith(said) and len(said) < first
