"""The version of jaxlm, apart from the package's public names, so that what they are made of can import it."""

__version__ = "0.1.0"
