"""The tasks of `jaxlm evaluate`, a file each: what the model is asked, how answers are scored, what is drawn."""
