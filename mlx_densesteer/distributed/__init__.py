"""Several processes under ``mlx.launch``: the only room that knows of ranks."""
