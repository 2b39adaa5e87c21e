"""The numbers in a text: what a rewrite may mention, and what it adds. No mlx."""

import re
from decimal import Decimal

_NUMBER = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9])|[0-9]+(?:\.[0-9]+)?|\.[0-9]+")
# begins where digits begin: from inside a long number it would be tried again and again
_PERCENT = re.compile(r"((?<![0-9])[0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(?:\\?%|percent\b)")
_LATEX_COMMA = re.compile(r"(?<=[0-9])(?:\{,\}|\\,|\\!|,\\!)(?=[0-9]{3})")
_LABEL = re.compile(
    r"^[ \t]*(?:[#>*-]+[ \t]*)?(?:\*\*)?(?:step[ \t]+)?[0-9]+[.):](?:\*\*)?[ \t]", re.I | re.M
)
_UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {
    **{word: (str(n),) for n, word in enumerate(_UNITS)},
    **{word: (str(10 * n),) for n, word in enumerate(_TENS, 2)},
    "hundred": ("100",), "thousand": ("1000",), "million": ("1000000",), "dozen": ("12",),
    "once": ("1",), "twice": ("2",), "double": ("2",), "doubles": ("2",), "doubled": ("2",),
    "triple": ("3",), "triples": ("3",), "tripled": ("3",), "thrice": ("3",),
    "half": ("0.5", "1", "2"), "halves": ("0.5", "1", "2"), "third": ("1", "3"),
    "thirds": ("3",), "quarter": ("0.25", "1", "4"), "quarters": ("0.25", "4"),
    "fourth": ("1", "4"), "fourths": ("4",), "fifth": ("0.2", "1", "5"), "fifths": ("0.2", "5"),
    "percent": ("100",),
}  # fmt: skip
_WORD = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b", re.I)
_COMPOUND = re.compile(rf"\b({'|'.join(_TENS)})[- ]({'|'.join(_UNITS[1:10])})\b", re.I)


def written(text: str) -> set[Decimal]:
    """Return the numbers that ``text`` writes in digits, without sign.

    2.50 is 2.5, and 1,000 is 1000, with LaTeX's commas too. The number of a step or of a list
    item at the start of a line is none.
    """
    return {Decimal(n.replace(",", "")) for n in _NUMBER.findall(_LABEL.sub("", _plain(text)))}


def given(text: str) -> set[Decimal]:
    """Return the numbers that ``text`` gives in any form, without sign.

    In digits, labels included; as English words ("twenty-five", "half", "a dozen"); and 35 %
    gives 0.35 and 100 as well.
    """
    text = _plain(text)
    found = {Decimal(number.replace(",", "")) for number in _NUMBER.findall(text)}
    for percent in _PERCENT.findall(text):
        found |= {Decimal(f"{percent}e-2"), Decimal(100)}
    for word in _WORD.findall(text):
        found |= {Decimal(number) for number in _WORDS[word.lower()]}
    for tens, units in _COMPOUND.findall(text):
        found.add(10 * (2 + _TENS.index(tens.lower())) + Decimal(_UNITS.index(units.lower())))
    return found


def _plain(text: str) -> str:
    return _LATEX_COMMA.sub(",", text)
