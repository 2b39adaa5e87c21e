"""At which relative dose a model loses its thread: python benchmarks/dose.py --help"""

from mlx_densesteer.bench.alone import main

if __name__ == "__main__":
    main("dose")
