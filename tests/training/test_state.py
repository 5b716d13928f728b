"""Fresh states: what they hold, in which dtype, and that nothing is shared with the frozen weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import LoraConfig, MeshConfig, OptimizerConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.models.adapters import resolve_lora
from jaxlm.models.decoder import Decoder
from jaxlm.spec import uniform_decoder
from jaxlm.training.optimizer import make_optimizer, make_schedule
from jaxlm.training.state import Initializer, bytes_per_device, count
from jaxlm.weights.names import num_params

CONFIG = uniform_decoder(
    "llama",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_bias=True,
)
OPTIMIZER = partial(make_optimizer, OptimizerConfig(), make_schedule(OptimizerConfig(), 10))


def initializer(lora: LoraConfig | None, mesh: MeshConfig, dtype: Any = jnp.float32) -> Initializer:
    model = Decoder(CONFIG, resolve_lora(CONFIG, lora) if lora else {}, param_dtype=dtype)
    return Initializer(model, lora, make_mesh(mesh), OPTIMIZER)


@pytest.fixture(scope="module")
def adapted() -> tuple[Initializer, Any, Any]:
    lora = LoraConfig(rank=4, targets=("q_proj", "down_proj"), dora=True, modules_to_save=("embed_tokens", "norm"))
    made = initializer(lora, MeshConfig(data=2, fsdp=2, tensor=2), jnp.bfloat16)
    params = made.init_params(0)
    return made, params, made.init_lora(params, 1)


def test_parameters_count_and_shards() -> None:
    made = initializer(None, MeshConfig(data=1, fsdp=4, tensor=2))
    assert count(made.params) == num_params(CONFIG)
    whole = 4 * count(made.params)
    # All but the norms and the bias of down_proj is split in two or eight.
    assert whole / 8 <= bytes_per_device(made.params, made.params_shardings) < whole / 8 + 4 * 300


def test_seed_decides(adapted: Any) -> None:
    made, params, lora = adapted
    other = made.init_params(1)
    kernels = [p["layers"]["mlp"]["up_proj"]["kernel"] for p in (params, other)]
    assert not np.array_equal(*kernels)
    assert 0.015 < np.asarray(kernels[0], np.float32).std() < 0.025
    assert not np.array_equal(kernels[0][0], kernels[0][1])
    again = made.init_lora(params, 1)
    jax.tree.map(np.testing.assert_array_equal, lora, again)


def test_fresh_adapter(adapted: Any) -> None:
    _, params, lora = adapted
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(lora))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    q = lora["layers"]["self_attn"]["q_proj"]
    assert not np.any(q["lora_B"]) and np.any(q["lora_A"])
    kernel = np.asarray(params["layers"]["self_attn"]["q_proj"]["kernel"], np.float32)
    np.testing.assert_allclose(q["magnitude"], np.linalg.norm(kernel, axis=1), rtol=1e-5)
    saved = lora["modules_to_save"]
    assert set(saved) == {"embed_tokens", "norm"}
    np.testing.assert_array_equal(
        saved["embed_tokens"]["embedding"], np.asarray(params["embed_tokens"]["embedding"], np.float32)
    )


def test_state_shares_nothing_with_the_base_and_matches_its_description(adapted: Any) -> None:
    made, params, lora = adapted
    state = made.new_state({"lora": lora}, 5)

    def check(leaf: Any, described: Any) -> None:
        assert (leaf.shape, leaf.dtype) == (described.shape, described.dtype)
        assert leaf.sharding.is_equivalent_to(described.sharding, leaf.ndim)

    jax.tree.map(check, state, made.abstract_state())
    base = {shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards}
    held = {
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(state.trainable)
        for shard in leaf.addressable_shards
    }
    assert not base & held  # the state is donated every step
    assert (state.step, state.skipped) == (0, 0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


def test_load_reads_every_leaf_once_placed(adapted: Any) -> None:
    made, params, _ = adapted

    class Source:
        def __init__(self) -> None:
            self.paths: set[str] = set()

        def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
            self.paths.add(path)
            leaf = params
            for key in path.split("/"):
                leaf = leaf[key]
            return np.asarray(leaf)[index]

    source = Source()
    loaded = made.load_params(source)
    assert "layers/self_attn/q_proj/kernel" in source.paths and len(source.paths) == len(jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding.spec, b.spec), loaded, made.params_shardings)
