"""The verbs of `convert`."""
