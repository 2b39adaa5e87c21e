"""What steering costs and saves on this machine: the suite behind ``densesteer bench``.

One module measures one thing: ``run(subject, *, options, tell) -> Measurement``; its docstring says
how. ``FIGURES`` names the figures that programs read, ``SUITE`` and ``QUICK`` are the options that
``densesteer bench`` and its ``--quick`` use. ``suite`` runs them all; a clone also has
``python benchmarks/NAME.py`` for each, and more benchmarks that need servers or PyTorch.

A figure is a ratio of the same work done two ways within one run, in turn, so that a machine whose
speed drifts favours neither. Where it matters one side also runs against itself: the noise.
"""
