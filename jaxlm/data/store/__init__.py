"""Tokens on disk, memory-mapped: the store, its formats, and the cache that `train` fills."""
