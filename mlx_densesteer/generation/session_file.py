"""A saved conversation: one JSON file, with the steering vectors inside."""

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_type_hints

from .._version import __version__
from ..errors import DenseSteerError, SessionError
from ..files import (
    atomic_file,
    check_fields,
    disk_errors,
    file_to_replace,
    parse_object,
    read_file,
    token_ids,
)
from ..steering.steering import Steering, ThinkBudget
from ..steering.vector import SteeringVector
from ..text import cause, one_line
from .answer import Generation
from .brake import Braked
from .conversation import Turn
from .sampling import Sampling

FORMAT = "mlx-densesteer session"
FORMAT_VERSION = 1
MAX_BYTES = 2**28
_BEGINNING = re.compile(
    rf'\s*\{{\s*"format"\s*:\s*"{FORMAT}",\s*"version"\s*:\s*{FORMAT_VERSION}\b'.encode()
)

_FIGURES = get_type_hints(Generation)  # which are written as they are; the others are not
for _other in ("text", "answer", "token_ids", "steering", "brakes"):
    del _FIGURES[_other]
# what files of 0.2.0 lack
_ADDED = {"thought": None, "thought_tokens": 0, "thought_closed": False, "thought_limit": None}


@dataclass(frozen=True)
class SavedSession:
    """What a session file holds."""

    fingerprint: str
    chat_template_sha256: str | None
    system: str | None
    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...]
    think_limit: int | None
    steering: Steering | None
    turns: tuple[Turn, ...]


def write_session(path: Path, saved: SavedSession) -> None:
    """Write a session file, whole or not at all.

    Raises:
        SessionError: another kind of file, or a session of another version, has this name; it is kept.
        DiskError: it cannot be written.
    """
    target, mode = file_to_replace(path)
    if mode is not None and not _is_session(target):
        raise SessionError(
            f"{path}: is not a session file of version {FORMAT_VERSION}, so it is not replaced. Choose "
            "another name."
        )
    vectors: dict[str, dict[str, str]] = {}
    document = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "created_by": f"mlx-densesteer {__version__}",
        "fingerprint": saved.fingerprint,
        "chat_template_sha256": saved.chat_template_sha256,
        "system": saved.system,
        "sampling": asdict(saved.sampling),
        "max_tokens": saved.max_tokens,
        "stop": saved.stop,
        "think_limit": saved.think_limit,
        "steering": _plain_steering(saved.steering, vectors),
        "turns": [_plain_turn(turn, vectors) for turn in saved.turns],
        "vectors": vectors,
    }
    with atomic_file(path) as file:
        file.write(json.dumps(document, ensure_ascii=False, indent=1).encode())


def read_session(path: Path, vocabulary: int) -> SavedSession:
    """Read a session file of a model with ``vocabulary`` tokens.

    Raises:
        SessionError: not a session file, damaged, of a later version, or with other tokens.
    """
    document = _parse(path)
    try:
        document = {"think_limit": None} | document  # what files of 0.2.0 lack
        check_fields(
            document,
            think_limit=int | None,
            fingerprint=str,
            chat_template_sha256=str | None,
            system=str | None,
            max_tokens=int,
            stop=list,
        )
        check_fields(document["sampling"], **get_type_hints(Sampling))
        vectors = {k: _unpack(entry) for k, entry in document["vectors"].items()}
        return SavedSession(
            fingerprint=document["fingerprint"],
            chat_template_sha256=document["chat_template_sha256"],
            system=document["system"],
            sampling=Sampling(**document["sampling"]),
            max_tokens=document["max_tokens"],
            stop=tuple(_text(one) for one in document["stop"]),
            think_limit=document["think_limit"],
            steering=_steering(document["steering"], vectors),
            turns=tuple(_turn(one, vectors, vocabulary) for one in document["turns"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, DenseSteerError) as error:
        raise SessionError(
            f"{path}: is a damaged session ({cause(error)}). Save it again."
        ) from error


def _is_session(path: Path) -> bool:
    """Tell from the beginning of a file whether ``write_session`` made it; it may be damaged after that."""
    with disk_errors(path), path.open("rb") as file:
        return _BEGINNING.match(file.read(1024)) is not None


def _parse(path: Path) -> Mapping[str, object]:
    what, remedy = "a session file", "Name a saved conversation."
    data = read_file(path, what, error=SessionError, limit=MAX_BYTES, make=remedy)
    document = parse_object(
        data, f"{path}: not a session file", error=SessionError, limit=MAX_BYTES, remedy=remedy
    )
    if document.get("format") != FORMAT:
        raise SessionError(f"{path}: not a session file. {remedy}")
    if document.get("version") != FORMAT_VERSION:
        raise SessionError(
            f"{path}: session version {one_line(document.get('version'))}, expected {FORMAT_VERSION}. Update "
            "mlx-densesteer."
        )
    return document


def _plain_turn(turn: Turn, vectors: dict[str, dict[str, str]]) -> dict[str, object]:
    reply = turn.reply
    return {
        "user": turn.user,
        "answer": reply.text,
        "said": reply.answer,
        "token_ids": reply.token_ids,
        "steering": _plain_steering(reply.steering, vectors),
        "brakes": [asdict(one) for one in reply.brakes],
        **{name: getattr(reply, name) for name in _FIGURES},
    }


def _turn(
    entry: Mapping[str, object], vectors: Mapping[str, SteeringVector], vocabulary: int
) -> Turn:
    check_fields(entry, user=str, answer=str)
    entry = _ADDED | {"said": entry["answer"]} | entry
    check_fields(entry, said=str, brakes=list, **_FIGURES)
    for one in entry["brakes"]:
        check_fields(one, **get_type_hints(Braked))
    return Turn(
        entry["user"],
        Generation(
            text=entry["answer"],
            answer=entry["said"],
            token_ids=token_ids(entry["token_ids"], vocabulary),
            steering=_steering(entry["steering"], vectors),
            brakes=tuple(Braked(**one) for one in entry["brakes"]),
            **{name: entry[name] for name in _FIGURES},
        ),
    )


def _plain_steering(
    steering: Steering | None, vectors: dict[str, dict[str, str]]
) -> dict[str, object] | None:
    """Return a steering as plain values; its vector goes into ``vectors``, once."""
    if steering is None:
        return None
    key = steering.vector.sha256()
    if key not in vectors:
        vectors[key] = {
            "name": steering.vector.name,
            "npz": base64.b64encode(steering.vector.to_bytes()).decode(),
        }
    return {
        "vector": key,
        "strength": steering.strength,
        "layers": steering.layers,
        "positions": steering.positions,
        "budget": steering.budget and asdict(steering.budget),
        "calls": steering.calls,
    }


def _steering(
    entry: Mapping[str, object] | None, vectors: Mapping[str, SteeringVector]
) -> Steering | None:
    if entry is None:
        return None
    check_fields(entry, vector=str, strength=float, layers=list, positions=str)
    if not all(type(layer) is int for layer in entry["layers"]):
        raise TypeError("layers that are no numbers")
    budget = entry.get("budget")
    if budget is not None:
        check_fields(budget, **get_type_hints(ThinkBudget))
        budget = ThinkBudget(**budget)
    calls = entry.get("calls", True)
    if not isinstance(calls, bool):
        raise TypeError("calls is no boolean")
    where = tuple(entry["layers"]), entry["positions"], budget, calls
    return Steering(vectors[entry["vector"]], entry["strength"], *where)


def _unpack(entry: Mapping[str, str]) -> SteeringVector:
    check_fields(entry, name=str, npz=str)
    data = base64.b64decode(entry["npz"], validate=True)
    return SteeringVector.from_bytes(data, Path("its vector"), name=entry["name"])


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} where text was expected")
    return value
