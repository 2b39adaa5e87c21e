"""Acceptance and speed with a draft model: python benchmarks/speculative.py --help"""

from script import main

from mlx_densesteer.bench.speculative import run

if __name__ == "__main__":
    main(run)
