"""A grid in shared batches against separate runs and processes: python benchmarks/sweep.py --help"""

from mlx_densesteer.bench.alone import main

if __name__ == "__main__":
    main("sweep")
