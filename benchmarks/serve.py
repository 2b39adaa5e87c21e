"""Concurrent clients, our server against mlx_lm.server: python benchmarks/serve.py --help"""

from mlx_densesteer.bench.alone import main

if __name__ == "__main__":
    main("serve")
