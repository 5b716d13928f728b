"""Comparing trees leaf by leaf."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def assert_trees_close(found: Any, expected: Any, relative: float) -> None:
    """Each leaf within `relative` times the largest magnitude of the expected leaf; the same structure."""
    found_leaves, found_def = jax.tree_util.tree_flatten_with_path(found)
    expected_leaves, expected_def = jax.tree_util.tree_flatten_with_path(expected)
    assert found_def == expected_def
    for (path, a), (_, b) in zip(found_leaves, expected_leaves, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, (jax.tree_util.keystr(path), a.shape, b.shape)
        assert np.isfinite(a).all(), jax.tree_util.keystr(path)
        error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)
        assert error < relative, f"{jax.tree_util.keystr(path)}: relative error {error:.2e}"


def random_tree(tree: Any, seed: int, std: float = 0.3) -> Any:
    """Normal values in the shapes of `tree` (arrays or ShapeDtypeStructs), float32."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0.0, std, leaf.shape).astype(np.float32), tree)


class TreeSource:
    """A tree of arrays, read like a checkpoint."""

    def __init__(self, tree: Any) -> None:
        self.leaves = {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        return np.asarray(self.leaves[path][index])
