"""What is added to the residual stream: vectors, steerings, and how a request becomes one. No mlx."""
