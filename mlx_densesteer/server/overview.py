"""Lists for clients: models as OpenAI lists them, and the vectors for the page."""

import time
from dataclasses import dataclass

from .. import demo
from .._version import __version__
from ..demo.problems import held_out
from ..steering.places import POSITIONS
from ..steering.steering import LARGE_DOSE
from .settings import Settings
from .vectors import Vectors

EXAMPLES = (
    "Anna picks 48 apples in the morning, and in the afternoon half as many. How many apples does she "
    "pick altogether?",
    "A train leaves at 14:40 and arrives at 17:15. It stops three times, for 5 minutes each. How long "
    "does it move?",
    "A shirt costs 40 euros. The price falls by 25%, then rises by 10%. What does the shirt cost now?",
)


CREATED = int(time.time())  # of every model: no folder tells when its model was made


@dataclass(frozen=True)
class Overview:
    """Lists for ``/v1/models`` and ``/v1/steering``; ``toy`` is the embedded demo model."""

    settings: Settings
    vectors: Vectors
    toy: bool

    def models(self) -> list[dict[str, object]]:
        """Return the model, then each vector at its default, as models."""
        base = entry(self.settings.name)
        presets = [entry(one["id"], one["steering"]) for one in self._presets()]
        return [base, *presets]

    def model(self, name: str) -> dict[str, object]:
        """Return one model, listed or not.

        Raises:
            Fault: no such model or vector, or a steering that cannot be applied.
        """
        asked = self.vectors.asked(name, None)
        steers = asked is not None and not asked.steering.is_zero
        return entry(name, self.vectors.describe(asked.steering) if steers else None)

    def steering(self) -> dict[str, object]:
        """Return the model, the presets and the vectors, as the page needs them."""
        model = self.vectors.model
        return {
            "model": {
                "id": self.settings.name,
                "layers": model.layer_count,
                "hidden_size": model.hidden_size,
                "context": model.context,
                "max_tokens": self.settings.limits.max_tokens,
                "fingerprint": model.fingerprint,
                "dtype": model.info.dtype,
                "quantization": model.info.quantization,
            },
            "version": __version__,
            "note": demo.ABOUT if self.toy else None,
            "examples": [p.question for p in held_out(3)] if self.toy else list(EXAMPLES),
            "presets": self._presets(),
            "vectors": [self.vectors.listing(one) for one in self.vectors.all()],
            "large_dose": LARGE_DOSE,
            "positions": [
                one for one in POSITIONS[:-1] if model.thinks or one not in ("think", "answer")
            ],
        }

    def _presets(self) -> list[dict[str, object]]:
        presets = [self.vectors.preset(one) for one in self.vectors.all()]
        return [
            {
                "id": preset.model,
                "label": preset.model.partition("@")[2].replace("=", " "),
                "steering": self.vectors.describe(preset.steering),
            }
            for preset in presets
        ]


def entry(name: object, steering: object = None, *, loaded: bool = True) -> dict[str, object]:
    """Return a model as OpenAI lists it, with its steering, and whether it is in memory."""
    return {
        "id": name,
        "object": "model",
        "created": CREATED,
        "owned_by": "mlx-densesteer",
        "steering": steering,
        "loaded": loaded,
    }
