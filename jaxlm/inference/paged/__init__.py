"""The serving engine: continuous batching over keys and values in pages."""
