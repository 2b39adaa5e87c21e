"""A function file against run-time steering: python benchmarks/function.py --help"""

from mlx_densesteer.bench.alone import main

if __name__ == "__main__":
    main("function")
