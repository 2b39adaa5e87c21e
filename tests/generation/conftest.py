"""What the tests of generation share."""

import mlx.core as mx
import pytest
from helpers import every_third_ends_a_step

import mlx_densesteer as ds


@pytest.fixture(scope="module")
def model(hf_folder):
    """The tiny model with its tokenizer, in float32; every third token ends a step."""
    model = ds.load(hf_folder)
    model.network.set_dtype(mx.float32)
    every_third_ends_a_step(model.network, model.tokenizer)
    return model
