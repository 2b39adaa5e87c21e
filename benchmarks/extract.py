"""Extraction against one by one, and steering-vectors: python benchmarks/extract.py --help"""

from mlx_densesteer.bench.alone import main

if __name__ == "__main__":
    main("extract")
