"""The benchmarks import each other as scripts do: their folder is on the path."""

import sys

from helpers import ROOT

sys.path.append(str(ROOT / "benchmarks"))
