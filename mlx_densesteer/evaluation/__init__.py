"""Problems, grades, scores, and sweeps over layers and strengths."""
