"""Throughput against rows: python benchmarks/batch.py --help"""

from mlx_densesteer.bench.alone import main

if __name__ == "__main__":
    main("batch")
