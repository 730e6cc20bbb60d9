"""Stores: how a layer holds its slots in memory."""
