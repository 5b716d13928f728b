"""The commands of jaxlm."""

from jaxlm.machine import quiet_libtpu

quiet_libtpu()  # before any command imports JAX
