"""Turning the dial on a prefix against reading it again: python benchmarks/resteer.py --help"""

from mlx_densesteer.bench.alone import main

if __name__ == "__main__":
    main("resteer")
