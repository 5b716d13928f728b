"""Layers as pure functions of their parameters."""
