"""What a run will need and how fast it may be, before anyone pays for the devices: the parts of `jaxlm.plan`."""
