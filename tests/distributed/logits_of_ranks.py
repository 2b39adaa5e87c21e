"""Run under mlx.launch by tests/distributed/test_distributed.py: logits of models that are spread over ranks.

    logits_of_ranks.py VECTOR.npz OUT.npz KIND=FOLDER...        KIND is tensor or pipeline

Reads 12 tokens in two chunks and then one, steered at every layer of the vector; rank 0 writes float32
logits (13, vocabulary) for each model, and every rank checks that it has the same.
"""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_densesteer import Steering, SteeringVector, make_cache
from mlx_densesteer.distributed.ranks import Ranks
from mlx_densesteer.distributed.loading import load_sharded, settle

vector, out, *models = sys.argv[1:]
ranks = Ranks.connect()
made = []
for kind, _, folder in (one.partition("=") for one in models):
    model, _, _ = load_sharded(Path(folder), ranks, pipeline=kind == "pipeline")
    cache = make_cache(model, Steering(SteeringVector.load(vector), 1.5))
    parts = []
    for chunk in (range(3, 10), range(10, 15), range(15, 16)):
        logits = model(mx.array([list(chunk)]), cache)[0].astype(mx.float32)
        mx.eval(logits, [one.state for one in cache])
        parts.append(np.array(logits))
    made.append(np.concatenate(parts))
    assert len({tuple(row) for row in ranks.gather(made[-1][-1].tolist())}) == 1
if ranks.speaks:
    np.savez(out, *made)
settle(ranks)
