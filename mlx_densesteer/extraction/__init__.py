"""From problems to contrastive pairs, and from pairs to a steering vector."""
