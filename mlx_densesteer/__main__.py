"""``python -m mlx_densesteer`` is ``densesteer``."""

from .cli import main

main(prog_name="densesteer")
