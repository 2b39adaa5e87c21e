"""At which layer and doses the demo is shown; a dose is a fraction of the residual norm."""

LAYER = 5
POSITIONS = "all"
DOSES = (-0.3, 0.0, 0.1, 0.2, 1.0)
