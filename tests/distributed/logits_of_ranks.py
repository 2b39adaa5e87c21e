"""Run under mlx.launch by tests/distributed/test_distributed.py: logits of models that are spread over ranks.

    logits_of_ranks.py VECTOR.npz OUT.npz KIND=FOLDER...        KIND is tensor or pipeline

Reads 12 tokens in two chunks and then one, steered at every layer of the vector. Rank 0 writes float32
logits (13, vocabulary) and the norms of the residual stream (layers,) for each model; every rank checks
that it has the same.
"""

import sys

import mlx.core as mx
import numpy as np

from mlx_densesteer import Steering, SteeringVector, make_cache
from mlx_densesteer.distributed.loading import load_over_ranks
from mlx_densesteer.distributed.ranks import Ranks
from mlx_densesteer.distributed.stream import settle

vector, out, *models = sys.argv[1:]
ranks = Ranks.connect()
made, norms = [], []
for kind, _, folder in (one.partition("=") for one in models):
    model = load_over_ranks(folder, ranks, pipeline=kind == "pipeline")
    norms.append([model.measured_norms[layer] for layer in range(model.layer_count)])
    steered = SteeringVector.load(vector)
    cache = make_cache(model, Steering(steered, 1.5, tuple(steered.layers)))
    parts = []
    for chunk in (range(3, 10), range(10, 15), range(15, 16)):
        logits = model.network(mx.array([list(chunk)]), cache)[0].astype(mx.float32)
        mx.eval(logits, [one.state for one in cache])
        parts.append(np.array(logits))
    made.append(np.concatenate(parts))
    assert len({tuple(row) for row in ranks.gather(made[-1][-1].tolist())}) == 1
if ranks.speaks:
    np.savez(out, *made, norms=norms)
settle(ranks)
