"""A grid in shared batches against separate runs and processes: python benchmarks/sweep.py --help"""

from script import main

from mlx_densesteer.bench.sweep import run

if __name__ == "__main__":
    main(run)
