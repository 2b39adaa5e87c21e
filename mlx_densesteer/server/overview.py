"""What there is to choose from: models as OpenAI lists them, vectors for the page."""

import time
from dataclasses import dataclass, field
from typing import get_args

from .. import demo
from .._version import __version__
from ..demo.problems import held_out
from ..steering.steering import LARGE_DOSE, Positions
from .job import ModelFacts
from .model_name import format_model_name, parse_model_name
from .norms import Norms
from .settings import Settings
from .vectors import Shelf, Shelved

EXAMPLES = (
    "Anna picks 48 apples in the morning, and in the afternoon half as many. How many apples does she "
    "pick altogether?",
    "A train leaves at 14:40 and arrives at 17:15. It stops three times, for 5 minutes each. How long "
    "does it move?",
    "A shirt costs 40 euros. The price falls by 25%, then rises by 10%. What does the shirt cost now?",
)


@dataclass(frozen=True)
class Overview:
    """Lists for ``/v1/models`` and ``/v1/steering``."""

    settings: Settings
    facts: ModelFacts
    shelf: Shelf
    norms: Norms
    toy: bool  # the embedded demo model
    created: int = field(default_factory=lambda: int(time.time()))

    def models(self) -> dict[str, object]:
        """Return the base and the presets."""
        base = self._model(self.settings.name, None)
        presets = [self._model(one["id"], one["steering"]) for one in self._presets()]
        return {"object": "list", "data": [base, *presets]}

    def model(self, name: str) -> dict[str, object]:
        """Return one model, listed or not.

        Raises:
            Fault: there is no such model or vector.
        """
        named = parse_model_name(name, self.settings.name)
        if named is None or named.strength == 0:
            return self._model(name, None)
        shelved = self.shelf.get(named.vector)
        default = shelved.default
        strength = default.strength if named.strength is None else named.strength
        told = _setting(shelved) | {"strength": strength}
        return self._model(name, told | {"relative": True} if named.relative else told)

    def steering(self) -> dict[str, object]:
        """Return all that a face with a dial needs."""
        return {
            "model": {
                "id": self.settings.name, "layers": self.facts.layers,
                "hidden_size": self.facts.hidden_size, "context": self.facts.context,
                "max_tokens": self.settings.limits.max_tokens, "dtype": self.facts.dtype,
                "quantization": self.facts.quantization,
            },
            "version": __version__,
            "note": demo.ABOUT if self.toy else None,
            "examples": [p.question for p in held_out(3)] if self.toy else list(EXAMPLES),
            "presets": self._presets(),
            "vectors": [self._vector(shelved) for shelved in self.shelf.all()],
            "large_dose": LARGE_DOSE,
            "positions": list(get_args(Positions)),
        }  # fmt: skip

    def _presets(self) -> list[dict[str, object]]:
        return [
            {
                "id": format_model_name(self.settings.name, one.name, one.default.strength),
                "label": f"{one.name} {one.default.strength:g}",
                "steering": _setting(one),
            }
            for one in self.shelf.all()
        ]

    def _vector(self, shelved: Shelved) -> dict[str, object]:
        vector = shelved.vector
        norms = self.norms.known(vector)
        unit = None
        if norms is not None:
            sizes = vector.norms()
            unit = {str(k): sizes[k] / norms[k] for k in vector.layers if norms.get(k)}
        setting = _setting(shelved)
        del setting["vector"]
        meta = vector.meta
        return {
            "name": shelved.name, "layers": list(vector.layers), "default": setting,
            "unit_dose": unit, "recommended": meta.recommended, "tested": list(meta.tested),
            "meta": {"model": meta.model, "method": meta.method, "pair_count": meta.pair_count},
        }  # fmt: skip

    def _model(self, name: str, steering: object) -> dict[str, object]:
        return {
            "id": name, "object": "model", "created": self.created, "owned_by": "mlx-densesteer",
            "steering": steering,
        }  # fmt: skip


def _setting(shelved: Shelved) -> dict[str, object]:
    default = shelved.default
    return {
        "vector": shelved.name, "strength": default.strength, "layers": list(default.layers),
        "positions": default.positions,
    }  # fmt: skip
