"""Selectors: which tokens stay."""
