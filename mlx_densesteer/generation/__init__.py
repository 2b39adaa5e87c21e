"""Tokens out: one answer, many in a batch, a conversation."""
