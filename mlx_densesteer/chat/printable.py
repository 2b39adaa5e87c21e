"""Control characters must not reach a terminal: text from a model could move the cursor, change
the title or worse. Pure Python."""

_SHOWN = {code: chr(0x2400 + code) for code in range(0x20)}  # the pictures of control characters
_SHOWN |= {0x7F: "\u2421", ord("\n"): "\n", ord("\t"): "\t", ord("\r"): ""}
_SHOWN |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], "\ufffd")


def printable(text: str) -> str:
    """Return ``text`` with a visible sign for every control character but newline and tab.

    Carriage returns are left out. It works on any piece of a text by itself.
    """
    return text.translate(_SHOWN)


def one_line(text: str, length: int) -> str:
    """Return the beginning of ``text`` on one line of at most ``length`` characters."""
    line = " ".join(printable(text[: 4 * length + 80]).split())
    return line if len(line) <= length else f"{line[: max(length - 3, 0)]}..."
