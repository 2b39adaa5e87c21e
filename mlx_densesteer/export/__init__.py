"""Export to other runtimes: steered models that run without this package."""
