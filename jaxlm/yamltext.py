"""YAML from users: safe, and strict about keys that stand twice."""

from __future__ import annotations

from typing import Any

import yaml


class DuplicateKeyError(yaml.MarkedYAMLError):
    """One mapping has the same key twice."""


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for at, (key, _) in enumerate(node.value):
            if len(names) == len(node.value) and key.value in names[:at]:
                problem = f"the key {key.value!r} stands twice; put the two together, or remove one"
                raise DuplicateKeyError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """What `yaml.safe_load` gives, but a key given twice is refused, where safe_load takes the last one.

    Raises:
        DuplicateKeyError: for such a key.
        yaml.YAMLError, ValueError, RecursionError: as safe_load raises them.
    """
    return _Loader(text).get_single_data()
