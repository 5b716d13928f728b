"""Using a model: cache, decoding, batches of prompts, conversations."""
