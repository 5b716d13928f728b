"""Conversion between jaxlm and the formats of the field, tensor by tensor."""
