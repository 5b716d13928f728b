"""Data: sources, templates, tokenised examples, packing, batches, preview."""

from jaxlm.data.batches import Batches, BatchIterator
from jaxlm.data.loader import Data, build_data

__all__ = ["BatchIterator", "Batches", "Data", "build_data"]
