"""JAX's coordination service: a key-value store and barriers for the processes of a run.

JAX 0.10 gives them no public name. What is public (`jax.experimental.multihost_utils`) runs programs on the devices, so
that it works neither before the devices are used nor beside a step. Only this module knows the private name.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax

# The service takes milliseconds as a signed 32-bit number.
_FOR_EVER = 2**31 - 1


class Coordination(Protocol):
    """What `ControlChannel` and `Hosts` need of the service."""

    def put(self, key: str, value: str) -> bool:
        """Stores a value under a key; False, and nothing changes, where the key has one already."""

    def wait(self, key: str) -> str:
        """The value of a key, as soon as it has one."""

    def forget(self, key: str) -> None:
        """Takes a key and its value away; nothing happens where there is none."""

    def values(self, key: str) -> dict[int, str]:
        """process -> value, of the keys 'KEY/0', 'KEY/1', … that have one."""

    def barrier(self, name: str, seconds: float) -> bool:
        """Waits until all processes have come here; False when some have not come in time. Each name serves once."""


class JaxCoordination:
    """The service of `jax.distributed.initialize`, which must have been called."""

    def __init__(self) -> None:
        from jax._src import distributed  # private: see the module's docstring

        self._client: Any = distributed.global_state.client

    def put(self, key: str, value: str) -> bool:
        try:
            self._client.key_value_set(key, value)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise
            return False
        return True

    def wait(self, key: str) -> str:
        return str(self._client.blocking_key_value_get(key, _FOR_EVER))

    def forget(self, key: str) -> None:
        self._client.key_value_delete(key)

    def values(self, key: str) -> dict[int, str]:
        return {int(path.rpartition("/")[2]): text for path, text in self._client.key_value_dir_get(f"{key}/")}

    def barrier(self, name: str, seconds: float) -> bool:
        try:
            self._client.wait_at_barrier(name, int(seconds * 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            return False
        return True
