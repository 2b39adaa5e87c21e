"""Time to the first token of a process, import and help time: python benchmarks/startup.py --help"""

from mlx_densesteer.bench.alone import main

if __name__ == "__main__":
    main("startup")
