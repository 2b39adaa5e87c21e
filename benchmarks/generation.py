"""Peak memory and speed of whole responses: python benchmarks/generation.py --help"""

from script import main

from mlx_densesteer.bench.generation import run

if __name__ == "__main__":
    main(run)
