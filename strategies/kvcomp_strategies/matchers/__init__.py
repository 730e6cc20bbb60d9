"""Matchers: where every other token goes."""
