"""Data: sources, templates, tokenised examples, packing, batches, preview."""

from jaxlm.data.loader import Batches, BatchIterator, Data, build_data

__all__ = ["BatchIterator", "Batches", "Data", "build_data"]
