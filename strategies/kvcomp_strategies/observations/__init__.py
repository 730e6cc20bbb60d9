"""Observations: statistics of the attention rows."""
