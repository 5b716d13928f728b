"""Phi-3 and its longrope, held to transformers."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import Decoding, MeshConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.errors import UserError
from jaxlm.inference.engine import Engine
from jaxlm.inference.generator import Generator
from jaxlm.inference.model import unstack
from jaxlm.inference.samples import greedy_answers
from jaxlm.models.decoder import Decoder
from jaxlm.models.families import read_config, write_config
from jaxlm.nn.positions import document_lengths, rope_cos_sin
from tests.models.parity import check_family, random_model
from tests.models.small import SMALL, tree_of

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("variant", ["window", "partial"])
@pytest.mark.slow
def test_phi3_is_that_of_transformers(variant: str) -> None:
    check_family("phi3", variant)


@pytest.mark.slow
def test_longrope_is_that_of_transformers() -> None:
    """Texts that are longer than what the first factors serve, from the first look on."""
    check_family("phi3", "longrope", original_max_position_embeddings=2)


# --- longrope: texts of up to 8 tokens are turned by one set of factors, longer ones by another ----------------------


@pytest.fixture(scope="module")
def longrope() -> tuple[Any, Generator]:
    model, spec, params = random_model("phi3", "longrope")
    assert (spec.switch_length, spec.max_length) == (8, 64)
    weights = jax.tree.map(jnp.asarray, unstack({"params": params}, spec))
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    return model, Generator(Decoder(spec), weights, mesh, ())


# Texts that cross while they are written, that begin at the border, behind it, and that end before and at it.
PROMPTS = [np.random.default_rng(length).integers(3, 37, length).tolist() for length in (3, 7, 8, 9, 14)]


def reference(model: Any, prompt: list[int], new: int, **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    more = dict(do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **more, **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("beams", [1, 3])
def test_a_text_that_outgrows_its_factors_is_read_again(longrope: tuple[Any, Generator], beams: int) -> None:
    model, generator = longrope
    for new in (1, 11):
        options = Decoding(max_new_tokens=new, num_beams=beams)
        wanted = [reference(model, prompt, new, num_beams=beams) for prompt in PROMPTS]
        assert [list(answers[0].ids) for answers in generator.generate(PROMPTS, options)] == wanted


def test_samples_of_a_run_are_read_again(longrope: tuple[Any, Generator]) -> None:
    model, generator = longrope
    variables = {"params": tree_of(dict(model.named_parameters()), generator.decoder.spec)}
    found = greedy_answers(generator.decoder, variables, generator.mesh, PROMPTS, 11, [])
    assert found == [reference(model, prompt, 11) for prompt in PROMPTS]


def test_a_kept_row_serves_only_texts_that_are_turned_alike(longrope: tuple[Any, Generator]) -> None:
    model, generator = longrope
    engine = Engine(generator, 1, keep=True)
    text = PROMPTS[0]
    # Each goes on with what the row holds: over the border, behind it, and back again.
    for new, prompt in ((5, text), (6, None), (3, None), (5, text[:3])):
        prompt = text if prompt is None else prompt
        session = generator.start([prompt], Decoding(max_new_tokens=new), flush=3, engine=engine)
        for _ in session.steps():
            pass
        answer = list(session.answers()[0][0].ids)
        assert answer == reference(model, prompt, new)
        text = [*prompt, *answer, 5]


def test_documents_of_a_row_are_those_of_transformers(longrope: tuple[Any, Generator]) -> None:
    model, generator = longrope
    variables = {"params": tree_of(dict(model.named_parameters()), generator.decoder.spec)}
    texts = [PROMPTS[4], PROMPTS[2]]  # longer than the border, and not
    wanted = [model(torch.tensor([text])).logits[0].detach().numpy() for text in texts]
    places = np.concatenate([np.arange(len(text)) for text in texts])
    segments = np.repeat([1, 2], [len(text) for text in texts])
    found = generator.decoder.apply(variables, np.concatenate(texts)[None], places[None], segments[None])
    np.testing.assert_allclose(found[0], np.concatenate(wanted), rtol=0, atol=1e-4 * np.abs(wanted[0]).max())


def test_lengths_of_the_documents_of_a_row() -> None:
    positions = jnp.asarray([[*range(9), *range(4), 0, 0], [*range(3, 15), *range(3)]])
    expected = [[9] * 9 + [4] * 4 + [1, 1], [15] * 12 + [3] * 3]
    np.testing.assert_array_equal(document_lengths(positions), expected)


# --- config.json -----------------------------------------------------------------------------------------------------

SHARED: dict[str, Any] = dict(architectures=["Phi3ForCausalLM"], model_type="phi3") | SMALL["phi3"]["plain"]
FACTORS = dict(short_factor=[1, 1.1, 1.2], long_factor=[1.5, 3, 6])


@pytest.mark.parametrize(
    "values",
    [
        # transformers takes the first releases' words where the parameters themselves say the original length.
        {"rope_scaling": FACTORS | {"type": "su", "original_max_position_embeddings": 16}, "rope_theta": 5e5}
        | {"original_max_position_embeddings": 16},
        {"rope_scaling": FACTORS | {"type": "longrope"}, "original_max_position_embeddings": 16, "rope_theta": 5e5},
        {"rope_scaling": FACTORS | {"type": "longrope"}, "max_position_embeddings": 8192},
        {"rope_parameters": FACTORS | {"rope_type": "longrope", "original_max_position_embeddings": 2}},
        {"rope_parameters": FACTORS | {"rope_type": "longrope", "factor": 3.0, "attention_factor": 1.5}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.4}, "partial_rotary_factor": 0.7},
        {"rope_scaling": None, "partial_rotary_factor": 0.7, "rope_theta": 5e5},
        # As Phi-4-mini.
        {"rope_scaling": {"type": "longrope", "short_factor": [1, 2], "long_factor": [3, 4]}}
        | {"partial_rotary_factor": 0.7, "original_max_position_embeddings": 16},
    ],
)
def test_positions_are_those_that_transformers_reads(values: dict[str, Any]) -> None:
    """Angles of a short and of a long text, from config.json and from what is written of it."""
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    given = SHARED | values
    spec = read_config(given)
    written = json.loads(json.dumps(write_config(spec, "float32")))
    assert read_config(written) == spec
    attention = spec.attention
    for config in (given, written):
        theirs = Phi3RotaryEmbedding(Phi3Config.from_dict(json.loads(json.dumps(config))))
        for length in (3, 5000):
            positions = np.arange(length)[None]
            wanted = theirs(torch.zeros(1), torch.from_numpy(positions))
            pairs = attention.rotary_dim or attention.head_dim
            found = rope_cos_sin(attention.rotary, pairs, spec.max_position_embeddings, jnp.asarray(positions))
            for ours, other in zip(found, wanted, strict=True):
                np.testing.assert_allclose(ours, other[..., : pairs // 2], rtol=0, atol=2e-3 if length > 9 else 1e-6)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rope_scaling": {"type": "longrope", "long_factor": [1, 1, 1]}}, "needs a 'short_factor'"),
        ({"rope_scaling": FACTORS | {"type": "longrope", "short_factor": 3}}, "short_factor is 3; expected a list"),
        ({"rope_scaling": FACTORS | {"type": "longrope", "long_factor": [1, 2]}}, "long_factor has 2 numbers; 3 pairs"),
        ({"rope_scaling": FACTORS | {"type": "longrope", "long_factor": [1, 0, 2]}}, "expected positive numbers"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'; Phi-3 has"),
        ({"rope_parameters": FACTORS | {"rope_type": "default"}}, "belongs to rope_type 'longrope'"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor is 0; expected"),
        ({"partial_rotary_factor": 0.55}, "rotary_dim 3 is not an even number"),
    ],
)
def test_positions_that_no_model_has_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_config(SHARED | values)
