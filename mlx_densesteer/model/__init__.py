"""Where it is added: the model, its steered decoder blocks, and the KV caches that carry the steering."""
