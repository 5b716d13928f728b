"""Greedy decoding and beam search against transformers' `generate`, token by token, in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import Decoding, MeshConfig
from jaxlm.devices.mesh import make_mesh, use_mesh
from jaxlm.inference.engine import Engine
from jaxlm.inference.generator import Generator
from jaxlm.inference.model import unstack
from jaxlm.inference.rows import FIRST_SLOTS, bucket
from jaxlm.models.decoder import Decoder
from jaxlm.models.unrolled import extend, grow, next_logits, prefill
from tests.models import hf

torch = pytest.importorskip("torch")
EOS = 2


def make_generator(model: Any, config: Any, stop_ids: tuple[int, ...] = (EOS,), **options: Any) -> Generator:
    weights = jax.tree.map(jnp.asarray, unstack({"params": hf.weights(model, config)}, config))
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    return Generator(Decoder(config, **options), weights, mesh, stop_ids)


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Any, Generator]:
    model, config = hf.build()
    return model, config, make_generator(model, config)


def prompts_of(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of 1 to `longest` tokens, with repeated stretches for the penalties to act on."""
    rng = np.random.default_rng(seed)
    prompts = []
    for _ in range(count):
        ids = rng.integers(3, 96, rng.integers(1, longest + 1)).tolist()
        prompts.append((ids + ids[: len(ids) // 2])[:longest] if rng.random() < 0.5 else ids)
    return prompts


def reference(model: Any, prompt: list[int], new: int, **options: Any) -> list[list[int]]:
    """What transformers writes for one prompt alone: `num_return_sequences` texts without stop and padding."""
    ids = torch.tensor([prompt])
    # transformers keeps the frequencies of dynamic RoPE from one call to the next, until a short one comes.
    model(ids[:, :1])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=0,
        **options,
    )
    texts = []
    for row in out[:, len(prompt) :].tolist():
        texts.append(row[: row.index(EOS)] if EOS in row else row)
    return texts


SEARCHES = [
    {},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    {"num_beams": 2, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"num_beams": 4, "no_repeat_ngram_size": 2},
    {"num_beams": 4, "repetition_penalty": 1.1, "length_penalty": 0.3, "early_stopping": True},
    {"num_beams": 2, "length_penalty": -1.0, "early_stopping": "never"},
]


@pytest.mark.parametrize("options", SEARCHES, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "greedy")
def test_same_tokens_as_transformers(llama: Any, options: dict[str, Any]) -> None:
    """50 prompts of different lengths, in batches of 10; some texts end early, so stop ids are at work."""
    model, _, generator = llama
    prompts, new = prompts_of(50, 40), 18
    found: list[list[int]] = []
    for start in range(0, len(prompts), 10):
        for answers in generator.generate(prompts[start : start + 10], Decoding(max_new_tokens=new, **options)):
            found.append(list(answers[0].ids))
    expected = [reference(model, prompt, new, **options)[0] for prompt in prompts]
    assert found == expected
    lengths = {len(ids) for ids in found}
    assert new in lengths, "some texts should run to the limit"
    assert min(lengths) < new, "some texts should end before the limit"


@pytest.mark.parametrize("options", [SEARCHES[3], SEARCHES[5]], ids=["greedy", "beams"])
def test_a_prompt_is_answered_alike_alone_and_in_a_batch(llama: Any, options: dict[str, Any]) -> None:
    _, _, generator = llama
    prompts = prompts_of(4, 30, seed=1)
    decoding = Decoding(max_new_tokens=20, **options)
    together = generator.generate(prompts, decoding)
    assert together == [generator.generate([prompt], decoding)[0] for prompt in prompts]


def test_all_beams_are_returned(llama: Any) -> None:
    model, _, generator = llama
    for prompt in prompts_of(4, 20, seed=2):
        answers = generator.generate([prompt], Decoding(max_new_tokens=12, num_beams=4, samples=3))[0]
        expected = reference(model, prompt, 12, num_beams=4, num_return_sequences=3)
        assert [list(answer.ids) for answer in answers] == expected


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("LlamaForCausalLM", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
        ("MistralForCausalLM", {"sliding_window": 7}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {"head_dim": 10}),
        (
            "LlamaForCausalLM",
            {
                "max_position_embeddings": 24,
                "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
            },
        ),
        (
            "LlamaForCausalLM",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 32,
                }
            },
        ),
    ],
    ids=["tied-mqa", "biases", "window", "qwen2", "qwen3", "dynamic-rope", "yarn"],
)
def test_relatives_of_llama_give_the_same_tokens_as_transformers(architecture: str, options: dict[str, Any]) -> None:
    """Prompts of different length side by side, past a window and past the original context."""
    model, config = hf.build(architecture, seed=3, **options)
    generator = make_generator(model, config)
    prompts = prompts_of(6, 30, seed=4)
    found = [list(a[0].ids) for a in generator.generate(prompts, Decoding(max_new_tokens=16))]
    assert found == [reference(model, prompt, 16)[0] for prompt in prompts]


def test_cached_logits_equal_the_full_forward() -> None:
    """Prefill, then token by token, then a stretch at once, for rows of different length."""
    model, config = hf.build("MistralForCausalLM", sliding_window=9)
    weights = hf.weights(model, config)
    decoder = Decoder(config)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 96, n) for n in (12, 20, 7)]
    full = [np.asarray(Decoder(config).apply({"params": weights}, row[None]))[0] for row in rows]
    first = np.array([5, 11, 1], np.int32)
    tokens = np.zeros((3, 16), np.int32)
    for row, (ids, length) in enumerate(zip(rows, first, strict=True)):
        tokens[row, :length] = ids[:length]
    unstacked = unstack({"params": weights}, config)
    logits, caches = prefill(decoder, unstacked, jnp.asarray(tokens), jnp.asarray(first), 16)

    def check(logits: Any, lengths: Any) -> None:
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(logits[row], full[row][length - 1], atol=2e-5)

    check(logits, first)
    step = jax.jit(next_logits, static_argnums=0)
    for k in range(3):
        ids = np.array([row[length + k] for row, length in zip(rows, first, strict=True)], np.int32)
        logits, caches = step(decoder, unstacked, caches, ids, first + k)
        check(logits, first + k + 1)
    caches = grow(caches, 24)
    done, added = first + 3, np.array([4, 6, 3], np.int32)
    tokens = np.zeros((3, 6), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : added[row]] = ids[done[row] : done[row] + added[row]]
    logits, caches = extend(decoder, unstacked, caches, jnp.asarray(tokens), jnp.asarray(done), jnp.asarray(added))
    check(logits, done + added)


def test_caches_grow_with_the_answer(llama: Any) -> None:
    """An answer longer than the slots a cache begins with, across several flushes."""
    model, _, generator = llama
    quiet = Generator(generator.decoder, generator.weights, generator.mesh, [])
    prompt, new = prompts_of(1, 30, seed=5)[0], FIRST_SLOTS + 40
    session = quiet.start([prompt], Decoding(max_new_tokens=new), flush=13)
    looks = [len(session.answers()[0][0].ids) for _ in session.steps()]
    assert looks[:3] == [1, 14, 27]
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert list(session.answers()[0][0].ids) == out[0, len(prompt) :].tolist()


def test_the_context_ends_an_answer(llama: Any) -> None:
    _, config, generator = llama
    quiet = Generator(generator.decoder, generator.weights, generator.mesh, [])
    prompt = list(range(3, 3 + config.max_length // 4)) * 4
    prompt = prompt[: config.max_length - 5]
    answer = quiet.generate([prompt], Decoding(max_new_tokens=50))[0][0]
    assert (len(answer.ids), answer.finish) == (5, "context")


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_a_row_at_the_end_of_its_context_does_not_hold_up_the_others(llama: Any, options: dict[str, Any]) -> None:
    _, config, generator = llama
    quiet = Generator(generator.decoder, generator.weights, generator.mesh, [])
    decoding = Decoding(max_new_tokens=40, **options)
    prompts = [(list(range(3, 90)) * 4)[: config.max_length - 4], [5, 6, 7]]
    answers = [row[0] for row in quiet.generate(prompts, decoding)]
    assert [(len(answer.ids), answer.finish) for answer in answers] == [(4, "context"), (40, "length")]
    assert answers == [quiet.generate([prompt], decoding)[0][0] for prompt in prompts]


def test_stop_ids_of_the_user_end_an_answer(llama: Any) -> None:
    _, _, generator = llama
    prompt = prompts_of(1, 10, seed=6)[0]
    free = generator.generate([prompt], Decoding(max_new_tokens=20))[0][0].ids
    stop = free[7]
    answer = generator.generate([prompt], Decoding(max_new_tokens=20, stop_ids=(stop,)))[0][0]
    assert (answer.ids, answer.finish) == (free[: free.index(stop)], "stop")


def test_a_conversation_reads_only_what_is_new(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxlm.inference import rows

    _, _, generator = llama
    first, second = prompts_of(2, 20, seed=7)
    decoding = Decoding(max_new_tokens=12)
    engine = Engine(generator, 1, keep=True)
    session = generator.start([first], decoding, engine=engine)
    list(session.steps())
    follow_up = [*first, *session.answers()[0][0].ids, *second]
    widths = []

    def extend_noting(decoder: Any, weights: Any, caches: Any, tokens: Any, starts: Any, lengths: Any) -> Any:
        widths.append(int(lengths[0]))
        return extend(decoder, weights, caches, tokens, starts, lengths)

    monkeypatch.setattr(rows, "extend", extend_noting)
    again = generator.start([follow_up], decoding, engine=engine)
    list(again.steps())
    # All but the last token of the answer is known (or the answer ended by a stop id that is not part of it).
    assert widths and widths[0] <= len(second) + 1
    assert again.answers() == generator.generate([follow_up], decoding)


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=4, fsdp=1, tensor=2)])
@pytest.mark.parametrize("options", [SEARCHES[3], SEARCHES[5]], ids=["greedy", "beams"])
def test_a_mesh_gives_the_same_tokens(llama: Any, mesh: MeshConfig, options: dict[str, Any]) -> None:
    from jaxlm.inference.model import load_weights

    model, config, generator = llama

    class Source:
        leaves: Any = {}  # noqa: RUF012

        def read(self, path: str, index: tuple[slice, ...]) -> Any:
            tree: Any = hf.weights(model, config)
            for part in path.split("/"):
                tree = tree[part]
            return tree[index]

    devices = make_mesh(mesh)
    spread = Generator(generator.decoder, load_weights(generator.decoder, devices, Source()), devices, [EOS])
    kernel = spread.weights["params"]["layers"][0]["mlp"]["up_proj"]["kernel"]
    assert not kernel.sharding.is_fully_replicated
    prompts = prompts_of(5, 30, seed=8)
    decoding = Decoding(max_new_tokens=10, **options)
    assert spread.generate(prompts, decoding) == generator.generate(prompts, decoding)
    with use_mesh(devices):
        _, caches = prefill(spread.decoder, spread.weights, jnp.ones((8, 16), jnp.int32), jnp.full(8, 3, jnp.int32), 16)
    rows, heads = 8 // (mesh.data * mesh.fsdp), config.attention.num_kv_heads // mesh.tensor
    assert caches[0][0].sharding.shard_shape(caches[0][0].shape) == (rows, heads, 16, config.attention.head_dim)


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 16), (16, 16), (17, 24), (25, 32), (33, 48), (100, 128), (129, 192)]
)
def test_a_bucket_is_the_next_of_few_sizes(length: int, expected: int) -> None:
    assert bucket(length) == expected
