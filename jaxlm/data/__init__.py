"""Data: sources, templates, tokenised examples, packing, batches, preview.

Nothing is imported here: a conversion needs the templates alone, and waits for everything that it imports.
"""
