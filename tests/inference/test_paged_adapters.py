"""Several adapters on one base: each text with its own, against PEFT; and their places, filled and freed by name."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from convert.source import open_adapter, open_model
from jaxlm.config import Decoding
from jaxlm.errors import UserError
from jaxlm.inference.model import load_weights
from jaxlm.inference.paged.adapters import Adapters, Followed, Places, named_paths
from jaxlm.inference.paged.requests import Query
from jaxlm.inference.paged.thread import PagedEngine
from jaxlm.inference.rows import DeviceModel
from jaxlm.models.decoder import Decoder
from jaxlm.models.unrolled import next_logits, prefill
from jaxlm.nn.linear import with_chosen
from tests.convert.tiny import make_adapter, make_hf_model
from tests.inference.paged.asking import ask
from tests.inference.test_generation import one_device

KINDS: dict[str, dict[str, Any]] = {
    "lora": dict(r=3, target_modules=["q_proj", "v_proj", "down_proj"]),
    "rslora": dict(r=2, lora_alpha=5, use_rslora=True, target_modules=["o_proj"], layers_to_transform=[0, 2]),
    "dora": dict(use_dora=True, target_modules=["k_proj", "up_proj"], rank_pattern={"layers.1.self_attn.k_proj": 4}),
}
TOKENS = np.random.default_rng(3).integers(0, 37, (4, 9)).astype(np.int32)


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return np.asarray(model(torch.tensor(tokens[None]).long()).logits[0, -1].numpy())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def peft_models(folder: Path) -> list[Any]:
    """The base, and the base with each adapter, in PyTorch; the adapters are in `folder`/served."""
    base = make_hf_model()
    base.save_pretrained(folder / "base")
    kinds = enumerate(KINDS.items())
    return [base, *(make_adapter(make_hf_model(), folder / "served" / name, n, **how) for n, (name, how) in kinds)]


@pytest.fixture
def model(folder: Path, peft_models: list[Any]) -> DeviceModel:
    source, mesh = open_model(folder / "base"), one_device()
    decoder = Decoder(source.config)
    return DeviceModel(decoder, load_weights(decoder, mesh, source), mesh, [])


def opened(model: DeviceModel, folder: Path) -> dict[str, Any]:
    return {name: open_adapter(folder / "served" / name, model.decoder.spec) for name in KINDS}


def logits(model: DeviceModel, chosen: list[int], tokens: np.ndarray = TOKENS, steps: int = 1) -> np.ndarray:
    """Logits [R, V] behind texts: read as prompts, but for `steps` - 1 tokens, which are appended one by one."""
    rows, read = np.array(chosen, np.int32), tokens.shape[1] - steps + 1

    def told(width: int) -> Any:
        places = np.repeat(rows[:, None], width, axis=1)
        return {**model.weights, "lora": with_chosen(model.weights["lora"], places)}

    lengths = np.full(len(rows), read, np.int32)
    result, caches = prefill(model.decoder, told(read), tokens[:, :read], lengths, 16)
    step = jax.jit(partial(next_logits, model.decoder))
    for place in range(read, tokens.shape[1]):
        result, caches = step(told(1), caches, tokens[:, place], np.full(len(rows), place, np.int32))
    return np.asarray(result)


def test_each_text_is_read_with_its_own_adapter(model: DeviceModel, folder: Path, peft_models: list[Any]) -> None:
    sources = opened(model, folder)
    plain = logits_without_places(model)
    adapters = Adapters(model, Places.holding(model.decoder, sources, count=4))
    assert adapters.places == Places(4, 4, ("down_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"), True)
    for name, source in sources.items():
        adapters.load(name, source)
    chosen = [adapters.acquire(name)[0] for name in (None, *KINDS)]
    mixed = logits(model, chosen)
    expected = [torch_logits(peft, tokens) for peft, tokens in zip(peft_models, TOKENS, strict=True)]
    np.testing.assert_allclose(mixed, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(mixed[0], plain, err_msg="the base is exactly the base")
    np.testing.assert_array_equal(logits_without_places(model.base), plain, err_msg="what has no adapter for a token")
    # One by one, and with the other texts' adapters changed: what a row is given does not depend on them.
    np.testing.assert_allclose(logits(model, chosen, steps=3), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(logits(model, [0, *chosen[1:2] * 2, chosen[3]])[[0, 1, 3]], mixed[[0, 1, 3]])
    # Another adapter in the place of one that is gone changes nothing for those that stay.
    adapters.drop("rslora")
    adapters.load("again", sources["lora"])
    again = logits(model, [*chosen[:2], adapters.acquire("again")[0], chosen[3]])
    np.testing.assert_array_equal(again[[0, 1, 3]], mixed[[0, 1, 3]])


def logits_without_places(model: DeviceModel) -> np.ndarray:
    lengths = np.full(len(TOKENS), TOKENS.shape[1], np.int32)
    return np.asarray(prefill(model.decoder, model.weights, TOKENS, lengths, 16)[0])[0]


def test_an_adapter_of_layers_stored_as_one(folder: Path) -> None:
    how = dict(r=2, target_modules=["qkv_proj", "gate_up_proj"])
    sizes = dict(pad_token_id=None, bos_token_id=1, eos_token_id=2)
    make_hf_model("Phi3", **sizes).save_pretrained(folder / "phi3")
    peft = make_adapter(make_hf_model("Phi3", **sizes), folder / "phi3-adapter", **how)
    source, mesh = open_model(folder / "phi3"), one_device()
    decoder = Decoder(source.config)
    own = DeviceModel(decoder, load_weights(decoder, mesh, source), mesh, [])
    adapter = open_adapter(folder / "phi3-adapter", source)
    adapters = Adapters(own, Places.holding(decoder, {"fused": adapter}, 2))
    adapters.load("fused", adapter)
    expected = torch_logits(peft, TOKENS[1])
    mixed = logits(own, [0, 1], TOKENS[:2])
    np.testing.assert_allclose(mixed[1], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_places_are_kept_for_answers_under_way(model: DeviceModel, folder: Path) -> None:
    sources = opened(model, folder)
    adapters = Adapters(model, Places.holding(model.decoder, {"a": sources["lora"]}, 2))
    adapters.load("a", sources["lora"])
    adapters.load("b", sources["lora"])
    assert (adapters.acquire(None), adapters.acquire("a"), adapters.acquire("b")) == ((0, 0), (1, 1), (2, 2))
    with pytest.raises(UserError, match=r"all 2 places are taken \(by a, b\); drop one, or start with more"):
        adapters.load("c", sources["lora"])
    with pytest.raises(UserError, match="there is one of that name"):
        adapters.load("b", sources["lora"])
    adapters.drop("a")
    with pytest.raises(UserError, match="'a' is not loaded; there are: b"):
        adapters.acquire("a")
    with pytest.raises(UserError, match="all 2 places are taken"):
        adapters.load("c", sources["lora"])
    adapters.release(1)
    adapters.load("c", sources["lora"])
    assert adapters.acquire("c") == (1, 3), "another number: its keys and values are not those of `a`"
    adapters.release(0)
    assert adapters.names == ("b", "c")


def test_an_adapter_that_does_not_fit_is_refused(model: DeviceModel, folder: Path) -> None:
    sources = opened(model, folder)
    adapters = Adapters(model, Places.holding(model.decoder, {"lora": sources["lora"]}))
    with pytest.raises(UserError, match="rslora: it adapts o_proj, there is room in down_proj, q_proj, v_proj"):
        adapters.load("rslora", sources["rslora"])
    make_adapter(make_hf_model(), folder / "high", r=9)
    with pytest.raises(UserError, match="high: rank 9, there is room for 3"):
        adapters.load("high", open_adapter(folder / "high", model.decoder.spec))
    make_adapter(make_hf_model(), folder / "weighed", use_dora=True)
    with pytest.raises(UserError, match="weighed: is DoRA, for which there is no room"):
        adapters.load("weighed", open_adapter(folder / "weighed", model.decoder.spec))
    make_adapter(make_hf_model(), folder / "whole", modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=r"whole: it has whole modules of its own \(lm_head\)"):
        adapters.load("whole", open_adapter(folder / "whole", model.decoder.spec))
    adapters.load("lora", sources["lora"])
    assert adapters.names == ("lora",)


def test_adapters_follow_a_directory(model: DeviceModel, folder: Path, tmp_path: Path) -> None:
    def unchecked(path: Path) -> Any:
        return open_adapter(path, model.decoder.spec)

    shutil.copytree(folder / "served" / "lora", tmp_path / "first")
    adapters = Adapters(model, Places.holding(model.decoder, {"first": unchecked(tmp_path / "first")}, 2))
    followed = Followed(adapters, unchecked, [f"listed={folder / 'served' / 'lora'}"], tmp_path)
    assert followed.update() == {} and adapters.names == ("listed", "first")
    held = adapters.acquire("first")
    (tmp_path / "half").mkdir()
    assert list(followed.update()) == ["half"], "told"
    assert followed.update() == {}, "and told once"
    shutil.copytree(folder / "served" / "lora", tmp_path / "half", dirs_exist_ok=True)
    assert "all 2 places are taken" in str(followed.update()["half"])
    shutil.rmtree(tmp_path / "first")
    followed.update()
    assert adapters.names == ("listed",), "the place is still in use"
    adapters.release(held[1])
    assert followed.update() == {} and adapters.names == ("listed", "half")
    numbers = [adapters.acquire(name)[1] for name in adapters.names]
    os.utime(tmp_path / "half" / "adapter_config.json", ns=(2, 2**62))
    for number in numbers:
        adapters.release(number)
    followed.update()
    assert [adapters.acquire(name)[1] != number for name, number in zip(adapters.names, numbers, strict=True)] == [
        False,
        True,
    ], "what changed is read again"


def test_names_of_adapters_are_checked(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    assert named_paths(["a=b=c"], tmp_path) == {"a": Path("b=c"), "x": tmp_path / "x"}
    for words, directory, message in (
        (["a"], None, "expected NAME=PATH, found 'a'"),
        (["a=b", "a=c"], None, "a is given twice"),
        (["x=b"], tmp_path, "x is given twice, once in"),
        (["a:b=c"], None, "'a:b' cannot be a name"),
        ([], tmp_path / "none", "is not a directory"),
    ):
        with pytest.raises(UserError, match=message):
            named_paths(words, directory)


@pytest.mark.slow
def test_each_query_is_answered_with_its_adapter(model: DeviceModel, folder: Path, peft_models: list[Any]) -> None:
    """One prompt for all: what it is with one adapter is not taken for what it is with another."""
    sources = opened(model, folder)
    adapters = Adapters(model, Places.holding(model.decoder, sources, count=4))
    for name, source in sources.items():
        adapters.load(name, source)
    engine = PagedEngine(model, 4, slots=4, chunk=8, adapters=adapters)
    prompt, names = TOKENS[1], [None, *KINDS]
    options = Decoding(max_new_tokens=3)
    for _ in range(2):  # the second time its beginning is in pages
        queries = [Query(tuple(prompt.tolist()), options, adapter=name, logprobs=0) for name in names]
        for answers, peft in zip(ask(engine, queries), peft_models, strict=True):
            expected = np.array(jax.nn.log_softmax(torch_logits(peft, prompt)))
            assert answers.ids[0][0] == expected.argmax()
            np.testing.assert_allclose(answers.logprobs[0][0].logprob, expected.max(), rtol=1e-5)
    adapters.drop("lora")
    with pytest.raises(UserError, match="'lora' is not loaded"):
        engine.submit(queries[1], lambda piece: None)
    adapters.load("again", sources["lora"])  # nobody holds the place
    engine.drain()
