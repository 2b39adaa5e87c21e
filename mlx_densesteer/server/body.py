"""Read a request's body within bounds, and make what it says of it."""

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from .faults import Fault, bad
from .within import within

Model = TypeVar("Model", bound=BaseModel)

SHOWN = 5  # problems that are told at once
# Pydantic's words for what a person meets most, in ours; the rest is clear as it is.
WORDS = {
    "int_type": "expected a whole number", "int_from_float": "expected a whole number",
    "float_type": "expected a number", "string_type": "expected text", "list_type": "expected a list",
    "bool_type": "expected true or false", "missing": "is missing",
    "model_type": "expected an object", "model_attributes_type": "expected an object",
    "too_short": "expected at least {min_length}", "too_long": "expected at most {max_length}",
}  # fmt: skip
# Of a body that is too large so many times the limit is read and thrown away: most clients send all
# of it before they look for the answer, and would only see a broken connection.
DISCARDED = 16


async def read_json(request: Request, kind: type[Model], *, limit: int, seconds: float) -> Model:
    """Return the body as ``kind``.

    Raises:
        Fault: 400, 408, 413 or 415.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise Fault(
            415, "expected JSON: send the header `Content-Type: application/json`.",
            code="unsupported_media_type",
        )  # fmt: skip
    raw = await _read(request, limit, seconds)
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise _fault(error) from None
    except (RecursionError, UnicodeError) as error:
        raise bad("the body is no JSON that can be read.") from error


async def _read(request: Request, limit: int, seconds: float) -> bytes:
    too_large = Fault(413, f"the body is too large: this server takes {limit} bytes.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > DISCARDED * limit:
        raise too_large
    body, size = bytearray(), 0
    try:
        # one bound for the whole body: a client that drips is not kept
        async with within(seconds):
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    body += part
                elif size > DISCARDED * limit:
                    raise too_large
    except asyncio.TimeoutError:
        raise Fault(408, f"the body did not come within {seconds:g} seconds.") from None
    except ClientDisconnect:
        raise bad("the client went away.") from None
    if size > limit:
        raise too_large
    return bytes(body)


def _fault(error: ValidationError) -> Fault:
    """Say what is wrong, without what was sent: it may be a prompt."""
    problems = error.errors(include_url=False, include_input=False)
    told: dict[
        str | None, list[str]
    ] = {}  # a place that takes several types has a problem for each
    for problem in problems:
        if problem["type"] == "json_invalid":
            return bad(
                f"the body is no valid JSON: {problem['msg'].partition(': ')[2] or 'not JSON'}."
            )
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
        elif part in ("ours", "easysteer") or not part.replace("_", "").isalnum():
            continue
        elif part not in ("str", "int", "float") and not part.startswith(("list", "constrained")):
            place += f".{part[:64]}" if place else part[:64]
    return place or None
