"""Throughput against rows: python benchmarks/batch.py --help"""

from script import main

from mlx_densesteer.bench.batch import run

if __name__ == "__main__":
    main(run)
