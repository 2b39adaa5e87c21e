"""Steered against stock: decode, prefill, operations: python benchmarks/decode.py --help"""

from script import main

from mlx_densesteer.bench.decode import run

if __name__ == "__main__":
    main(run)
