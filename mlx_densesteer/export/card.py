"""The model card of a baked checkpoint: what was baked into what, and what it cannot do."""

from dataclasses import dataclass, replace
from pathlib import Path

from .._version import __version__
from ..model.config import is_hub_id
from ..model.model import ModelInfo
from ..steering.steering import Steering
from ..steering.vector import format_layers
from .closeness import Closeness


@dataclass(frozen=True)
class Baked:
    """What was baked into what, and how close it came.

    ``closeness`` is ``None`` where nothing here runs the result (GGUF).
    """

    path: Path
    source: ModelInfo
    steering: Steering
    relative_dose: dict[int, float]
    format: str
    closeness: Closeness | None

    def at(self, path: Path, closeness: Closeness | None) -> "Baked":
        """Return the same, written and checked."""
        return replace(self, path=path, closeness=closeness)

    @property
    def quantization(self) -> str:
        """Of what was written."""
        undone = self.format != "mlx" and self.source.quantization != "none"
        return f"undone ({self.source.quantization})" if undone else self.source.quantization

    def record(self) -> dict[str, object]:
        """Return ``densesteer.json``; ``baked`` is what tells such a folder from a converted one."""
        setting = self.steering.describe() | {
            "vector_sha256": self.steering.vector.sha256(),
            "relative_dose": {str(k): round(v, 4) for k, v in self.relative_dose.items()},
        }
        return {
            "source": self.source.name,
            "fingerprint": self.source.fingerprint,
            "format": self.format,
            "quantization": self.quantization,
            "dtype": self.source.dtype,
            "baked": setting,
            "checked": self.closeness.describe() if self.closeness else None,
            "created_by": f"mlx-densesteer {__version__}",
        }


def model_card(baked: Baked) -> str:
    """Return ``README.md`` of the folder, with the front matter that the Hub reads."""
    steering, name = baked.steering, baked.source.name
    layers = format_layers(steering.layers or ())
    dose = sum(baked.relative_dose.values())
    base = f"base_model: {name}\n" if is_hub_id(name) else ""
    library = "mlx" if baked.format == "mlx" else "transformers"
    run = (
        'mlx_lm.generate --model FOLDER --prompt "What is 17 * 24?"'
        if baked.format == "mlx"
        else 'transformers.AutoModelForCausalLM.from_pretrained("FOLDER")'
    )
    return f"""---
{base}library_name: {library}
pipeline_tag: text-generation
tags:
- steering-vectors
- densesteer
---

# {name}, steered

`{name}` with a steering vector baked in: layer {layers}, strength {steering.strength:g}, relative dose
{dose:.2g}. Positive strength is towards denser reasoning: fewer steps that each carry more (arXiv 2605.29247).
The weights are those of the source; only biases were added.

    {run}

It is an ordinary `llama` checkpoint: Qwen2's architecture with biases on every projection, zero but for
`mlp.down_proj.bias` of layer {layers}, which is strength times vector.

| | |
| --- | --- |
| made from | `{name}`, fingerprint `{baked.source.fingerprint}` |
| vector | `{steering.vector.name}`, made for `{steering.vector.meta.model}`, SHA-256 `{steering.vector.sha256()}` |
| layer, strength | {layers}; {steering.strength:g} |
| positions | all, prompt and response |
| quantisation | {baked.quantization} |
| checked | {baked.closeness} |
| made by | mlx-densesteer {__version__} |

Limits: one strength, which cannot be turned; every position is steered; the licence is that of `{name}`.
Whether its answers are better was not measured here.
"""
