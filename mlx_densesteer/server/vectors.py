"""The vectors that requests may name: those given at the start, and the files of one folder.

A request names a vector, never a path: names are looked up among the files that are there. The
folder is looked at again with every request, so a new file needs no restart.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import DenseSteerError, InputError
from ..steering.request import Default, default_for
from ..steering.steering import Steering
from ..steering.vector import SteeringVector
from .faults import bad, excerpt

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


@dataclass(frozen=True)
class Shelved:
    """A vector under its name, and how it is used by default."""

    name: str
    vector: SteeringVector
    default: Default

    @property
    def steering(self) -> Steering:
        """The default, as it is applied."""
        default = self.default
        return Steering(self.vector, default.strength, default.layers, default.positions)


class Shelf:
    """Look vectors up by name.

    Args:
        given: vectors that are there whatever happens to their files.
        folder: its ``NAME.npz`` are vectors too.
        hidden_size, layer_count: of the model; a file of another model is left out.

    Raises:
        InputError: a name that cannot be asked for.
        VectorMismatchError: a given vector does not fit the model.
    """

    def __init__(
        self, given: Mapping[str, tuple[SteeringVector, Default]], folder: Path | None, *,
        hidden_size: int, layer_count: int,
    ):  # fmt: skip
        self._size = {"hidden_size": hidden_size, "layer_count": layer_count}
        self._folder = folder
        self._given: dict[str, Shelved] = {}
        self._files: dict[str, tuple[tuple[int, int], Shelved | str]] = {}
        for name, (vector, default) in given.items():
            if not NAME.fullmatch(name):
                raise InputError(
                    f"vector name {name!r}: expected letters, digits and . _ + - only, so that a "
                    "model name can hold it. Rename the file."
                )
            vector.check_fits(**self._size, model="the model")
            self._given[name] = Shelved(name, vector, default)

    def all(self) -> list[Shelved]:
        """Return every vector that can be used now, those given at the start first."""
        found = [one for one in self._look().values() if isinstance(one, Shelved)]
        return [*self._given.values(), *found]

    def unusable(self) -> dict[str, str]:
        """Return the folder's files that cannot be used, each with the reason."""
        return {name: one for name, one in self._look().items() if isinstance(one, str)}

    def get(self, name: str) -> Shelved:
        """Return the vector of that name.

        Raises:
            Fault: no such vector (with those there are), or one that cannot be used.
        """
        found = self._given.get(name) or self._look().get(name)
        if isinstance(found, Shelved):
            return found
        if found is not None:
            raise bad(f"vector {excerpt(name)} cannot be used: {found}")
        names = ", ".join(one.name for one in self.all()) or "none"
        raise bad(f"no vector {excerpt(name)}: this server has {names}.", code="vector_not_found")

    def _look(self) -> dict[str, Shelved | str]:
        """Return the folder's vectors; of one that cannot be used, why."""
        if self._folder is None:
            return {}
        here: dict[str, tuple[tuple[int, int], Shelved | str]] = {}
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

    def _load(self, name: str, path: Path) -> Shelved | str:
        try:
            vector = SteeringVector.load(path)
            vector.name = name
            vector.check_fits(**self._size, model="the model")
        except (DenseSteerError, OSError) as error:
            return str(error).replace(str(path), name)
        return Shelved(name, vector, default_for(vector))
