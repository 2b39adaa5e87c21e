"""What steering costs on this machine: the benchmarks behind ``densesteer bench``.

Each module measures one thing in ``run(subject, ..., tell) -> Measurement``. ``FIGURES`` names the
figures that programs read; ``QUICK`` holds the options of ``--quick``. A clone has more benchmarks
in ``benchmarks/``.

A figure is a ratio of the same work done two ways within one run, in turn, so that a machine whose
speed drifts favours neither. One side also runs against itself: the noise.
"""
