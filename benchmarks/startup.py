"""Time to the first token of a process, import and help time: python benchmarks/startup.py --help"""

from script import main

from mlx_densesteer.bench.startup import run

if __name__ == "__main__":
    main(run)
