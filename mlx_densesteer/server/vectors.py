"""The vectors that requests may name, and from what a request asks for to a ``Steering``.

A request names a vector, never a path: names are looked up among the vectors given at the start and the
files of one folder. The folder is looked at again with every request, so a new file needs no restart.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import DenseSteerError, InputError
from ..steering.request import Amount, Request, request
from ..steering.vector import SteeringVector
from .faults import Fault, bad, excerpt
from .schema import SteeringField

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


@dataclass(frozen=True)
class Preset:
    """A vector under its name, and what is asked for where a request gives only that name."""

    name: str
    default: Request

    @property
    def vector(self) -> SteeringVector:
        return self.default.vector


class Vectors:
    """Look vectors up by name.

    Args:
        given: vectors that stay available whatever happens to their files.
        folder: its ``NAME.npz`` are vectors too.
        hidden_size, layer_count: of the model; a file of another model is left out.

    Raises:
        InputError: a name that cannot be asked for.
        VectorMismatchError: a given vector does not fit the model.
    """

    def __init__(
        self, given: Mapping[str, Request], folder: Path | None, *, hidden_size: int, layer_count: int
    ):
        self._size = {"hidden_size": hidden_size, "layer_count": layer_count}
        self._folder = folder
        self._given: dict[str, Preset] = {}
        self._files: dict[str, tuple[tuple[int, int], Preset | str]] = {}
        for name, default in given.items():
            if not NAME.fullmatch(name):
                raise InputError(
                    f"vector name {name!r}: expected letters, digits and . _ + - only, so that a "
                    "model name can hold it. Rename the file."
                )
            default.vector.check_fits(**self._size, model="the model")
            self._given[name] = Preset(name, default)

    def all(self) -> list[Preset]:
        """Return every vector that can be used now, those given at the start first."""
        found = [one for one in self._look().values() if isinstance(one, Preset)]
        return [*self._given.values(), *found]

    def unusable(self) -> dict[str, str]:
        """Return the folder's files that cannot be used, each with the reason."""
        return {name: one for name, one in self._look().items() if isinstance(one, str)}

    def get(self, name: str, param: str | None = None) -> Preset:
        """Return the vector of that name; ``param`` is the request's field that names it.

        Raises:
            Fault: no such vector (with those there are), or one that cannot be used.
        """
        found = self._given.get(name) or self._look().get(name)
        if isinstance(found, Preset):
            return found
        if found is not None:
            raise bad(f"vector {excerpt(name)} cannot be used: {found}", param)
        names = ", ".join(one.name for one in self.all()) or "none"
        raise bad(
            f"no vector {excerpt(name)}: this server has {names}.", param, code="vector_not_found"
        )

    def _look(self) -> dict[str, Preset | str]:
        """Return the folder's vectors; in place of one that cannot be used, the reason."""
        if self._folder is None:
            return {}
        here: dict[str, tuple[tuple[int, int], Preset | str]] = {}
        for path in sorted(self._folder.glob("*.npz")):
            name = path.stem
            if name in self._given or not NAME.fullmatch(name):
                continue
            try:
                state = path.stat()
            except OSError:  # removed just now
                continue
            stamp = (state.st_mtime_ns, state.st_size)
            known = self._files.get(name)
            here[name] = known if known and known[0] == stamp else (stamp, self._load(name, path))
        self._files = here
        return {name: one for name, (_, one) in here.items()}

    def _load(self, name: str, path: Path) -> Preset | str:
        try:
            vector = SteeringVector.load(path)
            vector.name = name
            vector.check_fits(**self._size, model="the model")
            return Preset(name, request(vector))
        except (DenseSteerError, OSError) as error:
            return str(error).replace(str(path), name)


class SteeredName(NamedTuple):
    """What a model name such as ``qwen@dense=20%`` asks for; ``amount`` is ``None`` without ``=``."""

    vector: str
    amount: Amount | None


def parse_model_name(text: str, base: str) -> SteeredName | None:
    """Return what ``BASE@VECTOR=STRENGTH`` asks for, ``None`` for the bare name.

    ``STRENGTH`` is a number (lambda) or a dose (``20%``). Upper and lower case of ``BASE`` are alike.

    Raises:
        Fault: another model (404), or a strength that is neither (400).
    """
    name, at, rest = text[: len(base)], text[len(base) : len(base) + 1], text[len(base) + 1 :]
    if name.casefold() != base.casefold() or at not in ("", "@") or (at and not rest):
        raise Fault(
            404,
            f"model {excerpt(text)}: this server has {base} alone, steered as {base}@VECTOR=20%; "
            "see /v1/models.",
            "model",
            "model_not_found",
        )
    if not at:
        return None
    vector, equals, words = rest.partition("=")
    return SteeredName(vector, _amount(words, "model") if equals else None)


def format_model_name(base: str, vector: str, amount: Amount) -> str:
    """Return the name that asks for a vector at this strength or dose, rounded for people."""
    return f"{base}@{vector}={amount}"


def ask(
    named: SteeredName | None, field: SteeringField | None, vectors: Vectors
) -> tuple[Request | None, str | None]:
    """Return what the model's name or the field ``steering`` asks for; ``None``: the stock model.

    Also the vector's name if a model name can say the same: its own layers and positions.

    Raises:
        Fault: steering given twice, an unknown vector, or what can never be applied.
    """
    if named is not None and field is not None:
        raise bad(
            "the steering stands in the model's name and in `steering`: expected it once. Send the "
            "bare model name with `steering`.",
            "steering",
        )
    if named is not None:
        preset, amount, layers, positions = vectors.get(named.vector, "model"), named.amount, None, None
    elif field is not None:
        preset = _choose(field, vectors)
        amount = None if field.strength is None else _amount(field.strength, "steering.strength")
        layers, positions = field.chosen_layers, field.positions
    else:
        return None, None
    default = preset.default
    try:
        asked = request(
            preset.vector,
            default.amount if amount is None else amount,
            default.layers if layers is None else layers,
            positions or default.positions,
        )
    except DenseSteerError as error:
        raise bad(str(error), "steering") from error
    same = set(asked.layers) == set(default.layers) and asked.positions == default.positions
    return asked, preset.name if same else None


def _amount(words: str | float, param: str) -> Amount:
    try:
        return Amount.parse(words)
    except InputError as error:
        raise bad(str(error), param) from error


def _choose(field: SteeringField, vectors: Vectors) -> Preset:
    if field.vector is not None:
        return vectors.get(field.vector, "steering.vector")
    all_ = vectors.all()
    if len(all_) != 1:
        names = ", ".join(one.name for one in all_) or "none"
        raise bad(f"steering.vector is missing: this server has {names}.", "steering.vector")
    return all_[0]
