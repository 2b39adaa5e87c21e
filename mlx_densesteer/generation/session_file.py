"""A saved conversation: one JSON file, with the steering vectors inside."""

import base64
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from .._version import __version__
from ..errors import DenseSteerError, SessionError
from ..files import atomic_file
from ..steering.steering import Steering
from ..steering.vector import SteeringVector
from .answer import Generation
from .brake import Braked
from .conversation import Turn
from .sampling import Sampling

FORMAT = "mlx-densesteer session"
FORMAT_VERSION = 1
MAX_BYTES = 2**28

_FIGURES = (
    "prompt_tokens",
    "tokens_per_second",
    "time_to_first_token",
    "peak_memory_bytes",
    "draft_accepted",
    "draft_proposed",
)


@dataclass(frozen=True)
class SavedSession:
    """What a session file holds."""

    fingerprint: str
    chat_template_sha256: str | None
    system: str | None
    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...]
    steering: Steering | None
    turns: tuple[Turn, ...]


def write_session(path: Path, saved: SavedSession) -> None:
    """Write a session file, whole or not at all.

    Raises:
        SessionError: another kind of file has this name; it is kept.
        DiskError: it cannot be written.
    """
    if path.exists():
        _parse(path)
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
        "steering": _plain_steering(saved.steering, vectors),
        "turns": [_plain_turn(turn, vectors) for turn in saved.turns],
        "vectors": vectors,
    }
    with atomic_file(path) as file:
        file.write(json.dumps(document, ensure_ascii=False, indent=1).encode())


def read_session(path: Path) -> SavedSession:
    """Read a session file.

    Raises:
        SessionError: not a session file, damaged, or of a later version.
    """
    document = _parse(path)
    try:
        vectors = {k: _unpack(entry) for k, entry in document["vectors"].items()}
        return SavedSession(
            fingerprint=_text(document["fingerprint"]),
            chat_template_sha256=document["chat_template_sha256"],
            system=None if document["system"] is None else _text(document["system"]),
            sampling=Sampling(**document["sampling"]),
            max_tokens=int(document["max_tokens"]),
            stop=tuple(_text(one) for one in document["stop"]),
            steering=_steering(document["steering"], vectors),
            turns=tuple(_turn(one, vectors) for one in document["turns"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, DenseSteerError) as error:
        raise SessionError(
            f"{path}: is a damaged session ({type(error).__name__}: {error}). Save it again."
        ) from error


def _parse(path: Path) -> Mapping[str, object]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SessionError(f"{path}: larger than {MAX_BYTES >> 20} MiB; no session file is.")
        document = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise SessionError(f"{path}: not a session file. Name a saved conversation.")
    if document.get("version") != FORMAT_VERSION:
        raise SessionError(
            f"{path}: session version {document.get('version')}, expected {FORMAT_VERSION}. Update "
            "mlx-densesteer."
        )
    return document


def _plain_turn(turn: Turn, vectors: dict[str, dict[str, str]]) -> dict[str, object]:
    reply = turn.reply
    return {
        "user": turn.user,
        "answer": reply.text,
        "token_ids": reply.token_ids,
        "finish_reason": reply.finish_reason,
        "steering": _plain_steering(reply.steering, vectors),
        "brakes": [asdict(one) for one in reply.brakes],
        **{name: getattr(reply, name) for name in _FIGURES},
    }


def _turn(entry: Mapping[str, object], vectors: Mapping[str, SteeringVector]) -> Turn:
    ids = tuple(int(token) for token in entry["token_ids"])
    if any(token < 0 for token in ids):
        raise ValueError("a negative token")
    return Turn(
        _text(entry["user"]),
        Generation(
            text=_text(entry["answer"]),
            token_ids=ids,
            finish_reason=_text(entry["finish_reason"]),
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
        vectors[key] = {"name": steering.vector.name, "npz": _pack(steering.vector)}
    return {
        "vector": key,
        "strength": steering.strength,
        "layers": steering.layers,
        "positions": steering.positions,
    }


def _steering(
    entry: Mapping[str, object] | None, vectors: Mapping[str, SteeringVector]
) -> Steering | None:
    if entry is None:
        return None
    return Steering(
        vectors[entry["vector"]], entry["strength"], tuple(entry["layers"]), entry["positions"]
    )


def _pack(vector: SteeringVector) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return base64.b64encode(vector.save(Path(folder) / "v.npz").read_bytes()).decode()


def _unpack(entry: Mapping[str, str]) -> SteeringVector:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v.npz"
        path.write_bytes(base64.b64decode(entry["npz"], validate=True))
        vector = SteeringVector.load(path)
    vector.name = _text(entry["name"])
    return vector


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} where text was expected")
    return value
