"""What layers differ in is served: the same tokens as by the slots, and what cannot be served is refused by name."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import pytest

from jaxlm.config import Decoding, MeshConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.errors import UserError
from jaxlm.inference.generator import Generator
from jaxlm.inference.model import load_weights, unstack
from jaxlm.inference.paged.requests import Query, QueueFull
from jaxlm.inference.paged.thread import PagedEngine
from jaxlm.models.decoder import Decoder, abstract_variables
from jaxlm.nn.weight_types import Int8Weight
from jaxlm.spec import DecoderSpec
from tests.inference.paged.asking import Answers, ask, settle
from tests.inference.test_generation import CONFIG, TreeSource, generator, params
from tests.models.compare import random_tree
from tests.models.small import small_spec

PROMPTS = [list(range(3, 26)), [7, 8, 7], [30] * 9]


def served(spec: DecoderSpec, experts: str = "dense") -> None:
    """Answers by pages, together, are those by slots, one by one."""
    decoder = Decoder(spec, experts=experts)
    variables = {"params": random_tree(nn.unbox(abstract_variables(decoder))["params"], 3)}
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = Generator(decoder, unstack(variables, spec), mesh, [])
    options = Decoding(max_new_tokens=12)
    expected = [answers[0].ids for answers in model.generate(PROMPTS[:2], options)]
    engine = PagedEngine(model, 3, slots=4, chunk=8, pages=40, queue=3)
    answers = [Answers(engine, Query(tuple(prompt), options)) for prompt in PROMPTS]
    with pytest.raises(QueueFull, match="3"):  # it compiles still
        engine.submit(Query((3,), options), lambda piece: None)
    engine.drain()
    for answer in answers:
        answer.wait()
    settle(engine)
    with pytest.raises(QueueFull, match="end"):
        engine.submit(Query((3,), options), lambda piece: None)
    assert [tuple(answer.ids[0]) for answer in answers[:2]] == expected


TELLING = [("mistral", "window"), ("bloom", "plain"), ("qwen3_moe", "plain")]


@pytest.mark.parametrize(("family", "variant"), TELLING)
def test_families_are_served(family: str, variant: str) -> None:
    served(small_spec(family, variant))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["opt", "gemma2", "smollm3", "chatglm"])
def test_more_families_are_served(family: str) -> None:
    served(small_spec(family))


@pytest.mark.slow
def test_linear_layers_in_int8_are_served() -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    weights = load_weights(Decoder(CONFIG), mesh, TreeSource(params()), weight_type=Int8Weight)
    model = Generator(Decoder(CONFIG), weights, mesh, [])
    options = Decoding(max_new_tokens=10)
    (expected,) = model.generate([PROMPTS[0]], options)[0]
    engine = PagedEngine(model, 2, slots=8, chunk=8)
    (answers,) = ask(engine, [Query(tuple(PROMPTS[0]), options)])
    engine.drain()
    assert tuple(answers.ids[0]) == expected.ids


@pytest.mark.slow
def test_heads_are_divided_over_devices() -> None:
    """Four devices for two kv heads: each has a copy of one."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=4), jax.devices()[:4])
    weights = load_weights(Decoder(CONFIG), mesh, TreeSource(params()))
    options = Decoding(max_new_tokens=12)
    whole = generator(Decoder(CONFIG), params())
    expected = [whole.generate([prompt], options)[0][0].ids for prompt in PROMPTS]
    engine = PagedEngine(Generator(Decoder(CONFIG), weights, mesh, []), 3, slots=8, chunk=8)
    answers = ask(engine, [Query(tuple(prompt), options, logprobs=1, prompt_logprobs=1) for prompt in PROMPTS])
    settle(engine)
    engine.drain()
    assert [tuple(answer.ids[0]) for answer in answers] == expected


def test_what_cannot_be_served_is_refused_at_the_start() -> None:
    dynamic = small_spec("llama", "plain")
    (layer,) = dynamic.period
    rope = dataclasses.replace(layer.attention.rope, rope_type="dynamic", factor=2.0)
    attention = dataclasses.replace(layer.attention, rope=rope)
    dynamic = dataclasses.replace(dynamic, period=(dataclasses.replace(layer, attention=attention),))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    prefix = small_spec("chatglm_6b")
    for spec, words in ((dynamic, "dynamic"), (small_spec("t5", "plain"), "encoder"), (prefix, "ChatGLM-6B")):
        with pytest.raises(UserError, match=words):
            PagedEngine(Generator(Decoder(spec), {}, mesh, []), 2)
    with pytest.raises(UserError, match="tensor"):
        PagedEngine(Generator(Decoder(CONFIG), {}, make_mesh(MeshConfig(data=2), jax.devices()[:2]), []), 2)


@pytest.mark.slow
def test_with_longrope_the_context_ends_where_its_factors_change() -> None:
    spec = small_spec("phi3", "longrope")
    decoder = Decoder(spec)
    variables = {"params": random_tree(nn.unbox(abstract_variables(decoder))["params"], 3)}
    model = Generator(decoder, unstack(variables, spec), make_mesh(MeshConfig(), jax.devices()[:1]), [])
    (expected,) = model.generate([[3, 4, 5]], Decoding(max_new_tokens=5))[0]
    engine = PagedEngine(model, 2, slots=4, chunk=4)
    (answers,) = ask(engine, [Query((3, 4, 5), Decoding(max_new_tokens=50))])
    engine.drain()
    assert spec.switch_length == engine.max_length == 8
    assert (tuple(answers.ids[0]), answers.finish) == (expected.ids, ["context"])
