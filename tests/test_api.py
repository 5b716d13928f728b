"""The loaded model of the public interface, against transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxlm.api as api
from jaxlm.config import Decoding, MeshConfig
from jaxlm.errors import UserError
from jaxlm.inference.loaded import LoadedModel
from jaxlm.tokenizer import train_sentencepiece

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPE: dict[str, Any] = dict(
    vocab_size=290,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
)
IDS = [1, 20, 31, 5, 260, 33, 70]
DOCS = Path(__file__).parents[1] / "docs" / "python_api.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds models/geo, a LLaMA, and models/experts, a Mixtral, with their tokenizer."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "text.txt").write_text("the crust of the earth is made of rock and more rock\n" * 40)
    train_sentencepiece([folder / "text.txt"], SHAPE["vocab_size"], folder / "tokenizer")
    for name, model in (
        ("geo", transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))),
        ("experts", transformers.MixtralForCausalLM(transformers.MixtralConfig(**SHAPE, num_local_experts=4))),
    ):
        torch.manual_seed(len(name))
        with torch.no_grad():
            for key, tensor in model.named_parameters():
                tensor.normal_(1.0 if "norm" in key else 0.0, 0.2)
        model.save_pretrained(folder / "models" / name)
        for file in (folder / "tokenizer").iterdir():
            (folder / "models" / name / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return api.load(folder / "models" / "geo", dtype="float32")


def reference(folder: Path, name: str = "geo") -> Any:
    how = {"experts_implementation": "eager"} if name == "experts" else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "models" / name, **how).eval()


def logits_of(peer: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        result: np.ndarray = peer(torch.tensor([ids])).logits[0].float().numpy()
    return result


@pytest.mark.parametrize("name", ["geo", "experts"])
def test_logits_are_those_of_transformers(folder: Path, name: str) -> None:
    expected = logits_of(reference(folder, name), IDS)
    found = api.load(folder / "models" / name, dtype="float32").logits(IDS)
    assert found.shape == (len(IDS), SHAPE["vocab_size"]) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_greedy_ids_are_those_of_transformers(folder: Path, model: LoadedModel) -> None:
    prompts = [IDS, IDS[:2], [1, *range(40, 60)]]
    peer = reference(folder)
    completions = model.generate(prompts, max_new_tokens=12, batch_size=2)
    for prompt, completion in zip(prompts, completions, strict=True):
        out = peer.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        ids = out[0, len(prompt) :].tolist()
        assert list(completion.ids) == (ids[: ids.index(2)] if 2 in ids else ids)


def test_log_probs_are_those_of_transformers(folder: Path, model: LoadedModel) -> None:
    table = torch.log_softmax(torch.from_numpy(logits_of(reference(folder), IDS)), dim=-1).numpy()
    expected = [table[position - 1, IDS[position]] for position in range(3, len(IDS))]
    np.testing.assert_allclose(model.log_probs(IDS[:3], IDS[3:]), expected, atol=1e-4)


def test_log_probs_of_texts_are_those_of_their_tokens(model: LoadedModel) -> None:
    whole = [1, *model.tokenizer.encode("the crust is rock").ids]
    first = len([1, *model.tokenizer.encode("the crust").ids])
    expected = model.log_probs(whole[:first], whole[first:])
    np.testing.assert_array_equal(model.log_probs("the crust", " is rock"), expected)
    # A token across the border belongs to the continuation.
    assert len(model.log_probs("the cru", "st is rock")) >= len(expected)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_the_pooled_hidden_states_of_transformers(
    folder: Path, model: LoadedModel, pooling: Any
) -> None:
    texts = [IDS, IDS[:3], [1, *range(40, 60)]]
    peer, expected = reference(folder), []
    for ids in texts:
        with torch.no_grad():
            hidden = peer.model(torch.tensor([ids])).last_hidden_state[0]
        expected.append(hidden.mean(0).numpy() if pooling == "mean" else hidden[-1].numpy())
    found = model.embed(texts, pooling=pooling, batch_size=2)
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-4)


def test_texts_are_embedded_behind_bos(model: LoadedModel) -> None:
    ids = [1, *model.tokenizer.encode("the crust").ids]
    np.testing.assert_allclose(model.embed("the crust"), model.embed([ids]), rtol=1e-6)


def test_questions_go_through_the_template(folder: Path, model: LoadedModel) -> None:
    alpaca = api.load(folder / "models" / "geo", dtype="float32", template="alpaca_short")
    assert alpaca.prompt_ids("rock") != model.prompt_ids("rock")
    (asked,) = alpaca.generate("rock", max_new_tokens=5)
    (continued,) = alpaca.generate([alpaca.prompt_ids("rock")], max_new_tokens=5)
    assert asked.ids == continued.ids and asked.text == asked.text.strip()


def test_samples_of_a_prompt_stand_side_by_side(model: LoadedModel) -> None:
    options = Decoding(max_new_tokens=6, temperature=1.0, seed=3)
    first, second, *rest = model.generate(["rock", "earth"], options, samples=2)
    assert len(rest) == 2 and first.ids != second.ids
    assert [first, rest[0]] == model.generate(["rock", "earth"], options)


def test_int8_weights_give_nearly_the_same_logits(folder: Path, model: LoadedModel) -> None:
    exact = model.logits(IDS)
    rounded = api.load(folder / "models" / "geo", dtype="float32", int8=True).logits(IDS)
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.1


def test_an_adapter_counts_merged_and_on_the_fly(folder: Path, tmp_path: Path, model: LoadedModel) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(reference(folder), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if "lora_B" in name:
                tensor.normal_(0, 0.2)
    adapted.save_pretrained(tmp_path)
    expected = logits_of(adapted, IDS)
    for merge in (False, True):
        found = api.load(folder / "models" / "geo", tmp_path, dtype="float32", merge_adapter=merge).logits(IDS)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected - model.logits(IDS)).max() > 1e-2


@pytest.mark.parametrize("name", ["geo", pytest.param("experts", marks=pytest.mark.slow)])
def test_several_devices_give_the_same(folder: Path, name: str) -> None:
    assert jax.device_count() >= 4, "tests run on fake devices"
    alone = api.load(folder / "models" / name, dtype="float32", mesh=MeshConfig(data=-1, fsdp=1))
    spread = api.load(folder / "models" / name, dtype="float32", mesh=MeshConfig(data=-1, fsdp=1, tensor=2))
    np.testing.assert_allclose(spread.logits(IDS), alone.logits(IDS), atol=1e-4)
    np.testing.assert_allclose(spread.embed([IDS, IDS[:3]]), alone.embed([IDS, IDS[:3]]), atol=1e-5)
    assert spread.generate([IDS], max_new_tokens=8) == alone.generate([IDS], max_new_tokens=8)


def test_the_spec_is_the_models(model: LoadedModel) -> None:
    assert (model.spec.vocab_size, model.spec.hidden_size) == (SHAPE["vocab_size"], SHAPE["hidden_size"])
    assert model.max_length == SHAPE["max_position_embeddings"]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m: m.generate("rock", max_tokens=3), "'max_tokens' is not a setting; known: max_new_tokens"),
        (lambda m: m.generate("rock", temperature=-1.0), "temperature: -1.0"),
        (lambda m: m.generate("rock", stop_ids=(290,)), "stop_ids: 290"),
        (lambda m: m.generate(["rock", " "]), "prompt 1 is empty"),
        (lambda m: m.generate(IDS), r"put the ids of a single text into a list, \[ids\]"),
        (lambda m: m.generate([IDS], batch_size=0), "batch_size: 0"),
        (lambda m: m.generate([IDS], batch_size=1.5), "batch_size: 1.5 must be a whole number"),
        (lambda m: m.generate("rock", temperature="hot"), "temperature: expected a number, found 'hot'"),
        (
            lambda m: m.generate("rock", temperature=np.inf),
            r"temperature: inf must be 0 .* or between 1e-06 and 1e\+06",
        ),
        (lambda m: m.generate("rock", max_new_tokens=2.5), "max_new_tokens: expected a whole number, found 2.5"),
        (lambda m: m.generate("rock", stop="o"), "stop: expected a list, found 'o'"),
        (lambda m: m.generate("rock", stop=["o", ""]), r"stop: \['o', ''\] must be texts that are not empty"),
        (lambda m: m.generate("rock", num_beams=2, early_stopping="x"), "early_stopping: expected true or false"),
        (lambda m: m.generate("rock", temperature=1.0, top_k=2**40), "top_k: 1099511627776 must be between 0"),
        (lambda m: m.generate("rock", {"seed": 1}), "options: expected a jaxlm.config.Decoding"),
        (lambda m: m.generate([[-5, 3]]), "prompt 0 holds token id -5, the model has 0 to 289"),
        (lambda m: m.generate(None), "expected texts, or lists of token ids, found NoneType"),
        (lambda m: m.generate(np.array(IDS)), "put the ids of a single text into a list"),
        (lambda m: m.prompt_ids(None), "question: expected text, found None"),
        (lambda m: m.log_probs("\ud800", "b"), "half of a Unicode character"),
        (lambda m: m.embed(["\ud800"]), "half of a Unicode character"),
        (lambda m: m.generate([[1] * 128]), "the model's context is 128"),
        (lambda m: m.logits([]), "the text has no tokens"),
        (lambda m: m.logits([1] * 129), "129 tokens, the model's context is 128"),
        (lambda m: m.logits([1, 290]), "token ids 1 to 290, the model has 0 to 289"),
        (lambda m: m.logits([0.5]), "token ids must be a list of integers, found list of float64"),
        (lambda m: m.log_probs("rock", [5]), "both be texts or both be token ids"),
        (lambda m: m.log_probs(IDS, []), "the continuation has no tokens"),
        (lambda m: m.log_probs([], IDS), "the prompt has no tokens"),
        (lambda m: m.embed("rock", pooling="max"), "pooling 'max' must be mean or last"),
    ],
)
def test_what_a_loaded_model_refuses(model: LoadedModel, use: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        use(model)


def test_what_cannot_be_loaded(folder: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        api.load(folder / "nowhere")
    with pytest.raises(UserError, match="there is no adapter to merge"):
        api.load(folder / "models" / "geo", merge_adapter=True)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("path", None),
        ("path", ""),
        ("dtype", "fp16"),
        ("attention", "fast"),
        ("int8", "perhaps"),
        ("mesh", 3),
        ("template", None),
        ("system", 3),
    ],
)
def test_load_names_an_argument_of_a_wrong_type(folder: Path, argument: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"{argument}: "):
        api.load(**{"path": folder / "models" / "geo", argument: value})


def test_numpy_arrays_and_numbers_are_taken_like_pythons(model: LoadedModel) -> None:
    expected = model.generate([IDS, IDS[::-1]], max_new_tokens=4, temperature=0.5, seed=1)
    settings: dict[str, Any] = {"max_new_tokens": np.int64(4), "temperature": np.float32(0.5), "seed": np.uint32(1)}
    assert model.generate(np.array([IDS, IDS[::-1]]), **settings) == expected


def test_the_documents_example_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert first is not None
    monkeypatch.chdir(folder)
    monkeypatch.setattr("jaxlm.load", api.load, raising=False)
    exec(compile(first.group(1), str(DOCS), "exec"), {})


def test_the_full_context_can_be_scored(model: LoadedModel) -> None:
    ids = [1] * SHAPE["max_position_embeddings"]
    assert model.logits(ids).shape[0] == len(ids)
    assert json.dumps(model.log_probs(ids[:1], ids[1:]).tolist())


def test_the_best_of_several_answers_is_that_with_the_highest_end_logit(model: LoadedModel) -> None:
    """With itself as the judge: the reward of a text is the logit of the end token (2) behind it."""
    prompts = [IDS, IDS[:2]]
    settings: dict[str, Any] = {"max_new_tokens": 6, "seed": 3}
    found = model.best_of(prompts, 4, model, **settings)
    drawn = model.generate(prompts, samples=4, temperature=1.0, **settings)
    for number, (best, reward) in enumerate(found):
        rewards = []
        for each in drawn[4 * number : 4 * number + 4]:
            ids = [*prompts[number], *each.ids, *([2] if each.finish == "stop" else [])]
            rewards.append(float(model.logits(ids)[-1, 2]))
        assert len({round(value, 4) for value in rewards}) > 1
        assert reward == pytest.approx(max(rewards), abs=1e-4)
        assert best == drawn[4 * number + int(np.argmax(rewards))]
