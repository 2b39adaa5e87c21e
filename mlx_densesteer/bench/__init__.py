"""What the package costs and saves, measured on this machine: one module a benchmark.

A module has ``run(subject, *, options, tell) -> dict``, whose docstring says how it measures. The
numbers named in ``FIGURES`` are at the top level of that dict, all else is under ``details``.
``rows(result)`` is its part of the table; ``SUITE`` and ``QUICK`` are the options with which
``densesteer bench`` runs it. ``suite`` runs them all, ``alone`` is ``python benchmarks/NAME.py``.

Figures are ratios of the same work done two ways within one run, in turn, so that a machine whose
speed drifts favours neither; where it matters stock mlx-lm runs against itself as well, which
shows what the noise alone looks like.
"""
