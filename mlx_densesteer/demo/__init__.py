"""The embedded demo model: a toy Qwen2 of 2.5 million parameters, its vector, its problems.

``scripts/train-demo-model`` trained the weights on synthetic word problems and extracted the vector
from the model's own solutions. The demo shows the pipeline and is no evidence about Qwen2.5.
"""

from pathlib import Path

NAME = "demo"  # in place of a model's folder or a vector's file
MODEL = Path(__file__).parent / "model"
VECTOR = Path(__file__).parent / "dense.npz"

ABOUT = (
    "This is the embedded toy of 2.5 million parameters. It knows stories like these and nothing else, "
    "best one to a conversation, and gets about one in seven wrong."
)

# The doses at which the demo is shown, as fractions of the residual stream's norm.
DOSES = (-0.3, 0.0, 0.1, 0.2, 1.0)
