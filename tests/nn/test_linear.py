"""One linear layer in bfloat16: DoRA's ratio and int8's factors are applied in float32, and results rounded once."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import linear
from jaxlm.nn.linear import Linear
from jaxlm.nn.lora import LoraSpec
from jaxlm.nn.matmul import LEAST_ROWS, matmul, with_least_rows
from jaxlm.nn.weight_types import Int8Weight

ROWS, INPUTS, OUTPUTS, RANK = 4096, 48, 12, 3
# Magnitude over norm by output: steps far below bfloat16's (2 ** -7 above 1), and some large ones.
RATIOS = 1 + np.array([0.0, 0.0025, -0.0025, 0.004, 0.001, -0.0015, 0.006, 0.011, -0.2, 0.3, 1.003, -0.0007])


def bfloat16(a: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, held in float32: what rounding alone does to weights is not looked at here."""
    return np.asarray(jnp.asarray(a, jnp.bfloat16).astype(jnp.float32))


def adapted(quantized: bool = False) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Variables of a DoRA layer [INPUTS] -> [OUTPUTS] of scale 1, an input, and the output in float64."""
    rng = np.random.default_rng(0)
    kernel = bfloat16(rng.normal(0, 0.2, (INPUTS, OUTPUTS)))
    a, b = bfloat16(rng.normal(0, 0.1, (INPUTS, RANK))), bfloat16(rng.normal(0, 0.1, (RANK, OUTPUTS)))
    x = bfloat16(rng.normal(size=(ROWS, INPUTS)))
    params: dict[str, Any] = {"kernel": kernel}
    weight = kernel.astype(np.float64)
    if quantized:
        params["kernel"] = Int8Weight.of_array(kernel, 1)
        weight = params["kernel"].values.astype(np.float64) * params["kernel"].factors
    weight = weight + a.astype(np.float64) @ b
    magnitude = np.linalg.norm(weight, axis=0) * RATIOS
    lora = {"lora_A": a, "lora_B": b, "magnitude": magnitude.astype(np.float32)}
    return {"params": params, "lora": lora}, x, x.astype(np.float64) @ (weight * RATIOS)


def gains(found: Any, expected: np.ndarray) -> np.ndarray:
    """By what each output is too large, [OUTPUTS]: rounding errors of single numbers cancel over the rows."""
    found = np.asarray(found, np.float64)
    return (found * expected).sum(0) / (expected**2).sum(0) - 1


class NothingDropped:
    """Takes the place of dropout, so that training with it can be compared number by number."""

    def __init__(self, rate: float) -> None:
        pass

    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        return x if deterministic else x * 1


def layer(dropout: float = 0.0) -> Linear:
    spec = LoraSpec((RANK,), (1.0,), dropout, dora=True)
    return Linear((INPUTS,), (OUTPUTS,), ("embed",), ("mlp",), adapter=spec, dtype=jnp.bfloat16)


@pytest.mark.parametrize("form", ["inference", "training", "training with dropout", "int8"])
def test_dora_in_bfloat16_is_dora(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output has the gain that its magnitude says, in each form; int8 against what int8 stands for."""
    monkeypatch.setattr(linear.nn, "Dropout", NothingDropped)
    variables, x, expected = adapted(quantized=form == "int8")
    module = layer(0.1 if form == "training with dropout" else 0.0)
    deterministic = form in ("inference", "int8")
    found = jax.jit(lambda v, x: module.apply(v, x, jnp.int32(0), deterministic=deterministic))(variables, x)
    assert found.dtype == jnp.bfloat16
    # A gain's standard error is 0.002 / sqrt(4096); with the ratio in bfloat16 some gains are 0.003 off.
    np.testing.assert_allclose(gains(found, expected), 0, atol=3e-4)


def test_dora_in_bfloat16_trains_and_answers_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout that drops nothing: the same layer to the last bit but one, with the same gradients."""
    monkeypatch.setattr(linear.nn, "Dropout", NothingDropped)
    variables, x, expected = adapted()
    x, expected = x[:256], expected[:256]

    def run(deterministic: bool) -> Any:
        def loss(lora: Any) -> Any:
            y = layer(0.1).apply({**variables, "lora": lora}, x, jnp.int32(0), deterministic=deterministic)
            return jnp.sum(jnp.asarray(y, jnp.float32) * expected), y

        return jax.jit(jax.grad(loss, has_aux=True))(variables["lora"])

    (grads, answered), (trained_grads, trained) = run(True), run(False)
    np.testing.assert_allclose(np.asarray(trained, np.float32), np.asarray(answered, np.float32), rtol=2**-7, atol=1e-6)
    for name in grads:
        np.testing.assert_allclose(trained_grads[name], grads[name], rtol=2e-2, atol=2e-2 * np.abs(grads[name]).max())
    # d loss / d magnitude = sum over rows of expected * output / ratio / norm, which is expected ** 2 / magnitude.
    right = (expected**2).sum(0) / variables["lora"]["magnitude"]
    np.testing.assert_allclose(trained_grads["magnitude"], right, rtol=2e-3)


def test_dora_in_bfloat16_has_pefts_gains() -> None:
    """PEFT's own layer with the same base in bfloat16, and what it merges."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    variables, x, expected = adapted()
    holder = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16)})
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj"], use_dora=True)
    wrapped = peft.get_peft_model(holder, config).base_model.model["q_proj"]
    lora = variables["lora"]
    with torch.no_grad():
        wrapped.base_layer.weight.copy_(torch.tensor(variables["params"]["kernel"].T))
        for module, value in (("lora_A", lora["lora_A"].T), ("lora_B", lora["lora_B"].T)):
            getattr(wrapped, module)["default"].weight.copy_(torch.tensor(value))
        wrapped.lora_magnitude_vector["default"].weight.copy_(torch.tensor(lora["magnitude"]))
        theirs = wrapped(torch.tensor(x).bfloat16()).float().numpy()
        in_full = wrapped.get_base_layer().weight.float() + wrapped.get_delta_weight("default").float()
        norm = torch.linalg.norm(in_full, dim=1).numpy()
        np.testing.assert_allclose(lora["magnitude"] / norm, RATIOS, rtol=1e-3)
    ours = layer().apply(variables, x, jnp.int32(0))
    np.testing.assert_allclose(gains(ours, expected), gains(theirs, expected), atol=1e-3)


def test_int8_is_rounded_once() -> None:
    """A product of int8 and bfloat16 against float64: the error is that of one rounding to bfloat16, not of two."""
    rng = np.random.default_rng(1)
    kernel = Int8Weight.of_array(rng.normal(0, 0.1, (2, 32, 96)).astype(np.float32), 2)
    factor = kernel.factors
    x = bfloat16(rng.normal(size=(512, 2, 32)))
    exact = np.einsum("nhi,hio->no", x.astype(np.float64), kernel.values.astype(np.float64)) * factor
    module = Linear((2, 32), (96,), ("heads", "head"), ("embed",), dtype=jnp.bfloat16)
    variables = {"params": {"kernel": kernel}}
    found = np.asarray(jax.jit(module.apply)(variables, x, jnp.int32(0)), np.float64)

    def error(y: np.ndarray) -> float:
        return float(np.sqrt(np.mean(((y - exact) / exact) ** 2)))

    once = error(bfloat16(exact.astype(np.float32)))
    twice = error(bfloat16(bfloat16(exact / factor) * factor))
    assert twice > 1.3 * once  # the test can tell them apart
    np.testing.assert_allclose(error(found), once, rtol=0.05)


def test_a_product_of_few_rows_has_more_on_an_nvidia_gpu() -> None:
    """With rows of zeros behind them, which leave no trace; other devices multiply what there is."""
    x, w = jnp.arange(6.0).reshape(2, 3), jnp.arange(12.0).reshape(3, 4)
    traced = jax.jit(lambda x, w: matmul(x, w, 1, jnp.float32)).trace(x, w)
    by_platform = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "cpu", "tpu")}
    assert {name: f"tensor<{LEAST_ROWS}x3xf32>" in text for name, text in by_platform.items()} == {
        "cuda": True,
        "cpu": False,
        "tpu": False,
    }
    seen = []

    def note(x: jax.Array, w: jax.Array) -> jax.Array:
        seen.append(x.shape[0])
        return x @ w

    np.testing.assert_array_equal(jax.jit(partial(with_least_rows, note))(x, w), x @ w)
    assert seen == [LEAST_ROWS, 2]  # as one of two branches
