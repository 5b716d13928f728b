"""ChatGLM-6B against a reference in PyTorch, written from its publications: row by row, each text alone."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.commands.main import main
from jaxlm.config import Decoding, MeshConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.errors import UserError
from jaxlm.inference.generator import Generator
from jaxlm.inference.model import unstack
from jaxlm.models import streamed
from jaxlm.models.decoder import Decoder
from jaxlm.models.families import SHAPES, read_config, write_config
from jaxlm.models.unrolled import extend, prefill
from jaxlm.nn.attention import MaskSpec, reference_attention, xla_attention
from jaxlm.nn.positions import prefix_positions
from jaxlm.spec import PrefixSpec
from jaxlm.weights.names import fused_entries, hf_entries, num_params
from tests.models.compare import assert_trees_close
from tests.models.small import OWN, small_spec, tree_of

torch = pytest.importorskip("torch")

SPEC = small_spec("chatglm_6b")
D, H, LAYERS, SOP, GMASK, MASK, EOS = 16, 2, 3, 30, 31, 32, 33
DICE = np.random.default_rng(5)
# A mask token at the end of the prompt, in its middle, and the other kind of it.
TEXTS = [
    [*DICE.integers(4, 29, 5), GMASK, SOP, *DICE.integers(4, 29, 4)],
    [4, 5, GMASK, 6, SOP, 7, 8],
    [9, MASK, 10, 11, SOP, 12],
]


def tensors() -> dict[str, Any]:
    """Random parameters by the names in its files."""
    parts = {part.name for whole in fused_entries(SPEC) for part in whole.parts}
    shapes = {entry.name: entry.layout.stored for entry in hf_entries(SPEC) if entry.name not in parts}
    shapes |= {whole.name: whole.stored for whole in fused_entries(SPEC)}
    dice = np.random.default_rng(0)
    values = {name: dice.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}
    for name in values:
        if "layernorm.weight" in name:
            values[name] += 1  # else constants would outweigh the tokens
    return {name: torch.from_numpy(value).requires_grad_() for name, value in values.items()}


def turned(x: Any, positions: Any) -> Any:
    """Half a head [T, H, h / 2], by frequencies that are rounded to 16 bits."""
    dims = x.shape[-1]
    frequencies = (1 / 10000 ** (torch.arange(0, dims, 2).float() / dims)).half().float()
    angles = torch.cat([positions[:, None].float() * frequencies] * 2, dim=-1)[:, None]
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def reference(t: dict[str, Any], text: list[int]) -> Any:
    """Logits [T, V] of one text."""
    ids = torch.tensor(text)
    start, length = text.index(SOP), len(text)
    told = text.index(GMASK if GMASK in text else MASK)
    positions, answer = torch.arange(length), torch.zeros(length, dtype=torch.long)
    positions[start:], answer[start:] = told, torch.arange(length - start) + 1
    hidden = torch.arange(length)[None] > torch.arange(length)[:, None]
    hidden[:, :start] = False

    def norm(x: Any, name: str) -> Any:
        return torch.nn.functional.layer_norm(x, (D,), t[f"{name}.weight"], t[f"{name}.bias"], 1e-5)

    def linear(x: Any, name: str) -> Any:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    x, scale = t["transformer.word_embeddings.weight"][ids], math.sqrt(2 * LAYERS)
    for n in range(LAYERS):
        at = f"transformer.layers.{n}"
        seen = norm(x, f"{at}.input_layernorm")
        q, k, v = linear(seen, f"{at}.attention.query_key_value").view(length, H, 3 * D // H).chunk(3, dim=-1)
        q, k = (
            torch.cat([turned(a, by) for a, by in zip(part.chunk(2, dim=-1), (positions, answer), strict=True)], dim=-1)
            for part in (q, k)
        )
        scores = torch.einsum("qhd,khd->hqk", q / (math.sqrt(D // H) * (n + 1)), k).masked_fill(hidden, -10000.0)
        weights = torch.softmax(scores * (n + 1), dim=-1)
        out = torch.einsum("hqk,khd->qhd", weights, v).reshape(length, D)
        x = seen * scale + linear(out, f"{at}.attention.dense")
        seen = norm(x, f"{at}.post_attention_layernorm")
        inner = torch.nn.functional.gelu(linear(seen, f"{at}.mlp.dense_h_to_4h"), approximate="tanh")
        x = seen * scale + linear(inner, f"{at}.mlp.dense_4h_to_h")
    return norm(x, "transformer.final_layernorm") @ t["lm_head.weight"].T


@functools.cache
def expected() -> tuple[dict[str, Any], list[np.ndarray], float, dict[str, Any], dict[str, Any]]:
    """Parameters by name, logits of each text, the loss summed over all, its gradients and the parameters as trees."""
    given = tensors()
    logits = [reference(given, text) for text in TEXTS]
    pairs = zip(logits, TEXTS, strict=True)
    loss = sum(torch.nn.functional.cross_entropy(a[:-1], torch.tensor(b[1:]), reduction="sum") for a, b in pairs)
    loss.backward()
    grads = tree_of({name: tensor.grad for name, tensor in given.items()}, SPEC)
    return given, [a.detach().numpy() for a in logits], loss.item(), grads, tree_of(given, SPEC)


def test_packed_and_padded_rows() -> None:
    """Logits of every text, the loss and all gradients; padding in front, as its tokenizer has it, and behind."""
    _, logits, total, grads, params = expected()
    first, second, _ = TEXTS
    length = len(first) + len(second) + 1
    ids, segments, positions = (np.zeros((2, length), np.int32) for _ in range(3))
    places = [(0, 0), (0, len(first)), (1, 4)]
    for number, ((row, start), text) in enumerate(zip(places, TEXTS, strict=True), 1):
        part = slice(start, start + len(text))
        ids[row, part], segments[row, part], positions[row, part] = text, number, np.arange(len(text))
    weights = (segments > 0) & (positions > 0)
    model = Decoder(SPEC)

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        inputs = dict(positions=positions, segment_ids=segments)
        value = model.apply({"params": params}, ids, weights.astype(np.float32), **inputs, method="loss").loss
        return value, model.apply({"params": params}, ids, **inputs)

    (value, found), found_grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    for (row, start), wanted in zip(places, logits, strict=True):
        np.testing.assert_allclose(found[row, start : start + len(wanted)], wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(value, total, rtol=1e-5)
    assert_trees_close(found_grads, grads, 1e-3)


def test_caches_and_streamed_layers() -> None:
    _, logits, _, _, params = expected()
    model, weights = Decoder(SPEC), unstack({"params": params}, SPEC)
    ids, lengths = np.zeros((2, 12), np.int32), np.array([9, 5])
    for row, text in enumerate(TEXTS[:2]):
        ids[row, : lengths[row]] = text[: lengths[row]]
    found, caches = prefill(model, weights, jnp.asarray(ids), jnp.asarray(lengths), 16)
    np.testing.assert_allclose(found, [logits[0][8], logits[1][4]], rtol=1e-4, atol=1e-4)
    more = np.stack([TEXTS[0][9:11], TEXTS[1][5:7]])
    found, _ = extend(model, weights, caches, jnp.asarray(more), jnp.asarray(lengths), jnp.array([2, 2]))
    np.testing.assert_allclose(found, [logits[0][10], logits[1][6]], rtol=1e-4, atol=1e-4)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    by_path = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    found = streamed.logits(SPEC, lambda path, index: by_path[path][index], np.asarray([TEXTS[1]], np.int32))
    np.testing.assert_allclose(found[0], logits[1], rtol=1e-4, atol=1e-4)


def test_greedy_and_beam_tokens() -> None:
    """Prompts of several lengths at once; greedy tokens are the reference's, two beams find no worse."""
    given, _, _, _, params = expected()
    prompts = [text[: text.index(SOP) + 1] for text in TEXTS]
    wanted = []
    for prompt in prompts:
        text = [int(token) for token in prompt]
        with torch.no_grad():
            while len(text) < len(prompt) + 6:
                text.append(int(reference(given, text)[-1].argmax()))
        wanted.append(tuple(text[len(prompt) :]))
    assert len({*wanted}) == 3 and min(len({*answer}) for answer in wanted) > 1  # else it would say little
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    generator = Generator(Decoder(SPEC), jax.tree.map(jnp.asarray, unstack({"params": params}, SPEC)), mesh, ())
    prompts = [[int(token) for token in prompt] for prompt in prompts]
    found = [answers[0].ids for answers in generator.generate(prompts, Decoding(max_new_tokens=6))]
    assert found == wanted
    beams = generator.generate(prompts, Decoding(max_new_tokens=6, num_beams=2))
    with torch.no_grad():
        for prompt, greedy, answers in zip(prompts, wanted, beams, strict=True):
            scores = [total(given, prompt, ids) for ids in (greedy, answers[0].ids)]
            assert scores[1] >= scores[0] - 1e-4


def total(given: dict[str, Any], prompt: list[int], answer: list[int]) -> float:
    """Log probability of an answer."""
    logits = torch.log_softmax(reference(given, [*prompt, *answer])[len(prompt) - 1 : -1], dim=-1)
    return float(logits[range(len(answer)), answer].sum())


def test_files_there_and_back_are_bit_equal(tmp_path: Path) -> None:
    stored = {name: tensor.detach().numpy() for name, tensor in tensors().items()}
    buffer = {"transformer.layers.0.attention.rotary_emb.inv_freq": np.ones(2, np.float16)}
    (tmp_path / "hf").mkdir()
    save_file(stored | buffer, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(OWN["chatglm_6b"]["plain"]))
    for verb, source, out in (("hf-to-jax", "hf", "jax"), ("jax-to-hf", "jax", "back")):
        assert main([verb, str(tmp_path / source), str(tmp_path / out)]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == stored.keys() and all(np.array_equal(value, stored[name]) for name, value in back.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "chatglm"


def test_config() -> None:
    shape = SHAPES["chatglm-6b"]
    assert num_params(shape) == 6_707_929_088
    assert read_config(write_config(shape, "float16")) == shape
    hub = dict(
        architectures=["ChatGLMForConditionalGeneration"],
        vocab_size=130528,
        hidden_size=4096,
        inner_hidden_size=16384,
        num_layers=28,
        num_attention_heads=32,
        position_encoding_2d=True,
    )
    assert read_config(hub) == shape
    for values, message in (
        ({"position_encoding_2d": False}, "position_encoding_2d is false"),
        ({"pre_seq_len": 128}, "pre_seq_len is 128"),
        ({"mask_token_id": "[MASK]"}, "expected token ids"),
    ):
        with pytest.raises(UserError, match=message):
            read_config(hub | values)


def test_positions_of_packed_texts() -> None:
    ids = np.array([[*TEXTS[1], *TEXTS[2], 0]])
    segments, positions = np.array([[1] * 7 + [2] * 6 + [0]]), np.array([[*range(7), *range(6), 0]])
    found = prefix_positions(PrefixSpec(SOP, (GMASK, MASK)), ids, positions, segments)
    np.testing.assert_array_equal(found[0], [[0, 1, 2, 3, 2, 2, 2, 0, 1, 2, 3, 1, 1, 0]])
    np.testing.assert_array_equal(found[1], [[0, 0, 0, 0, 1, 2, 3, 0, 0, 0, 0, 1, 2, 0]])
    np.testing.assert_array_equal(found[2], [[-1, -1, -1, -1, 1, 1, 1, -2, -2, -2, -2, 2, 2, 0]])


def test_prefixes_in_blocks_of_queries() -> None:
    """Rows longer than a block, whose first tokens see tokens of later blocks: values and gradients."""
    dice = np.random.default_rng(0)
    q, k, v, weights = (jnp.asarray(dice.normal(0, 1, (1, 600, 2, 4)).astype(np.float32)) for _ in range(4))
    segments = jnp.asarray(np.repeat([-1, 1, -2, 2, 0], [290, 20, 270, 15, 5])[None].astype(np.int32))
    mask = MaskSpec(segment_ids=jnp.abs(segments), prefix=segments < 0)
    found, wanted = (
        jax.jit(jax.value_and_grad(lambda *x, f=f: (f(*x, mask) * weights)[:, :595].sum(), (0, 1, 2)))(q, k, v)
        for f in (xla_attention, reference_attention)
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    assert_trees_close(found[1], wanted[1], 1e-5)
