"""Good, bad and leaving clients for minutes: python benchmarks/soak.py --help"""

import sys

from mlx_densesteer.bench import soak
from mlx_densesteer.bench.alone import main

if __name__ == "__main__":
    main("soak")
    sys.exit(bool(soak.LAST_FAILURES))
