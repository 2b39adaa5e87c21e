r"""Formulas of an answer as plain text: LaTeX's layout takes tokens and calculates nothing.

``\[ 7 \times \text{pens} = \frac{a}{b} \]`` becomes ``7 × pens = a / b``, behind the words that announce it. A formula
that plain text could not say in the same way stays as it is: one with another command, or with a
fraction beside something that would read it otherwise. So does code, and ``\boxed``, which marks the answer.

``without_words`` keeps LaTeX and leaves out the words that an equation begins with: ``\[ \text{cost} = 7 \times 2 = 14 \]``
becomes ``\[ 7 \times 2 = 14 \]``.
"""

import re

VERSION = 2  # rewrites of another version are made anew

_FORMULA = re.compile(
    r"""
    (?P<code>
        ^[^\S\n]*+(?P<fence>`{3,}|~{3,}).*?(?:^[^\S\n]*+(?P=fence)|\Z)
        | (?<!`)(?P<tick>``?)(?!`)[^\n]*?(?<!`)(?P=tick)(?!`)
    )
    | (?P<colon>:?)(?<!\s)(?P<gap>\s*+)(?<!\\)\\(?P<open>[(\[])
      (?P<inner>(?:[^\\]|\\[^()\[\]])*+)
      \\(?P<close>[)\]])
    """,
    re.M | re.S | re.X,
)
_WORD = "\0"  # on both sides of words: a fraction may stand before them
_WORDS = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}\\]*)\}")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\,|,\\!)(?=\d{3})")
_SYMBOL = re.compile(r"\\(?:[A-Za-z]+|.)", re.S)
_SYMBOLS = {
    r"\times": "×", r"\cdot": "×", r"\div": "÷", r"\approx": "≈", r"\neq": "≠", r"\leq": "≤", r"\geq": "≥",
    r"\implies": "→", r"\Rightarrow": "→", r"\rightarrow": "→", r"\left": "", r"\right": "", r"\quad": " ",
    r"\%": "%", r"\$": "$", r"\,": " ", r"\;": " ", r"\!": "", r"\ ": " ",
}  # fmt: skip
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}\\]*)\}\{([^{}\\]*)\}")
_DEPTH = 4  # fractions within fractions
# A part of a fraction that needs no parentheses: a number, a variable, words.
_ALONE = re.compile(r"\$?\d[\d,.]*%?|[A-Za-z](?:_\w)?|\0[^\0\s]+\0")
# What may stand beside a fraction; besides, words may follow it, if no operator follows them.
_BEFORE = re.compile(r"(?:^|[-−+×÷/=≈≠≤≥<>→,({^])$")
_AFTER = re.compile(r"$|[-−+×÷=≈≠≤≥<>→,;)}^]|\.(?!\d)|\0[^\0]*\0\s*(?:$|[-−+=≈,.;)→])")
_BOX = re.compile(r"\\boxed\{[^{}\\]*\}")
# A side of an equation that is words: labels, alone or in fractions, sums and products.
_LABELS = re.compile(r"(?:\\(?:[dt]?frac|times|cdot|div|left|right)(?![A-Za-z])|[-+/(){}\s\0])*")
_SEVERAL = re.compile(
    r"\\\\|&|;|,(?!\d{3})|[<>]|\\(?:quad|qquad|implies|Rightarrow|rightarrow|begin)(?![A-Za-z])"
)


def plain(response: str) -> str:
    """Return ``response`` with its formulas as plain text, where that says the same."""
    return _FORMULA.sub(_plain, response)


def without_words(response: str) -> str:
    r"""Return ``response`` with each displayed formula, ``\[...\]``, on one line, and what it says in words left out.

    The words go that an equation begins with, if two sides with numbers remain; not those that tell it from an equation right
    before or after it. If a formula that stays uses such words, all of them stay.
    """
    gone: list[str] = []
    made = _FORMULA.sub(lambda found: _without_words(found, gone), response)
    used = {words.strip() for words in _WORDS.findall(made)}
    return (
        _FORMULA.sub(lambda found: _without_words(found, None), response)
        if used & {*gone}
        else made
    )


def _without_words(found: re.Match[str], gone: list[str] | None) -> str:
    """Return a formula without the sides that are words, which go to ``gone``; with ``None`` they stay."""
    inner = found["inner"]
    if (
        found["code"]
        or (found["open"], found["close"]) != ("[", "]")
        or re.search(r"(?<!\\)%", inner)
    ):
        return found[0]
    shown = inner.strip()
    if (
        gone is not None
        and not _SEVERAL.search(_THOUSANDS.sub(",", inner))
        and not _has_neighbour(found)
    ):
        sides = shown.split("=")
        first = next((n for n, side in enumerate(sides) if not _is_words(side)), 0)
        numbers = sum(bool(re.search(r"\d", side)) for side in sides[first:])
        if first and numbers > 1:
            gone += [words.strip() for side in sides[:first] for words in _WORDS.findall(side)]
            shown = "=".join(sides[first:]).strip()
    return f"{found['colon']}{found['gap']}\\[ {shown} \\]"


def _has_neighbour(found: re.Match[str]) -> bool:
    """Tell whether another displayed formula stands right before or after this one."""
    start = found.start() + len(found["colon"])
    before, after = found.string[max(0, start - 80) : start], found.string[found.end() :][:80]
    return before.rstrip().endswith("\\]") or after.lstrip().startswith("\\[")


def _is_words(side: str) -> bool:
    """Tell whether a side of an equation is labels, alone or in balanced fractions, sums and products."""
    marked = _WORDS.sub(lambda words: words[1] if re.search(r"\d", words[1]) else _WORD, side)
    balanced = all(marked.count(a) == marked.count(b) for a, b in ("{}", "()"))
    return _WORD in marked and balanced and bool(_LABELS.fullmatch(marked))


def _plain(found: re.Match[str]) -> str:
    """Return a formula as plain text, or as it was."""
    shown = found["open"] == "["
    if found["code"] or shown != (found["close"] == "]"):
        return found[0]
    text = _WORDS.sub(rf"{_WORD}\1{_WORD}", _THOUSANDS.sub(",", found["inner"]))
    text = _SYMBOL.sub(lambda symbol: _SYMBOLS.get(symbol[0], symbol[0]), text.replace("~", " "))
    text = " ".join(text.split())
    for _ in range(_DEPTH):
        text = _FRACTION.sub(_fraction, text)
    text = " ".join(text.replace(_WORD, "").split())
    text = re.sub(r" (?=[,.;!?](?: |$))", "", text)
    if re.search(r"[\\{}&|]", _BOX.sub("", text)):
        return found[0]
    text = _BOX.sub(lambda box: box[0].replace(" / ", "/"), text)  # as graders read it
    if not shown and _touches(found):
        return found[0]
    gap = (" " if found["colon"] else "\n") if shown else found["gap"]
    return found["colon"] + gap + text


def _touches(found: re.Match[str]) -> bool:
    """Tell whether a formula within a line would run together with what stands beside it."""
    start = found.start() + len(found["colon"] + found["gap"])
    before, after = found.string[max(0, start - 2) : start], found.string[found.end() :][:2]
    if "frac" in found["inner"] and re.search(r"[\d)]\s*$", before):
        return True  # a mixed number
    return bool(re.search(r"[\w)]$", before) or re.match(r"[\w(\[^%!\\]", after))


def _fraction(found: re.Match[str]) -> str:
    """Return ``a / b``, in parentheses where a quotient or a power would read it otherwise."""
    before = found.string[max(0, found.start() - 2) : found.start()].rstrip()
    after = found.string[found.end() : found.end() + 80].lstrip()
    if not (_BEFORE.search(before) and _AFTER.match(after)):
        return found[0]
    top, bottom = (
        part if _ALONE.fullmatch(part) else f"({part})" for part in map(str.strip, found.groups())
    )
    bound = before.endswith(("÷", "/", "^")) or after.startswith("^")
    return f"({top} / {bottom})" if bound else f"{top} / {bottom}"
