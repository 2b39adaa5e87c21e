"""Leaving our runtime: steered models for programs that know nothing of us."""
