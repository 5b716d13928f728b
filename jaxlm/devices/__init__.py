"""Devices as a mesh: shapes, shardings, chips and compiler options."""
