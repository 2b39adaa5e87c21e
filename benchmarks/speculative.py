"""Acceptance and speed with a draft model: python benchmarks/speculative.py --help"""

from mlx_densesteer.bench.alone import main

if __name__ == "__main__":
    main("speculative")
