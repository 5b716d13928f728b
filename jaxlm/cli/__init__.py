"""The commands of jaxlm."""
