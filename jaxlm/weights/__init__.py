"""Weights at rest: named leaves by slices, and the files that hold them."""
