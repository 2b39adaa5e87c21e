"""Making responses denser: by a local model, an endpoint, fixed rules, or a file."""

from .draft import Draft, Rewrite, Rewriter

__all__ = ["Draft", "Rewrite", "Rewriter"]
