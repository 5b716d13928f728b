"""What a run will need and how fast it may be, before it has devices: the parts of `jaxlm plan`."""
