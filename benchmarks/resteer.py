"""Turning the dial on a prefix against reading it again: python benchmarks/resteer.py --help"""

from script import main

from mlx_densesteer.bench.resteer import run

if __name__ == "__main__":
    main(run)
