"""Mergers: how the other tokens are folded into those that stay."""
