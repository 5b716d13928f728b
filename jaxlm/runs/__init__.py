"""A run read back from what it writes: metrics, events, curves, a live view and a report. Needs no JAX."""
