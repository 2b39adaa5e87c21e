"""Several processes under ``mlx.launch``. The only room that knows of ranks."""
