"""What is done to weights: a source in, a source out."""
