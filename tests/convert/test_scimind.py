"""SciMind's models: a MindSpore checkpoint with patterns beside it, there and back, and what its code computes.

The reference is written from what is known of SciMind's forward pass, as released and as intended.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.source import open_model
from jaxlm.weights.files import read_tensors
from tests.convert.test_experts import TOKENS, E, F, L, assert_same_leaves, logits, random_owners, write_patterns
from tests.convert.test_mindspore import mindspore_arrays, write
from tests.convert.tiny import make_hf_model

FIRST_MOLECULE = 22
K_TEXT, K_MOLECULE = 3, 1
OPTIONS = ["--top-k", f"text={K_TEXT},molecule={K_MOLECULE}", "--range", f"molecule={FIRST_MOLECULE}:37"]


@pytest.fixture
def scimind(tmp_path: Path) -> Path:
    """model.ckpt with config.json, and patterns/."""
    model = make_hf_model()
    folder = tmp_path / "scimind"
    folder.mkdir()
    model.config.save_pretrained(folder)
    write(folder / "model.ckpt", mindspore_arrays(model))
    write_patterns(folder / "patterns", random_owners())
    return folder


def reference_logits(patterns: Path, released: bool) -> np.ndarray:
    """A dense model whose feed-forward is SciMind's, in float32 and with the lowest index winning ties."""
    torch = pytest.importorskip("torch")
    model = make_hf_model()
    tokens = torch.from_numpy(TOKENS).long()
    molecular = (TOKENS >= FIRST_MOLECULE).reshape(-1, 1)

    def top(scores: np.ndarray, k: int) -> np.ndarray:
        chosen = np.zeros(scores.shape, bool)
        np.put_along_axis(chosen, np.argsort(-scores, axis=1, kind="stable")[:, :k], True, axis=1)
        return chosen

    def patched(mlp: Any, pattern: np.ndarray) -> Callable[[Any], Any]:
        def forward(x: Any) -> Any:
            hidden = mlp.up_proj(x) * torch.nn.functional.silu(mlp.gate_proj(x))
            score = hidden.numpy().reshape(-1, F) @ pattern.T.astype(np.float32)
            first = top(np.where(molecular, score, 0.0), K_MOLECULE)
            second = top(np.where(molecular, 0.0, score), K_TEXT)
            if not released:
                first, second = first & molecular, second & ~molecular
            neurons = (first | second).astype(np.float32) @ pattern.astype(np.float32) > 0
            live.append(neurons.sum(axis=1))
            return mlp.down_proj(hidden * torch.from_numpy(neurons.reshape(hidden.shape)))

        return forward

    live: list[np.ndarray] = []
    for layer, block in enumerate(model.model.layers):
        block.mlp.forward = patched(block.mlp, np.load(patterns / f"patterns_{layer}.npy"))
    with torch.no_grad():
        found = model(tokens).logits.numpy()
    sizes = {int(size) for counts in live for size in counts[molecular[:, 0]]}
    # What the reference itself must be like: exactly k in the intended form, all of the text's first ones else.
    assert (min(sizes) >= K_TEXT * F // E) if released else (sizes == {K_MOLECULE * F // E})
    return found


@pytest.mark.parametrize("router", ["activation", "activation_released"])
def test_same_function(router: str, scimind: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    """In one step from the MindSpore files, and through Hugging Face's format."""
    given = ["--partition", scimind / "patterns", "--router", router, *OPTIONS]
    run("moefy", scimind / "model.ckpt", tmp_path / "moe", "--config", scimind / "config.json", *given)
    expected = reference_logits(scimind / "patterns", router == "activation_released")
    np.testing.assert_allclose(logits(tmp_path / "moe"), expected, atol=2e-5 * np.abs(expected).max())
    other = reference_logits(scimind / "patterns", router == "activation")
    assert np.abs(other - expected).max() > 1e-2 * np.abs(expected).max()
    run("jax-to-hf", tmp_path / "moe", tmp_path / "hf")
    np.testing.assert_array_equal(logits(tmp_path / "hf"), logits(tmp_path / "moe"))


@pytest.mark.parametrize("through", ["jax", "hf"])
def test_there_and_back(through: str, scimind: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    """Tensors and patterns are the same bytes, and the line that is printed makes the same model of them."""
    moe, out = tmp_path / "moe", tmp_path / "out"
    run("moefy", scimind, moe, "--partition", scimind / "patterns", "--router", "activation_released", *OPTIONS)
    if through == "hf":
        run("jax-to-hf", moe, tmp_path / "hf")
        said = run("hf-to-mindspore", tmp_path / "hf", out)
    else:
        said = run("jax-to-mindspore", moe, out)
    files = sorted(file.name for file in (out / "patterns").iterdir())
    assert files == [f"patterns_{layer}.npy" for layer in range(L)]
    for file in files:
        assert (out / "patterns" / file).read_bytes() == (scimind / "patterns" / file).read_bytes(), file
    first, second = (
        {name: (tensor.dtype, tensor.shape, tensor.read().tobytes()) for name, tensor in read_tensors(path).items()}
        for path in (scimind / "model.ckpt", out / "model.ckpt")
    )
    assert first == second
    shutil.rmtree(scimind)
    back = next(line for line in said.splitlines() if line.startswith("back")).split()[2:]
    run(*(str(tmp_path / "again") if word == "MOE" else word for word in back))
    assert open_model(tmp_path / "again").config == open_model(moe).config
    assert_same_leaves(open_model(tmp_path / "again"), open_model(moe))
    # Other options of the same writer.
    run("jax-to-mindspore", moe, tmp_path / "joined", "--qkv-concat", "--crc", "--dtype", "float16")
    run("mindspore-to-jax", tmp_path / "joined", tmp_path / "dense")
    assert open_model(tmp_path / "dense").config.experts is None


def test_no_original_order(hf_dir: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    """Of experts from the start: the patterns are blocks."""
    run("moefy", hf_dir, tmp_path / "moe", "--experts", E, "--router", "activation", "--method", "order", *OPTIONS)
    (tmp_path / "moe" / "jaxlm" / "partition.npy").unlink()
    run("jax-to-mindspore", tmp_path / "moe", tmp_path / "out")
    found = np.load(tmp_path / "out" / "patterns" / "patterns_1.npy")
    np.testing.assert_array_equal(found, np.arange(F) // (F // E) == np.arange(E)[:, None])


@pytest.mark.parametrize("router", ["learned", "modality"])
def test_other_routers(
    router: str, hf_dir: Path, tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]
) -> None:
    run("moefy", hf_dir, tmp_path / "moe", "--experts", E, "--router", router, *OPTIONS)
    message = refused("jax-to-mindspore", tmp_path / "moe", tmp_path / "out")
    assert f"router {router}" in message and "convert demoefy" in message and "jax-to-hf" in message
    message = refused("jax-to-meta", tmp_path / "moe", tmp_path / "out")
    assert "4 experts" in message and "convert demoefy" in message and "jax-to-hf" in message
