"""The command lines of the systems that jaxlm replaces, read as they stand and said in jaxlm's words."""
