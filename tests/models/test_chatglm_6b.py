"""ChatGLM-6B: prompts that are a prefix, where the tests of every family have texts that are all answer."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.source import open_model
from jaxlm.config import Decoding, MeshConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.errors import UserError
from jaxlm.inference.generator import Generator
from jaxlm.inference.model import load_weights, unstack
from jaxlm.models import streamed
from jaxlm.models.decoder import Decoder
from jaxlm.models.families import SHAPES, read_config, write_config
from jaxlm.models.unrolled import extend, prefill
from jaxlm.nn.positions import prefix_positions
from jaxlm.spec import PrefixSpec
from jaxlm.weights.names import num_params
from tests.models.compare import TreeSource, assert_trees_close
from tests.models.small import OWN, hf_model, small_spec, tree_of

torch = pytest.importorskip("torch")

SPEC = small_spec("chatglm_6b")
SOP, GMASK, MASK = 30, 31, 32
DICE = np.random.default_rng(5)
# A mask token at the end of the prompt, in its middle, and the other kind of it.
TEXTS = [
    [*DICE.integers(4, 29, 5).tolist(), GMASK, SOP, *DICE.integers(4, 29, 4).tolist()],
    [4, 5, GMASK, 6, SOP, 7, 8],
    [9, MASK, 10, 11, SOP, 12],
]


@functools.cache
def model() -> Any:
    """The reference, with weights of which no constant outweighs the tokens."""
    module = hf_model("chatglm_6b")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(1.0 if name.endswith("layernorm.weight") else 0.0, 0.4)
            parameter.mul_(0.2 if name.endswith("layernorm.bias") else 1.0)
    return module


@functools.cache
def expected() -> tuple[list[np.ndarray], float, dict[str, Any], dict[str, Any]]:
    """Logits of each text, the loss summed over all, its gradients and the parameters as trees."""
    logits = [model()(torch.tensor([text])).logits[0] for text in TEXTS]
    pairs = zip(logits, TEXTS, strict=True)
    loss = sum(torch.nn.functional.cross_entropy(a[:-1], torch.tensor(b[1:]), reduction="sum") for a, b in pairs)
    loss.backward()
    parameters = dict(model().named_parameters())
    grads = tree_of({name: parameter.grad for name, parameter in parameters.items()}, SPEC)
    return [a.detach().numpy() for a in logits], loss.item(), grads, tree_of(parameters, SPEC)


def test_packed_and_padded_rows() -> None:
    """Logits of every text, the loss and all gradients; padding in front, as its tokenizer has it, and behind."""
    logits, total, grads, params = expected()
    first, second, _ = TEXTS
    length = len(first) + len(second) + 1
    ids, segments, positions = (np.zeros((2, length), np.int32) for _ in range(3))
    places = [(0, 0), (0, len(first)), (1, 4)]
    for number, ((row, start), text) in enumerate(zip(places, TEXTS, strict=True), 1):
        part = slice(start, start + len(text))
        ids[row, part], segments[row, part], positions[row, part] = text, number, np.arange(len(text))
    weights = (segments > 0) & (positions > 0)
    decoder = Decoder(SPEC)

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        inputs = dict(positions=positions, segment_ids=segments)
        value = decoder.apply({"params": params}, ids, weights.astype(np.float32), **inputs, method="loss").loss
        return value, decoder.apply({"params": params}, ids, **inputs)

    (value, found), found_grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    for (row, start), wanted in zip(places, logits, strict=True):
        np.testing.assert_allclose(found[row, start : start + len(wanted)], wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(value, total, rtol=1e-5)
    assert_trees_close(found_grads, grads, 1e-3)


def test_caches_and_streamed_layers() -> None:
    logits, _, _, params = expected()
    decoder, weights = Decoder(SPEC), unstack({"params": params}, SPEC)
    ids, lengths = np.zeros((2, 12), np.int32), np.array([9, 5])
    for row, text in enumerate(TEXTS[:2]):
        ids[row, : lengths[row]] = text[: lengths[row]]
    found, caches = prefill(decoder, weights, jnp.asarray(ids), jnp.asarray(lengths), 16)
    np.testing.assert_allclose(found, [logits[0][8], logits[1][4]], rtol=1e-4, atol=1e-4)
    more = np.stack([TEXTS[0][9:11], TEXTS[1][5:7]])
    found, _ = extend(decoder, weights, caches, jnp.asarray(more), jnp.asarray(lengths), jnp.array([2, 2]))
    np.testing.assert_allclose(found, [logits[0][10], logits[1][6]], rtol=1e-4, atol=1e-4)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    by_path = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    found = streamed.logits(SPEC, lambda path, index: by_path[path][index], np.asarray([TEXTS[1]], np.int32))
    np.testing.assert_allclose(found[0], logits[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("beams", "tensor"),
    [(1, 1), (2, 1), pytest.param(1, 2, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow)],
)
def test_tokens_are_those_of_the_reference(beams: int, tensor: int) -> None:
    """Prompts of several lengths at once, each read as a prefix."""
    prompts = [text[: text.index(SOP) + 1] for text in TEXTS]
    options = dict(do_sample=False, max_new_tokens=6, num_beams=beams, eos_token_id=None, pad_token_id=3)
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            whole = model().generate(ids, attention_mask=torch.ones_like(ids), **options)
        wanted.append(tuple(whole[0, len(prompt) :].tolist()))
    assert len({*wanted}) == 3 and min(len({*answer}) for answer in wanted) > 1  # else it would say little
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=tensor), jax.devices()[:tensor])
    weights = load_weights(Decoder(SPEC), mesh, TreeSource(expected()[-1]), None)
    generator = Generator(Decoder(SPEC), weights, mesh, ())
    answers = generator.generate(prompts, Decoding(max_new_tokens=6, num_beams=beams))
    assert [answer[0].ids for answer in answers] == wanted


def test_the_buffers_of_its_files_are_left_out(tmp_path: Path) -> None:
    stored = {name: tensor.detach().numpy() for name, tensor in hf_model("chatglm_6b").state_dict().items()}
    buffer = {"transformer.layers.0.attention.rotary_emb.inv_freq": np.ones(2, np.float16)}
    save_file(stored | buffer, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(OWN["chatglm_6b"]["plain"]))
    assert open_model(tmp_path).config == SPEC


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
