"""Log-likelihoods against PyTorch's modules, and shared contexts against their plain twin."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from jaxlm.config import Decoding, LoraConfig, MeshConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.errors import UserError
from jaxlm.evaluation import likelihood
from jaxlm.evaluation.likelihood import Choices, Scores, check, plain_scores, scores
from jaxlm.inference.generator import Generator
from jaxlm.inference.model import load_weights
from jaxlm.models.adapters import resolve_lora
from jaxlm.models.decoder import Decoder, abstract_variables
from jaxlm.nn.weight_types import Int8Weight
from tests.inference.test_generation import TreeSource
from tests.models.small import hf_model, small_spec, tree_of


def pair(family: str, axes: MeshConfig | None = None, **more: Any) -> tuple[Any, Generator]:
    """transformers' module of a small model, and the same weights here."""
    module = hf_model(family, **more)
    spec = small_spec(family, **more)
    mesh = make_mesh(axes or MeshConfig(), jax.devices()[: 1 if axes is None else 8])
    weights = load_weights(Decoder(spec), mesh, TreeSource(tree_of(dict(module.named_parameters()), spec)))
    return module, Generator(Decoder(spec), weights, mesh, [2])


def questions(vocab_size: int, count: int = 5, shared: int = 0, longest: int = 20) -> list[Choices]:
    """Contexts that begin alike, with two to five continuations of one to six tokens."""
    rng = np.random.default_rng(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(int(index) for index in rng.integers(3, vocab_size, length))

    beginning = ids(shared)
    return [
        Choices(
            (*beginning, *ids(int(rng.integers(1, longest)))),
            tuple(ids(int(rng.integers(1, 7))) for _ in range(int(rng.integers(2, 6)))),
        )
        for _ in range(count)
    ]


def by_torch(module: Any, question: Choices) -> Scores:
    torch = pytest.importorskip("torch")
    values, greedy = [], []
    for ids in question.continuations:
        if module.config.is_encoder_decoder:
            start = module.config.decoder_start_token_id
            written = torch.tensor([[start, *ids[:-1]]])
            with torch.no_grad():
                logits = module(input_ids=torch.tensor([question.context]), decoder_input_ids=written).logits[0]
        else:
            with torch.no_grad():
                logits = module(torch.tensor([[*question.context, *ids[:-1]]])).logits[0, -len(ids) :]
        logs = torch.log_softmax(logits.float(), dim=-1)
        values.append(float(logs[range(len(ids)), list(ids)].sum()))
        greedy.append(logits.argmax(-1).tolist() == list(ids))
    return Scores(tuple(values), tuple(greedy))


def agree(ours: list[Scores], theirs: list[Scores], tolerance: float = 1e-4) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.log_probs, other.log_probs, atol=tolerance, rtol=0)
        assert mine.is_greedy == other.is_greedy


@pytest.mark.parametrize(
    "family", ["llama", "t5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "bloom", "opt"))]
)
def test_log_likelihoods_are_those_of_transformers(family: str) -> None:
    """Also in the plain way; rotary, learned, relative positions and ALiBi, windows, soft caps, an encoder."""
    module, model = pair(family)
    batch = questions(model.decoder.spec.vocab_size)
    theirs = [by_torch(module, each) for each in batch]
    assert likelihood.is_shared(model.decoder.spec, batch)
    agree(scores(model, batch, 8), theirs)
    agree(plain_scores(model, batch, 8), theirs)


def test_what_the_model_would_write_is_greedy_up_to_its_last_token() -> None:
    _, model = pair("llama")
    context = (5, 9, 30)
    ((answer,),) = model.generate([context], Decoding(max_new_tokens=3, stop_ids=()))
    written, last = answer.ids, answer.ids[-1]
    others = (*written[:-1], last - 1 if last > 3 else last + 1), (written[0] ^ 1, *written[1:])
    (found,) = scores(model, [Choices(context, (written, *others, written[:1]))], 4)
    assert found.is_greedy == (True, False, False, True)


@pytest.mark.parametrize("more", [{}, {"data": 4, "tensor": 2, "fsdp": 1}])
def test_a_common_beginning_is_read_once(more: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """And scores are what they are without it, also with rows over several devices."""
    _, model = pair("llama", MeshConfig(**more) if more else None, max_position_embeddings=128)
    batch = questions(model.decoder.spec.vocab_size, 7, shared=40)
    rows: list[tuple[int, int]] = []
    original = likelihood.prefill
    monkeypatch.setattr(likelihood, "prefill", lambda *args: rows.append(args[2].shape) or original(*args))
    shared = scores(model, batch, 8)
    assert rows == [(4 if more else 1, 40)]
    agree(shared, plain_scores(model, batch, 8), 1e-5)


def test_scores_do_not_depend_on_what_is_asked_beside_them() -> None:
    """And the same batch has the same scores to the last bit: a run that is killed and begun again ends the same."""
    _, model = pair("llama")
    batch = questions(model.decoder.spec.vocab_size, 4)
    assert scores(model, batch, 4) == scores(model, batch, 4)
    agree([scores(model, [each], 4)[0] for each in batch], scores(model, batch, 4), 1e-5)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("chatglm_6b", {}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    ],
)
def test_models_whose_earlier_tokens_depend_on_later_ones_read_contexts_anew(family: str, more: dict[str, Any]) -> None:
    module, model = pair(family, **more)
    spec = model.decoder.spec
    batch = questions(30, 2)
    if spec.prefix is not None:
        ends = spec.prefix.mask_ids[0], spec.prefix.start_id
        batch = [Choices((*each.context, *ends), each.continuations) for each in batch]
    assert not likelihood.is_shared(spec, batch)
    agree(scores(model, batch, 4), [by_torch(module, each) for each in batch])


def test_int8_scores_are_those_of_the_rounded_weights() -> None:
    module = hf_model("llama")
    spec, mesh = small_spec("llama"), make_mesh(MeshConfig(), jax.devices()[:1])
    tree = TreeSource(tree_of(dict(module.named_parameters()), spec))
    weights = load_weights(Decoder(spec), mesh, tree, weight_type=Int8Weight)
    model = Generator(Decoder(spec), weights, mesh, [2])
    batch = questions(spec.vocab_size, 3)
    agree(scores(model, batch, 4), plain_scores(model, batch, 4), 1e-5)


def test_an_adapter_is_applied_wherever_contexts_are_read() -> None:
    """Shared or not, and it changes the scores."""
    spec, rng = small_spec("llama"), np.random.default_rng(1)
    specs = resolve_lora(spec, LoraConfig(rank=2, targets=("q_proj", "down_proj")))
    tree = tree_of(dict(hf_model("llama").named_parameters()), spec)
    shapes = nn.unbox(abstract_variables(Decoder(spec, specs)))["lora"]
    factors = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    mesh, batch = make_mesh(MeshConfig(), jax.devices()[:1]), questions(spec.vocab_size, 3, shared=40)
    plain, adapted = (
        Generator(decoder, load_weights(decoder, mesh, TreeSource(tree), source), mesh, [2])
        for decoder, source in ((Decoder(spec), None), (Decoder(spec, specs), TreeSource(factors)))
    )
    mine = scores(adapted, batch, 4)
    agree(mine, plain_scores(adapted, batch, 4), 1e-4)
    assert mine[0].log_probs[0] != pytest.approx(scores(plain, batch, 4)[0].log_probs[0], abs=1e-2)


def test_numbers_that_are_not_finite_are_refused() -> None:
    _, model = pair("llama")
    model.weights["params"]["layers"][0]["self_attn"]["o_proj"]["kernel"] *= np.nan
    with pytest.raises(UserError, match=r"not finite.*convert inspect"):
        scores(model, questions(model.decoder.spec.vocab_size, 2), 2)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (Choices((), ((5,),)), "context is empty"),
        (Choices((5,), ((),)), "continuation is empty"),
        (Choices((5,) * 60, ((6,) * 6,)), "65 tokens, the model reads at most 64; shorten"),
        (Choices((5,), ((6, 9999),)), "token id 9999"),
    ],
)
def test_what_cannot_be_read_is_refused(choices: Choices, message: str) -> None:
    _, model = pair("llama", max_position_embeddings=64)
    check(model, Choices((5,) * 60, ((6,) * 5,)))
    with pytest.raises(UserError, match=message):
        check(model, choices)
