"""jaxlm: adapt LLaMA-family models to a scientific domain with JAX."""

__version__ = "0.1.0"
