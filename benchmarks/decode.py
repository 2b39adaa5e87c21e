"""Steered against stock: decode, prefill, operations: python benchmarks/decode.py --help"""

from mlx_densesteer.bench.alone import main

if __name__ == "__main__":
    main("decode")
