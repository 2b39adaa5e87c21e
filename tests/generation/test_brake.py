import random

import pytest

from mlx_densesteer.errors import InputError
from mlx_densesteer.generation.brake import Brake, Repetition

WORDS = ["we", "first", "then", "add", "take", "number", "shells", "boxes", "and", "each", "left"]
DEFAULT = Brake()


def tokens(text: str) -> list[int]:
    """Words, digits and signs as tokens: like Qwen's tokenizer, a digit at a time."""
    spaced = "".join(c if c.isalpha() else f" {c} " for c in text.replace("\n", " ~ "))
    return [token_of(word) for word in spaced.split()]


def token_of(word: str) -> int:
    return int.from_bytes(word.encode()[:6], "big")


def prose(length: int, seed: int) -> list[int]:
    """Tokens in no order, as in text that does not repeat itself."""
    return random.Random(seed).choices(range(1000, 3000), k=length)


def watch(ids: list[int], brake: Brake = DEFAULT) -> tuple[Repetition, list[int]]:
    """Feed ``ids`` and return the watch and ``safe`` after each token."""
    repetition, safe = Repetition(brake), []
    for token in ids:
        repetition.feed(token)
        safe.append(repetition.safe)
    return repetition, safe


@pytest.mark.parametrize("period", [1, 2, 3, 5, 6, 13, 40, 80])
def test_of_a_loop_the_first_turn_stays_and_three_tokens_of_the_second(period):
    start = prose(40, 1)
    repetition, _ = watch(start + list(range(period)) * (4 + 400 // period))
    assert repetition.loop_start == 40 + period + 3  # text that was shown stays


def test_a_loop_from_the_first_token_leaves_one_gram():
    assert watch([7] * 100)[0].loop_start == 4


def test_a_counter_does_not_hide_a_loop():
    item = "Subtract the weight of the comic books from the total weight to find how much is left."
    text = "\n".join(f"{number}. {item}" for number in range(5, 60))
    repetition, _ = watch(prose(30, 2) + tokens(text))
    assert 30 <= repetition.loop_start < 30 + 2 * len(tokens(item)) + 8


def test_two_words_in_no_order_are_a_loop():
    rng = random.Random(3)
    babble = rng.choices([1, 2], weights=[8, 1], k=400)
    repetition, _ = watch(prose(30, 4) + babble)
    assert repetition.loop_start is not None
    assert 30 <= repetition.loop_start < 130


def test_a_limit_says_when():
    for limit in (16, 64, 100):
        repetition = Repetition(Brake(limit=limit))
        fed = 0
        while repetition.loop_start is None:
            repetition.feed(7)
            fed += 1
        assert fed == limit + 4 + 3 - 1


def test_a_period_beyond_a_third_of_the_window_is_no_loop():
    start = prose(20, 5)
    assert watch(start + list(range(85)) * 8)[0].loop_start is not None
    assert watch(start + list(range(86)) * 8)[0].loop_start is None
    assert watch(start + list(range(86)) * 8, Brake(window=300))[0].loop_start is not None


def legitimate() -> dict[str, str]:
    equations = "\n".join(
        f"{a} + {b} = {a + b}, {a} * {b} = {a * b};" for a in range(2, 12) for b in range(2, 9)
    )
    rows = "\n".join(f"| day {n} | {n * 7 % 31} apples | ${n * n % 97}.50 |" for n in range(1, 40))
    code = "\n".join(
        f"def test_{name}(self):\n    value = {name}({n}, {n * 13 % 11})\n    self.assertEqual(value, {n * 17 % 23})"
        for n, name in enumerate(WORDS)
    )
    derivation = "\n".join(
        f"= (x^2 + {a}x - {b}) / (2x + {a + b}) + {a * b} * sqrt(x^2 + y^2)"
        for a, b in zip(range(3, 33), range(40, 70), strict=True)
    )
    sentence = "Each of the seven boxes holds four shells, so that there are twenty-eight in all. "
    return {
        "equations": equations,
        "table": "| day | apples | cost |\n| --- | --- | --- |\n" + rows,
        "code": code,
        "derivation": derivation,
        "counting": ", ".join(str(n) for n in range(1, 150)),
        "a decimal": "1 / 3 = 0." + "3" * 40,
        "a sum of ones": " + ".join("1" * 30) + " = 30",
        "the same sentence three times": sentence * 3,
        "the same long text twice": " ".join(random.Random(6).choices(WORDS, k=300)) * 2,
    }


@pytest.mark.parametrize("kind", legitimate())
def test_what_may_be_repeated(kind):
    repetition, safe = watch(prose(30, 7) + tokens(legitimate()[kind]) + prose(40, 8))
    assert repetition.loop_start is None
    assert safe[-1] == len(safe)  # all of it was shown in the end


def test_new_text_is_shown_at_once():
    _, safe = watch(prose(200, 9))
    assert safe == list(range(1, 201))


def test_what_comes_again_is_held_back_and_shown_when_it_is_new_again():
    passage = prose(30, 10)
    between, rest = prose(20, 11), prose(30, 12)
    _, safe = watch(passage + between + passage + rest)
    assert safe[52] == 53  # three tokens of the copy were read and shown
    assert safe[53] == safe[79] == 53  # from the fourth on the copy waits
    assert safe[80 + 8] == 89  # 27 up, 3 down each: shown again after 9 new tokens
    assert safe[-1] == 110


def test_safe_never_falls_and_no_cut_goes_below_it():
    rng = random.Random(13)
    found = 0
    for _ in range(300):
        brake = Brake(limit=rng.choice([8, 16, 64]), window=rng.choice([64, 256]))
        ids: list[int] = []
        while len(ids) < 300:
            few = range(rng.choice([1, 2, 3, 6, 300]))
            ids += rng.choices(few, k=rng.randrange(1, 12)) * rng.randrange(1, 12)
        repetition = Repetition(brake)
        for _ in range(4):  # as in an answer: cut, and go on with what follows
            shown, fed = repetition.safe, 0
            for token in ids:
                repetition.feed(token)
                assert repetition.safe >= shown
                shown, fed = repetition.safe, fed + 1
                if repetition.loop_start is not None:
                    break
            if repetition.loop_start is None:
                break
            found += 1
            assert repetition.loop_start == repetition.safe == shown
            repetition = repetition.after()
            assert repetition.loop_start is None
            assert repetition.safe == shown
    assert found > 300


def test_after_a_cut_the_answer_goes_on():
    start = prose(40, 14)
    repetition = watch(start + [7] * 100)[0].after()
    for token in prose(60, 15):
        repetition.feed(token)
    assert (repetition.loop_start, repetition.safe) == (None, 104)
    again = watch(start + [7] * 100)[0].after()
    for _ in range(100):
        again.feed(7)
    assert again.loop_start == 44


def test_after_without_a_loop_is_the_same_watch():
    repetition, _ = watch(prose(50, 16))
    assert repetition.after().safe == repetition.safe == 50


def test_a_found_loop_stays_where_it_is():
    repetition, _ = watch([7] * 100)
    for token in prose(100, 17):
        repetition.feed(token)
    assert (repetition.loop_start, repetition.safe) == (4, 4)


def test_the_values_are_checked():
    assert Brake() == Brake(factor=0.5, tries=3, limit=64, window=256)
    Brake(factor=0.0, tries=1, limit=4, window=4)
    for factor in (-0.1, 1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="brake factor .*: expected 0 or more, below 1"):
            Brake(factor=factor)
    with pytest.raises(InputError, match="brake tries 0: expected at least 1"):
        Brake(tries=0)
    with pytest.raises(InputError, match="brake limit 3: expected at least 4 tokens"):
        Brake(limit=3)
    with pytest.raises(InputError, match="brake window 63: expected at least limit = 64"):
        Brake(window=63)
