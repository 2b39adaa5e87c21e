r"""The reader of numbers in text and LaTeX, for grading and for the checks of pairs. No mlx.

It reads separators of thousands (``9,500``, ``9{,}500``, ``9\,500``, ``9 500``, ``9'500``,
``12,34,567``, ``1.234.567``), decimal commas where nothing else is meant (``3{,}5``,
``1.234,5``), signs, currencies, units, fractions, mixed numbers, powers, scientific notation,
scales (3.5 million), and the digits, minus signs, fractions and superscripts of Unicode. Values
are exact.
"""

import re
import unicodedata
from collections import deque
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from math import prod

_DIGITS = 1000  # longer numbers are compared digit by digit; powers beyond have no value
_UNIT_LENGTH = 200  # characters


@dataclass(frozen=True)
class Number:
    """A number in a text.

    - ``text``: the number in one typesetting, without currency, unit and separators of thousands.
    - ``value``: exact; ``None`` for what has digits and is no number (3:30, 5-7, 1.2.3, 36\\pi).
    - ``percent``: whether a per cent sign follows.
    - ``scales``: the words after it that ``value`` is multiplied by, as "million".
    """

    text: str
    value: Fraction | Decimal | None
    percent: bool = False
    scales: tuple[str, ...] = ()

    def unscaled(self) -> "Number":
        """Return 3.5 for 3.5 million."""
        value = self.value and self.value / prod(_SCALES[word] for word in self.scales)
        return replace(self, value=value, scales=())

    def equals(self, other: "Number") -> bool:
        """Tell whether both are the same number.

        50% is 0.5, and 50 too: a question that asks for per cent is often answered without the
        sign. Below 1 that reading is too doubtful: 0.5% is not 0.5.
        """
        one, two = self.value, other.value
        if one is None or two is None:
            return False
        if self.percent == other.percent:
            return one == two
        percent, bare = (one, two) if self.percent else (two, one)
        if percent == bare and (abs(bare) >= 1 or bare == 0):
            return True
        return isinstance(percent, Fraction) and percent / 100 == bare


_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))


def _vulgar(sign: str) -> str:
    above, _, below = unicodedata.normalize("NFKC", sign).partition("\u2044")
    return f"\\frac{{{above}}}{{{below}}}"


_CHARACTERS = (
    {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5E)}  # full width; the tilde means a range
    | {ord(sign): "-" for sign in "−﹣‐‑‒–"}
    | dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"), "")
    | {0x2044: "/", 0x2215: "/", ord("٫"): ".", ord("٬"): "'", ord("’"): "'", ord("ʼ"): "'"}
    | {code: _vulgar(chr(code)) for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F), 0x2189)}
)
_SUPER = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_SUB = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_SMALL_FRACTION = re.compile(f"(?<![{''.join(_SUPERSCRIPTS)}])({_SUPER.pattern})/({_SUB.pattern})")
_SMALL = str.maketrans(_SUPERSCRIPTS | _SUBSCRIPTS)
_ANY_DIGIT = re.compile(rf"[\d{''.join(_SUPERSCRIPTS | _SUBSCRIPTS)}]")
_OTHER_DIGIT = re.compile(r"[^\W\D0-9]")  # digits of other scripts

_THIN = "\u00a0\u2002-\u200a\u202f\u205f\u3000"  # spaces that no line breaks at, or thin ones
_SEPARATOR = rf"\{{(?:,|\\,|\\!|\\;)\}}|,?\\[,!;: ][ ]?|~|'|_|[{_THIN}]"
_GROUPS = re.compile(rf"(?<![0-9])[0-9]+(?:(?:{_SEPARATOR})[0-9]+)+")
_GROUPS_OR_SPACE = re.compile(rf"(?<![0-9])[0-9]+(?:(?:{_SEPARATOR}|[ ])[0-9]+)+")
_COLOUR = re.compile(r"\\(?:text)?color\s*\{[^{}]*\}")


def tidy(text: str, *, spaces: bool = False) -> str:
    r"""Return ``text`` with its numbers in ASCII and without LaTeX's and Unicode's separators, and without colours.

    A plain comma or point stays as it is. ``3{,}5`` is 3.5. With ``spaces`` a plain space
    separates thousands too, as in ``9 500``: right in LaTeX, in prose a guess.
    """
    if not text.isascii():
        text = text.translate(_CHARACTERS)
        text = _OTHER_DIGIT.sub(lambda m: str(unicodedata.decimal(m[0], m[0])), text)
        text = _SMALL_FRACTION.sub(lambda m: f"{_ascii(m[1])}/{_ascii(m[2])}", text)
        text = _SUPER.sub(lambda m: f"^{{{_ascii(m[0])}}}", text)
        text = _SUB.sub(lambda m: f"_{{{_ascii(m[0])}}}", text)
    if "color" in text:
        text = _COLOUR.sub("", text)
    return (_GROUPS_OR_SPACE if spaces else _GROUPS).sub(_join, text)


def _ascii(small: str) -> str:
    return small.translate(_SMALL)


def _join(match: re.Match[str]) -> str:
    """Join groups of three digits, and of two as in India; make a lone ``{,}`` a decimal point."""
    groups = re.split(r"[^0-9]+", match[0])
    if match.string[match.start() - 1 : match.start()] == ".":
        return "".join(groups)  # 3.141\,59
    three = all(len(group) == 3 for group in groups[1:])
    indian = len(groups[-1]) == 3 and all(len(group) == 2 for group in groups[1:-1])
    if groups[0][0] != "0" and len(groups[0]) <= 3 and (three or (indian and "," in match[0])):
        return "".join(groups)
    if len(groups) == 2 and "{,}" in match[0]:
        return ".".join(groups)
    return match[0]


_RUN = r"(?:(?<![\w.])\.)?[0-9](?:[0-9.,:/-]*[0-9])?"
_TERM = r"\s*(?:\{\s*-?[0-9.,]+\s*\}|[0-9])"
_FRACTION = rf"\\[dtc]?frac{_TERM}{_TERM}"
_SCALES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12, "dozen": 12,
}  # fmt: skip
_SCALE = f"(?:{'|'.join(_SCALES)})"
_GAP = r"(?:[^\S\n]|[~$*-]|\\[,;:!) ]){0,4}"
_CURRENCY = (
    r"(?:\b[AC]|\bUS)?\\?\$|[€£¥₹₩₽]|\\(?:pounds|euro)\b|\b(?:USD|EUR|GBP|CHF|Rs)(?![A-Za-z])\.?"
)
_NUMBER = re.compile(
    rf"""(?=[-+0-9.$€£¥₹₩₽ACEGRU]|\\[$cdefmpt])
    (?P<sign>[-+][ ]?)?
    (?P<money> (?: (?:{_CURRENCY})[ ]? | \\(?:text|mathrm)\{{\s*(?:{_CURRENCY})\s*\}}\s* ) -?)?
    (?: (?P<run>{_RUN})
        (?: e (?P<e>[-+]?[0-9]+) (?![0-9A-Za-z])
          | \s*(?:\\times|\\cdot|×|·|⋅|\*|x)\s*10\s*\^\s*
            (?P<open>\{{\s*)?(?P<ten>[-+]?[0-9]+)(?(open)\s*\}})
          | \s*\^\s*(?P<brace>\{{\s*)?(?P<power>-?[0-9]+)(?(brace)\s*\}})
          | (?:\s+and)?\s+(?P<mixed>[0-9]+/[0-9]+)(?![0-9/:])
          | \s*(?P<latex>{_FRACTION})
        )?
      | (?P<fraction>{_FRACTION})
    )
    (?P<scales>(?:{_GAP}(?:\\(?:text|mbox|mathrm)\s*\{{\s*)?{_SCALE}s?(?![A-Za-z-])){{1,3}})?
    (?P<percent>\s*(?:\\?%|per[ ]?cent\b|\\text\{{\s*per[ ]?cent\s*\}}))?
    """,
    re.VERBOSE | re.IGNORECASE,
)


def read_number(text: str) -> Number | None:
    r"""Return the number that an answer in LaTeX or words is, or ``None`` if it is something else.

    It may have delimiters, emphasis, ``x =`` before it, a currency and a unit. One letter after a
    number is a variable unless it stands in ``\text``. "12,5" is taken for a list.
    """
    if len(text) > _LONGEST and _NO_PART.search(text.strip()):
        return None
    text = bare(text)
    if styled := _STYLED.fullmatch(text):
        text = bare(styled[1])
    text = _after_equals(re.sub(r"\\(?:left|right)(?![a-zA-Z])", "", text))
    match = _NUMBER.match(text)
    if match is None or not _is_unit((match["scales"] or "") + text[match.end() :]):
        return None
    number = _value(match, negative=_has_minus(match))
    return None if number.value is None else number


def read_only_number(text: str) -> Number | None:
    """Return the only number in ``text``, or that after the last ``=``; ``None`` without any digit.

    Several numbers, or digits that are no number, have the value ``None``.
    """
    if number := read_number(text):
        return number
    before, _, last = text.rpartition("=")
    found = _from_the_end(text if _SEVERAL.search(before) else last, 2)
    if len(found) == 1:
        return found[0]
    return Number(text.strip(), None) if _ANY_DIGIT.search(text) else None


_SEVERAL = re.compile(r"[,;](?![0-9])|\\text\s*\{\s*(?:and|or)\b")


def last_number(text: str) -> Number | None:
    """Return the last number in ``text``.

    Of a text of over 100,000 characters, or 1,000 numbers, only the end is read. Exponents, indices and digits after
    a letter are none. Digits in a time, date, range, root or symbolic fraction are no number on
    their own: the value is ``None``.
    """
    return next(iter(_from_the_end(text, 1)), None)


def decimals(text: str) -> set[Decimal]:
    """Return the numbers written in digits, without sign. 12,5 are two."""
    return {Decimal(number.replace(",", "")) for number in set(_DECIMAL.findall(text))}


_DECIMAL = re.compile(
    r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9])|[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
)
_LONGEST = 100_000  # characters in which the last number is sought; one longer number is whole
_SEEN = 1000  # of a text's last numbers, among which the last is sought that stands for itself
_NO_PART = re.compile(rf"[^\d.,'_~{{}}\\!;:/{_THIN}-]")
_BEFORE = 40  # characters that tell what a number belongs to
_EXPONENT_OR_INDEX = re.compile(r"(?:\^|[A-Za-z0-9})\]]_)\s*\{?\s*$")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]+$")
_PART = re.compile(
    r"(?:√|\\sqrt(?:\[[0-9]*\])?\s*\{?|±|\\pm|\\mp|\}\s*\{|frac\s*\{)\s*-?\s*$"
    r"|(?<!from )(?<![0-9.,$\\])\\?\$?[0-9][0-9.,]* to $"
)
_PART_AFTER = re.compile(
    r"\s*(?:\\pi(?![a-zA-Z])|π|\\sqrt|√)|-\\?[$€£][0-9]"
    r"|\s*(?:\\text\s*\{\s*)?(?:(?:ten|hundred|thousand|million)ths?"
    r"|or (?:more|less|fewer|over|under|above|below|greater|higher|lower))\b"
)


def _from_the_end(text: str, most: int) -> list[Number]:
    """Return the last ``most`` numbers of a text, the last one first."""
    if len(text) > _LONGEST and (cut := _NO_PART.search(text[-_LONGEST::-1])):
        text = text[len(text) - _LONGEST - cut.start() :]
    text = tidy(text, spaces=True)
    found: list[Number] = []
    for match in reversed(deque(_NUMBER.finditer(text), maxlen=_SEEN)):
        start = match.start()
        before = text[max(0, start - _BEFORE) : start]
        bare = match[0][0] in ".0123456789"
        if _EXPONENT_OR_INDEX.search(before) or (bare and _WORD.search(before)):
            continue
        part = _PART.search(before) or _PART_AFTER.match(text, match.end(), match.end() + 30)
        if match["sign"] == "-" and match["money"] and before[-1:].isdigit():
            part = True  # $5-$7
        number = _value(match, negative=_is_negative(match, before))
        found.append(Number(number.text, None) if part else number)
        if len(found) == most:
            break
    return found


def _has_minus(match: re.Match[str]) -> bool:
    return match.group().startswith("-") or (match["money"] or "").endswith("-")


def _is_negative(match: re.Match[str], before: str) -> bool:
    """Tell a minus sign from a dash, a hyphen, a bullet and a subtraction."""
    if not _has_minus(match):
        return before.endswith(("negative ", "Negative "))
    if match["sign"] and match["sign"].endswith(" "):
        return before.rstrip(" ").endswith(("=", "(", "{", "[", "$", "\\approx", "≈"))
    return not re.search(r"[\w)}\]-]$", before)


def _value(match: re.Match[str], negative: bool) -> Number:
    if fraction := match["fraction"]:
        text, value = fraction, _ratio(fraction)
    else:
        text = run = match["run"]
        value = _decimal(run)
        if value is not None:
            text = _plain(run)
        elif run.count("/") == 1:
            value = _ratio(run)  # 12,5 may be a list: no number
        value = value if value is None else _changed(match, value)
        text += match.string[match.end("run") : match.end()]
        text = text.removesuffix((match["scales"] or "") + (match["percent"] or ""))
    scales = tuple(re.findall(_SCALE, (match["scales"] or "").lower()))
    if scales:
        value = value * prod(map(_SCALES.get, scales)) if isinstance(value, Fraction) else None
        text = text if value is None else str(value)
    if negative and value is not None:
        value = value.copy_negate() if isinstance(value, Decimal) else -value  # "-" would round
    text = f"{'-' if negative else ''}{text}{'%' if match['percent'] else ''}"
    return Number(text, value, bool(match["percent"]), scales)


def _changed(match: re.Match[str], value: Fraction | Decimal) -> Fraction | Decimal | None:
    """Apply the exponent, or add the fraction of a mixed number."""
    ten, power = match["e"] or match["ten"], match["power"]
    exponent, part = ten or power, match["mixed"] or match["latex"]
    if not exponent and not part:
        return value
    if isinstance(value, Decimal):
        return None
    if part:
        added = _ratio(part)
        proper = isinstance(added, Fraction) and 0 <= added < 1 and value.denominator == 1
        return value + added if proper else None
    digits = 1 if ten else len(str(value))
    if len(exponent) > 5 or abs(int(exponent)) * digits > _DIGITS or value == 0 != int(exponent):
        return None
    return value * Fraction(10) ** int(exponent) if ten else value ** int(exponent)


def _ratio(text: str) -> Fraction | None:
    """Return the value of ``3/4`` or of a ``\\frac`` of two numbers."""
    if "/" in text:
        parts = text.split("/")
    else:
        parts = re.findall(r"\{\s*([^{}\s]*)\s*\}|([0-9])", text)
        parts = [braced or digit for braced, digit in parts]
    above, below = (_decimal(part.removeprefix("-")) for part in parts)
    if not isinstance(above, Fraction) or not isinstance(below, Fraction) or not below:
        return None
    negative = sum(part.startswith("-") for part in parts) == 1
    return -above / below if negative else above / below


_ENGLISH = re.compile(
    r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}(?:\.[0-9]+)?"
)
_EUROPEAN = re.compile(r"[1-9][0-9]{0,2}(?:(?:\.[0-9]{3}){2,}|(?:\.[0-9]{3})+,[0-9]+)")
_BARE = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")


def _plain(run: str) -> str:
    """Write a run that is one number with a decimal point and without separators."""
    if _EUROPEAN.fullmatch(run):
        run = run.replace(".", "").replace(",", ".")
    return run.replace(",", "")


def _decimal(run: str) -> Fraction | Decimal | None:
    if not _BARE.fullmatch(run):
        if not (_ENGLISH.fullmatch(run) or _EUROPEAN.fullmatch(run)):
            return None
        run = _plain(run)
    run = run.lstrip("0") or "0"
    if "." in run:
        run = run.rstrip("0").rstrip(".") or "0"
    return Fraction(run) if len(run) <= _DIGITS else Decimal(run)


_DELIMITED = re.compile(
    r"\\\((.*)\\\)|\\\[(.*)\\\]|\*\*(.*)\*\*|\{((?:[^{}]|\{[^{}]*\})*)\}|\\displaystyle(?![a-zA-Z])(.*)",
    re.DOTALL,
)
_STYLED = re.compile(
    r"\\(?:text|mbox|mathrm|textbf|mathbf|boldsymbol|bm|mathit|textit)\s*\{([^{}]*)\}"
)


def bare(text: str) -> str:
    """Return an answer tidied, without delimiters of maths, emphasis and a final full stop."""
    text = tidy(text, spaces=True)
    for _ in range(4):
        text = text.strip().removesuffix(".").strip()
        if text.startswith("$") and text.endswith("$"):
            text = text.strip("$")
        elif match := _DELIMITED.fullmatch(text):
            text = next(group for group in match.groups() if group is not None)
        else:
            break
    return text


# what may stand before "=": a name as x_1, f(2), \angle ABC, or a sum of numbers
_NAME = re.compile(
    r"m?(?:\\(?:angle|measuredangle|triangle|overline|alpha|beta|gamma|theta|lambda|mu|phi)\s*)?"
    r"\{?(?:[A-Z]{1,4}|[a-zA-Z])?\}?'?(?:_(?:\w|\{\w+\}))?(?:\([^()=,]*\))?"
    r"|\\(?:text|mathrm)\{[^{}]*\}"
)
_SUM = re.compile(r"(?:[0-9.\s+*/()×÷·{}=-]|\\(?:times|cdot|div|[dt]?frac)(?![a-zA-Z]))*")


def _after_equals(text: str) -> str:
    before, equals, after = text.rpartition("=")
    before = before.strip()
    if not equals or len(before) > _UNIT_LENGTH:
        return text
    return after.strip() if _NAME.fullmatch(before) or _SUM.fullmatch(before) else text


_NO_UNIT = re.compile(
    r"\b(?:(?:ten|hundred|thousand|million)ths?|or|and|if|mod|more|less|over|than|to"
    r"|sin|cos|tan|log|ln|exp|plus|minus|times)\b"
)
_EXPONENT = r"(?:\s*\^\s*(?:\{\s*-?[0-9]\s*\}|[0-9]))?"
_UNIT = re.compile(
    rf"""(?: \s | ~ | \\[,;:!\ ] | \\q?quad(?![a-zA-Z]) | \\?% | ° | \. (?![0-9]) | {_CURRENCY}
      | \^\s*(?:\{{\s*\\circ\s*\}}|\\circ) (?:\s*[CFK]\b)? | \\degree | \\circ
      | \\(?:text|mbox|mathrm|textrm|textit|textbf|mathit|operatorname)\s*
        \{{[^{{}}0-9=]*(?:\^?[23])?\s*\}}{_EXPONENT}
      | (?<![A-Za-z\\])
        (?:[A-Za-zµμΩ]{{3,}}|k?m/(?:hr?|s)|[cmkdnµ][mglL]|ft|in|lb|oz|hr|mi)
        {_EXPONENT}(?![A-Za-z0-9])
      | \\cdot (?=\s*\\(?:text|mathrm)) | / (?=\s*(?:\\(?:text|mathrm)|[A-Za-z]))
    )*""",
    re.VERBOSE,
)


def _is_unit(text: str) -> bool:
    """Tell whether nothing but a unit follows the number."""
    return len(text) <= _UNIT_LENGTH and not _NO_UNIT.search(text) and bool(_UNIT.fullmatch(text))
