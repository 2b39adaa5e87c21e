"""Read a request's JSON body within limits, and report what is wrong with it."""

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from ..files import parse_json
from .faults import Fault, bad

Body = TypeVar("Body", bound=BaseModel)

SHOWN = 5  # problems that one message names
# Plainer words for pydantic's most frequent messages.
WORDS = {
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "string_type": "expected text",
    "list_type": "expected a list",
    "bool_type": "expected true or false",
    "missing": "is missing",
    "model_type": "expected an object",
    "model_attributes_type": "expected an object",
    "too_short": "expected at least {min_length}",
    "too_long": "expected at most {max_length} entries",
}
# Up to this many times the limit, a body that is too large is read and thrown away: most clients
# send all of it before they read the answer, and would see a broken connection instead of the 413.
DISCARDED = 16


async def read_json(request: Request, kind: type[Body], *, limit: int, seconds: float) -> Body:
    """Return the body as ``kind``; ``limit`` in bytes, ``seconds`` for the whole body.

    Raises:
        Fault: 400, 408, 413 or 415.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        message = "expected JSON: send the header `Content-Type: application/json`."
        raise Fault(415, message, code="unsupported_media_type")
    raw = await _read(request, limit, seconds)
    try:
        return kind.model_validate(parse_json(raw, "the body", error=bad, limit=limit, remedy=""))
    except ValidationError as error:
        raise _fault(error) from None


async def _read(request: Request, limit: int, seconds: float) -> bytes:
    too_large = Fault(413, f"the body is too large: this server takes {limit} bytes.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > DISCARDED * limit:
        raise too_large
    body, size = bytearray(), 0
    try:
        # one limit for the whole body: single bytes do not extend it
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    body += part
                elif size > DISCARDED * limit:
                    raise too_large
    except TimeoutError:
        raise Fault(408, f"the body did not arrive within {seconds:g} seconds.") from None
    except ClientDisconnect:
        raise bad("the client went away.") from None
    if size > limit:
        raise too_large
    return bytes(body)


def _fault(error: ValidationError) -> Fault:
    """Return a 400 that names what is wrong, but repeats no value: it may be a prompt."""
    told: dict[str | None, list[str]] = {}  # a field of several types has one problem for each
    for problem in error.errors(include_url=False, include_input=False):
        message = problem["msg"].removeprefix("Value error, ")[:300]
        if problem["type"] in WORDS:
            message = WORDS[problem["type"]].format_map(problem.get("ctx", {}))
        at = told.setdefault(_place(problem["loc"]), [])
        if message not in at:
            at.append(message.removeprefix("expected ") if at else message)
    shown = [
        f"{where}: {' or '.join(said)}" if where else " or ".join(said)
        for where, said in list(told.items())[:SHOWN]
    ]
    more = f"; and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
    return bad("; ".join(shown) + more + ".", next(iter(told)))


def _place(loc: tuple[int | str, ...]) -> str | None:
    """Return ``messages[0].content`` for pydantic's location, without the names of its types."""
    place = ""
    for part in loc:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not part.replace("_", "").isalnum():
            continue
        elif part not in ("str", "int", "float") and not part.startswith(("list", "constrained")):
            place += f".{part[:64]}" if place else part[:64]
    return place or None
