"""Damage files: from whole ones make broken ones, the same for the same random generator.

Random bytes seldom pass a reader's first check. So a form is damaged at its own joints as well: a value
of a JSON document, a member of a zip archive (with its checksum made right again), the header of an array
or of a safetensors file.
"""

import ast
import io
import json
import random
import struct
import warnings
import zipfile
from collections.abc import Callable, Sequence

Json = object  # what json.loads returns, or a Raw inside of it


class Raw(str):
    """JSON text that json.dumps would not write."""


DEEP = 20_000
ODD_VALUES = tuple(
    map(
        Raw,
        (
            "null", "true", "false", "0", "-0", "-1", "1", "2", "0.5", "1e308", "1e999", "-1e999", "NaN",
            "Infinity", "-Infinity", "1" * 30, "9" * 5000, "4294967296", "9223372036854775808", '""', '"x"',
            '"0"', '"1e999"', '"\\ud800"', '"\\u0000"', '"\\u001b[2J"', '"../../x"', '"' + "y" * 100_000 + '"',
            "[]", "{}", "[[]]", "[0]", "[null]", "[-1]", '[""]', "[1, 2, 3]", '{"a": 1, "a": 2}', '{"": {}}',
            '{"0": 1}', "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "[" * DEEP, "01", "+1", "'x'",
            "", "\x00", "//", '"\t"', "[1, 2", "1 2",
        ),
    )
)  # fmt: skip
NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    127,
    128,
    255,
    256,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
)
ODD_HEADERS = (
    "'|O'", "'<U99'", "'<f8'", "'<f2'", "'>f4'", "'<c8'", "'<i8'", "'|V4'", "'<f3'", "'|b1'", "'nonsense'", "None",
    "[('a', '<f4')]", "(0,)", "(-1,)", "()", "(2, 3)", "(1, 4)", "(10000000000,)", "(1,) * 99", "True", "{}",
    "9" * 5000, "(" * 500, "0x8", "1.5",
)  # fmt: skip
WORDS = (
    "\\boxed{", "}", "{", "\\frac", "{1}{2}", "\\text{", "####", "####  ", "9{,}500", "\\,", "\\!", "1,000",
    "1.000,5", "٣", "７", "½", "−", "-", "$", "%", "\\%", "°", "^2", "^{\\circ}", "10^", "e9", "E-999999", "9" * 400,
    "1/0", "/", "\n\n", "\n", " ", "\u00a0", "\u202f", "'", ".", ",", "..", "=", "≈", "\\begin{pmatrix}", "\\\\",
    "\\end{pmatrix}", "&", "(", ")", "[", "]", "**", "The answer is", "answer:", "\x00", "\ud800", "\u202e", "👩‍👩‍👧", "3:30",
    "\\sqrt", "\\pi", "x", "and", "```", "- ", "1. ", "20%", "-5", "inf", "nan", "0x10", "1_000", "5-7", "5,6,7",
)  # fmt: skip


def mutate(form: str, rng: random.Random, whole: Sequence[bytes]) -> bytes:
    """Return one of the ``whole`` files of a ``form`` of ``FORMS``, damaged at one to three places."""
    data = rng.choice(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        damage = FORMS[form] if rng.random() < 0.7 else damage_bytes
        data = damage(rng, data)
    return data


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """Change, remove, repeat or add bytes anywhere."""
    at = rng.randrange(len(data) + 1)
    to = min(len(data), at + rng.choice((1, 1, 2, 4, 8, 64, 1024)))
    kind = rng.randrange(7)
    if kind == 0:  # cut off
        return data[:at]
    if kind == 1:
        return data[:at] + data[to:]
    if kind == 2:
        return data[:at] + data[at:to] * rng.choice((2, 3, 100)) + data[to:]
    if kind == 3:
        return data[:at] + rng.randbytes(to - at) + data[to:]
    if kind == 4:  # a number where one may stand
        width, number = rng.choice((2, 4, 8)), rng.choice(NUMBERS)
        at -= at % rng.choice((1, 4, 8))
        packed = (number & (256**width - 1)).to_bytes(width, rng.choice(("little", "big")))
        return data[:at] + packed + data[at + width :]
    if kind == 5:
        return (
            data[:at]
            + rng.choice((b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\n", b"\r\n"))
            + data[at:]
        )
    flipped = bytearray(data)
    for _ in range(min(len(data), rng.choice((1, 2, 8)))):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def damage_json(rng: random.Random, data: bytes) -> bytes:
    """Change one value of a JSON document, or one key."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return damage_bytes(rng, data)
    return dump(_damage_value(rng, document)).encode("utf-8", "surrogatepass")


def damage_lines(rng: random.Random, data: bytes) -> bytes:
    """Damage one line of a JSON lines file, or the order of its lines."""
    lines = data.split(b"\n")
    number = rng.randrange(len(lines))
    kind = rng.randrange(8)
    if kind == 0:
        del lines[number]
    elif kind == 1:
        lines.insert(rng.randrange(len(lines)), lines[number])
    elif kind == 2:
        rng.shuffle(lines)
    else:
        lines[number] = damage_json(rng, lines[number])
    return b"\n".join(lines)


def damage_zip(rng: random.Random, data: bytes) -> bytes:
    """Damage one member of a zip archive, its name or its packing; the checksums are right again."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info, archive.read(info)) for info in archive.infolist()]
    except Exception:  # damaged before
        return damage_bytes(rng, data)
    out, number = io.BytesIO(), rng.randrange(max(1, len(members)))
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    kind = rng.randrange(10)
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as archive:
        warnings.simplefilter("ignore")  # a name that is there twice is on purpose
        for place, (info, content) in enumerate(members):
            name = info.filename
            if place == number:
                if kind == 0:
                    continue
                if kind == 1:
                    archive.writestr(name, content)
                elif kind == 2:
                    name = rng.choice(
                        (name + "x", "/" + name, "../" + name, name[:-1] or "x", "layer_99999.npy")
                    )
                elif kind == 3:  # a bomb
                    content = bytes(rng.choice((10**5, 10**7)))
                else:
                    content = _damage_member(rng, name, content)
            archive.writestr(name, content)
    return out.getvalue()


def damage_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Damage the header of a safetensors file, and make its length right again, mostly."""
    if len(data) < 8 or (size := struct.unpack("<Q", data[:8])[0]) > len(data) - 8:
        return damage_bytes(rng, data)
    header = damage_json(rng, data[8 : 8 + size])
    told = len(header) if rng.random() < 0.9 else rng.choice(NUMBERS)
    return struct.pack("<Q", told) + header + data[8 + size :]


def damage_text(rng: random.Random, data: bytes) -> bytes:
    """Put words that mean something to the readers of answers into a text."""
    text = data.decode("utf-8", "surrogateescape")
    at = rng.randrange(len(text) + 1)
    put = "".join(rng.choice(WORDS) for _ in range(rng.choice((1, 2, 5))))
    put *= rng.choice((1, 1, 1, 1, 3, 2000))
    return (text[:at] + put + text[at + rng.choice((0, 0, 1, 9)) :]).encode("utf-8", "replace")


FORMS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "bytes": damage_bytes,
    "json": damage_json,
    "jsonl": damage_lines,
    "zip": damage_zip,
    "safetensors": damage_safetensors,
    "text": damage_text,
}


def dump(value: Json) -> str:
    """Return ``value`` as JSON text; a ``Raw`` stands as it is."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {dump(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _damage_value(rng: random.Random, value: Json) -> Json:
    """Return ``value`` with another value at a random place in it."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(ODD_VALUES)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [*value[:at], _damage_value(rng, value[at]), *value[at + 1 :]]
    key, kind = rng.choice(list(value)), rng.randrange(8)
    if kind == 0:
        return {k: v for k, v in value.items() if k != key}
    if kind == 1:
        other = rng.choice(("", "x", "0", "-1", key + " ", key.upper(), "\x1b[2J"))
        return {other if k == key else k: v for k, v in value.items()}
    return value | {key: _damage_value(rng, value[key])}


def _damage_member(rng: random.Random, name: str, content: bytes) -> bytes:
    if content.startswith(b"\x93NUMPY") and rng.random() < 0.7:
        return _damage_array(rng, content)
    if content[:1] in (b"{", b"["):
        return damage_json(rng, content)
    return damage_bytes(rng, content)


def _damage_array(rng: random.Random, content: bytes) -> bytes:
    """Damage the header of a ``.npy`` member, or the JSON text that its bytes are."""
    size = struct.unpack("<H", content[8:10])[0]
    try:
        header = ast.literal_eval(content[10 : 10 + size].decode("latin-1"))
        parts = {key: repr(value) for key, value in header.items()}
    except (ValueError, SyntaxError, AttributeError):
        return damage_bytes(rng, content)
    data = content[10 + size :]
    if data[:1] == b"{":
        data = damage_json(rng, data)
        parts["shape"] = f"({len(data)},)"
    else:
        parts[rng.choice(list(parts))] = rng.choice(ODD_HEADERS)
    text = "{" + ", ".join(f"{key!r}: {value}" for key, value in parts.items()) + "}\n"
    return content[:8] + struct.pack("<H", len(text) & 0xFFFF) + text.encode("latin-1") + data
