"""LoRA, rsLoRA and DoRA against PEFT: logits and gradients, float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import LoraConfig
from jaxlm.models.adapters import resolve_lora
from jaxlm.models.decoder import Decoder, with_saved_modules
from jaxlm.models.families import FAMILIES
from tests.models import hf
from tests.models.compare import assert_trees_close

peft = pytest.importorskip("peft")

LINEARS = tuple(FAMILIES["llama"].linears)
CASES: dict[str, dict[str, Any]] = {
    # Layers of different rank and alpha: by full name, by suffix, by regular expression.
    "lora": dict(
        rank=4,
        alpha=10.0,
        targets=LINEARS,
        rank_pattern={"layers.0.self_attn.q_proj": 6, r"layers\.1\.mlp\..*": 2, "o_proj": 3},
        alpha_pattern={"layers.1.self_attn.v_proj": 3.0, "down_proj": 24.0},
    ),
    "rslora-saved": dict(
        rank=4,
        alpha=5.0,
        targets=("q_proj", "v_proj"),
        rslora=True,
        modules_to_save=("embed_tokens", "lm_head", "norm"),
    ),
    "dora": dict(
        rank=3,
        alpha=4.0,
        targets=LINEARS,
        dora=True,
        rank_pattern={"layers.1.self_attn.q_proj": 5, "gate_proj": 2},
        alpha_pattern={"layers.0.self_attn.o_proj": 9.0},
    ),
}


def build(settings: LoraConfig, seed: int = 3) -> tuple[Any, Any]:
    base, config = hf.build(attention_bias=True)
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=list(settings.targets),
            rank_pattern=dict(settings.rank_pattern),
            alpha_pattern=dict(settings.alpha_pattern),
            use_rslora=settings.rslora,
            use_dora=settings.dora,
            # PEFT goes by the end of the name: a bare "norm" would also take the norms of the layers.
            modules_to_save=[f"model.{m}" if m == "norm" else m for m in settings.modules_to_save] or None,
        ),
    )
    hf.torch.manual_seed(seed)
    with hf.torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "lora_magnitude" in name or "modules_to_save.default" in name:
                p.add_(0.2 * hf.torch.randn_like(p))
    return model, config


def saved(model: Any, grad: bool = False) -> dict[str, Any]:
    inner = model.get_base_model()
    modules = {
        ("embed_tokens", "embedding"): inner.model.embed_tokens,
        ("lm_head", "kernel"): inner.lm_head,
        ("norm", "scale"): inner.model.norm,
    }
    tree = {}
    for (name, leaf), module in modules.items():
        weight = module.modules_to_save["default"].weight
        tree[name] = {leaf: (weight.grad if grad else weight).detach().numpy()}
    return tree


def base_weights(model: Any, config: Any) -> dict[str, Any]:
    """The frozen weights; PEFT renames what it wraps."""
    named = {}
    for name, p in model.get_base_model().named_parameters():
        if "lora_" not in name and "modules_to_save" not in name:
            named[name.replace(".base_layer", "").replace(".original_module", "")] = p
    return hf.params(named, config)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case: str) -> None:
    settings = LoraConfig(**CASES[case])
    torch_model, config = build(settings)
    specs = resolve_lora(config, settings)
    for name, spec in specs.items():
        for i, layer in enumerate(torch_model.get_base_model().model.layers):
            module = getattr(getattr(layer, hf.parent_of(name)), name)
            assert (spec.ranks[i], spec.scales[i]) == (module.r["default"], pytest.approx(module.scaling["default"]))
    lora = hf.adapter(torch_model, config, specs)
    if settings.modules_to_save:
        lora["modules_to_save"] = saved(torch_model)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, 16)).astype(np.int32)

    tokens = hf.torch.from_numpy(ids).long()
    expected = torch_model(tokens).logits
    flat = expected[:, :-1].reshape(-1, expected.shape[-1])
    hf.torch.nn.functional.cross_entropy(flat, tokens[:, 1:].reshape(-1), reduction="sum").backward()
    expected_grads = hf.adapter(torch_model, config, specs, grad=True)
    if settings.modules_to_save:
        expected_grads["modules_to_save"] = saved(torch_model, grad=True)

    model = Decoder(config, specs, remat="none")
    base = base_weights(torch_model, config)

    def loss(lora: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.apply(with_saved_modules(base, lora), ids)
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log_probs, ids[:, 1:, None], -1).sum(), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(lora)
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=0, atol=1e-4)
    assert_trees_close(grads, expected_grads, 1e-4)

    # Padding behind a smaller rank: exactly zero, so that it stays zero under any optimizer.
    for name, spec in specs.items():
        for i, rank in enumerate(spec.ranks):
            leaf = grads["layers"][hf.parent_of(name)][name]
            assert not np.any(leaf["lora_A"][i][..., rank:])
            assert not np.any(leaf["lora_B"][i][rank:])
            assert np.any(leaf["lora_A"][i][..., rank - 1]) and np.any(leaf["lora_B"][i][rank - 1])


def test_dora_dropout_touches_only_the_update() -> None:
    """PEFT drops in (ratio - 1) W x + ratio B A x, not in W x: with one mask for both sides, the same layer."""
    rng = np.random.default_rng(0)
    base = hf.torch.nn.Linear(12, 10, bias=True)
    holder = hf.torch.nn.ModuleDict({"q_proj": base})
    model = peft.get_peft_model(
        holder, peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.4, target_modules=["q_proj"], use_dora=True)
    )
    layer = model.base_model.model["q_proj"]
    mask = (rng.random((5, 12)) > 0.4).astype(np.float32) / 0.6

    class Masked(hf.torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x * hf.torch.from_numpy(mask)

    layer.lora_dropout["default"] = Masked()
    with hf.torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        layer.lora_magnitude_vector["default"].weight.mul_(1.5)
    layer.train()
    x = rng.normal(size=(5, 12)).astype(np.float32)
    expected = layer(hf.torch.from_numpy(x)).detach().numpy()

    from jaxlm.nn import linear
    from jaxlm.nn.lora import LoraSpec

    variables = {
        "params": {"kernel": base.weight.detach().numpy().T, "bias": base.bias.detach().numpy()},
        "lora": {
            "lora_A": layer.lora_A["default"].weight.detach().numpy().T,
            "lora_B": layer.lora_B["default"].weight.detach().numpy().T,
            "magnitude": layer.lora_magnitude_vector["default"].weight.detach().numpy(),
        },
    }

    class FixedDropout:
        def __init__(self, rate: float) -> None:
            assert rate == 0.4

        def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
            return x if deterministic else x * mask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear.nn, "Dropout", FixedDropout)
        module = linear.Linear(
            (12,), (10,), ("embed",), ("mlp",), use_bias=True, adapter=LoraSpec((3,), (2.0,), 0.4, True)
        )
        found = module.apply(variables, x, jnp.int32(0), deterministic=False)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
