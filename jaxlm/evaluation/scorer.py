"""A model on its devices, ready to score texts: placed as in training, with nothing to train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxlm.config import InferenceModelConfig, LoraConfig, MeshConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.errors import UserError
from jaxlm.inference.loading import compute_dtype, kept_in
from jaxlm.kernels.backend import choose_for_layers
from jaxlm.models.adapters import resolve_lora
from jaxlm.models.decoder import Decoder
from jaxlm.nn.routers import choose_compute
from jaxlm.training.setup import DTYPES
from jaxlm.training.state import Initializer
from jaxlm.weights.leaves import AdapterSource, ParamSource


@dataclass(frozen=True)
class Scorer:
    """What `perplexity.measure` runs.

    Args:
        model: the decoder.
        trainable: the innermost variables: the adapter, or the base where there is none.
        frozen: the other variables.
        mesh: the devices.
        dtype: of weights and compute.
        attention_reason: why this attention.
    """

    model: Decoder
    trainable: dict[str, Any]
    frozen: dict[str, Any]
    mesh: Mesh
    dtype: str
    attention_reason: str


def place(
    source: ParamSource,
    adapter: AdapterSource | None,
    config: InferenceModelConfig,
    mesh: MeshConfig | None,
    longest: int,
) -> Scorer:
    """Reads a model onto the devices.

    Args:
        source: the model.
        adapter: an adapter that is applied on the fly; None without one.
        config: dtype, attention, and what the linear layers' weights are kept in.
        mesh: the devices; None: rows and parameters over all of them.
        longest: tokens of the longest row, for which the attention is chosen.

    Raises:
        UserError: for a mesh or an adapter that does not fit.
    """
    spec = source.config
    spec.refuse_encoder("perplexity")
    dtype = compute_dtype(config.dtype)
    layers = [layer.attention for layer in spec.period]
    attention, reason, _ = choose_for_layers(config.attention, layers, dtype, longest, True)
    lora = {} if adapter is None else resolve_lora(spec, adapter.lora, adapter.layers)
    experts = (
        "dense" if spec.experts is None else choose_compute("auto", jax.devices()[0], spec.experts, lora, dtype)[0]
    )
    axes = mesh or MeshConfig()
    if axes.sequence != 1:
        raise UserError(f"mesh.sequence: {axes.sequence}: rows are not divided here; set it to 1")
    devices = make_mesh(axes, experts=None if spec.experts is None else spec.experts.num_experts)
    model = Decoder(spec, lora, DTYPES[dtype], DTYPES[dtype], attention, "none", experts)
    # No optimizer: nothing is trained, but parameters are placed as in training.
    kind = kept_in(source, config.kind)
    own = None if adapter is None else adapter.lora
    # What is kept in few bits is the frozen base of an adapter, which may have no factors.
    settings = LoraConfig() if own is None and kind is not None else own
    initializer = Initializer(model, settings, devices, lambda axes: optax.identity(), kind)
    base = {"params": initializer.load_params(source)}
    if adapter is None:
        return Scorer(model, *(({"lora": {}}, base) if kind is not None else (base, {})), devices, dtype, reason)
    return Scorer(model, {"lora": initializer.load_lora(adapter)}, base, devices, dtype, reason)
