"""What there is to choose from: models as OpenAI lists them, vectors for the page."""

import math
import time
from dataclasses import dataclass, field, replace
from typing import get_args

from .. import demo
from .._version import __version__
from ..demo.problems import held_out
from ..model.model import Model
from ..steering.request import Amount
from ..steering.steering import LARGE_DOSE, Positions
from .settings import Settings
from .vectors import Preset, Vectors, format_model_name, parse_model_name

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
    model: Model
    vectors: Vectors
    toy: bool  # the embedded demo model
    created: int = field(default_factory=lambda: int(time.time()))

    def models(self) -> dict[str, object]:
        """Return the base and the presets."""
        base = self._model(self.settings.name, None)
        presets = [self._model(one["id"], one["steering"]) for one in self._presets()]
        return {"object": "list", "data": [base, *presets]}

    def one_model(self, name: str) -> dict[str, object]:
        """Return one model, listed or not.

        Raises:
            Fault: there is no such model or vector.
        """
        named = parse_model_name(name, self.settings.name)
        if named is None or (named.amount is not None and not named.amount.number):
            return self._model(name, None)
        preset = self.vectors.get(named.vector, "model")
        return self._model(name, self._setting(preset, named.amount or preset.default.amount))

    def steering(self) -> dict[str, object]:
        """Return what a page with a dial needs."""
        info = self.model.info
        return {
            "model": {
                "id": self.settings.name, "layers": info.layer_count, "hidden_size": info.hidden_size,
                "context": self.model.context, "max_tokens": self.settings.limits.max_tokens,
                "dtype": info.dtype, "quantization": info.quantization,
            },
            "version": __version__,
            "note": demo.ABOUT if self.toy else None,
            "examples": [p.question for p in held_out(3)] if self.toy else list(EXAMPLES),
            "presets": self._presets(),
            "vectors": [self._vector(preset) for preset in self.vectors.all()],
            "large_dose": LARGE_DOSE,
            "positions": list(get_args(Positions)),
        }  # fmt: skip

    def _presets(self) -> list[dict[str, object]]:
        found = []
        for one in self.vectors.all():
            amount = self._shown_amount(one)
            found.append({
                "id": format_model_name(self.settings.name, one.name, amount),
                "label": f"{one.name} {amount}",
                "steering": self._setting(one, amount),
            })  # fmt: skip
        return found

    def _shown_amount(self, preset: Preset) -> Amount:
        """Return the default of a vector as a dose of two digits: names are for people."""
        amount = preset.default.amount
        if amount.is_dose:
            return amount
        dose = math.copysign(self.model.dose(preset.default.steering(self.model)), amount.number)
        return Amount(float(f"{dose:.2g}"), is_dose=True)

    def _vector(self, preset: Preset) -> dict[str, object]:
        vector = preset.vector
        sizes, norms = vector.norms(), self.model.norms(vector, vector.layers)
        setting = self._setting(preset, preset.default.amount)
        del setting["vector"]
        meta = vector.meta
        return {
            "name": preset.name, "layers": list(vector.layers), "default": setting,
            "unit_dose": {str(k): sizes[k] / norms[k] for k in vector.layers},
            "recommended": meta.recommended, "tested": list(meta.tested),
            "meta": {"model": meta.model, "method": meta.method, "pair_count": meta.pair_count},
        }  # fmt: skip

    def _setting(self, preset: Preset, amount: Amount) -> dict[str, object]:
        steering = replace(preset.default, amount=amount).steering(self.model)
        return {
            "vector": preset.name, "strength": steering.strength, "dose": self.model.dose(steering),
            "layers": list(steering.layers), "positions": steering.positions,
        }  # fmt: skip

    def _model(self, name: str, steering: object) -> dict[str, object]:
        return {
            "id": name, "object": "model", "created": self.created, "owned_by": "mlx-densesteer",
            "steering": steering,
        }  # fmt: skip
