"""Peak memory and speed of whole responses: python benchmarks/generation.py --help"""

from mlx_densesteer.bench.alone import main

if __name__ == "__main__":
    main("generation")
