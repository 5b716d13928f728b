"""extend-vocab: rows, ids and tokenizer files, read back by jaxlm and by transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.source import open_model
from convert.transforms.vocab import GrownSource, read_tokens
from jaxlm.tokenizer import load_tokenizer, train_sentencepiece
from tests.convert.test_source import MODEL
from tests.convert.tiny import make_hf_model

transformers = pytest.importorskip("transformers")

TEXT = "the cat sat on the mat with the other cats\nSiO2 and CO2 are oxides of silicon and carbon\n" * 20
TOKENS = ["<|smiles|>", "SiO2", "the cat"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(TEXT)
    train_sentencepiece([folder / "text.txt"], 300, folder / "t")
    return folder / "t"


def save_model(trained: Path, directory: Path, kind: str = "both", spare: int = 0, **changes: Any) -> Path:
    size = load_tokenizer(trained).vocab_size + spare
    model = make_hf_model(vocab_size=size, **changes)
    model.save_pretrained(directory)
    names = {"both": ["tokenizer.model", "tokenizer.json"], "model": ["tokenizer.model"], "json": ["tokenizer.json"]}
    for name in [*names[kind], "tokenizer_config.json"]:
        shutil.copy(trained / name, directory)
    return directory


def state(directory: Path) -> dict[str, np.ndarray]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    return {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", ["both", "model", "json"])
def test_tokenizers(kind: str, special: bool, trained: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    model = save_model(trained, tmp_path / "hf", kind)
    (tmp_path / "new.txt").write_text("\n".join(TOKENS) + "\n\n")
    arguments = ["--tokens", tmp_path / "new.txt", *(["--special"] if special else [])]
    first = load_tokenizer(model).vocab_size
    assert f"ids {first} to {first + 2}" in run("extend-vocab", model, tmp_path / "out", *arguments)
    assert {p.name for p in (tmp_path / "out").glob("*token*")} >= {p.name for p in model.glob("*token*")}

    ours = load_tokenizer(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ours.vocab_size == len(theirs) == first + 3
    text = "on<|smiles|>SiO2 mat"
    for number, token in enumerate(TOKENS):
        assert ours.id_of(token) == theirs.convert_tokens_to_ids(token) == first + number
    for ids in (ours.encode(text).ids, theirs.encode(text, add_special_tokens=False)):
        assert {first, first + 1} <= set(ids)
    assert ours.decode(ours.encode(text).ids, skip_special=False).count("<|smiles|>") == 1
    assert ("SiO2" in ours.decode(ours.encode(text).ids)) is not special
    assert ("SiO2" in theirs.decode(theirs.encode(text), skip_special_tokens=True)) is not special
    # What the old tokenizer did stays as it was.
    old = load_tokenizer(model)
    assert ours.encode("the other mat").ids == old.encode("the other mat").ids
    if (model / "tokenizer.model").exists():
        assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (model / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("init", ["mean", "zero", "pieces"])
def test_rows(init: str, tied: bool, trained: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    model = save_model(trained, tmp_path / "hf", tie_word_embeddings=tied)
    tokenizer = load_tokenizer(model)
    size = tokenizer.vocab_size
    arguments = ["--tokens", "SiO2x,catsat", "--init", init, "--pad-to", "64"]
    run("extend-vocab", model, tmp_path / "out", *arguments)
    old, new = state(model), state(tmp_path / "out")
    total = -(-(size + 2) // 64) * 64
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == total
    for name, array in old.items():
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert np.array_equal(array, new[name]), name
            continue
        mean = array.astype(np.float64).mean(axis=0)
        assert new[name].shape == (total, 16) and np.array_equal(new[name][:size], array)
        for row, token in ((size, "SiO2x"), (size + 1, "catsat")):
            pieces = [i for i in tokenizer.encode(token).ids if tokenizer.token(i) != "▁"]
            assert len(pieces) > 1
            want = {"mean": mean, "zero": 0 * mean, "pieces": array[pieces].astype(np.float64).mean(axis=0)}[init]
            np.testing.assert_allclose(new[name][row], want, atol=1e-6)
        np.testing.assert_allclose(
            new[name][size + 2 :], np.tile(mean * (init != "zero"), (total - size - 2, 1)), atol=1e-6
        )


@pytest.mark.parametrize("spare", [1, 2, 5])
def test_spare_rows_come_first(spare: int, trained: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    """A model whose embedding was padded: its rows behind the tokenizer's last token are taken, then more are added."""
    model = save_model(trained, tmp_path / "hf", spare=spare)
    size = load_tokenizer(model).vocab_size
    run("extend-vocab", model, tmp_path / "out", "--tokens", "one1,two2", "--init", "zero")
    old, new = (state(path)["lm_head.weight"] for path in (model, tmp_path / "out"))
    assert len(new) == max(size + 2, size + spare)
    assert np.array_equal(new[:size], old[:size]) and not new[size : size + 2].any()
    assert np.array_equal(new[size + 2 :], old[size + 2 :])
    # They are no tokens, so they are no part of the mean.
    run("extend-vocab", model, tmp_path / "mean", "--tokens", "one1,two2")
    np.testing.assert_allclose(state(tmp_path / "mean")["lm_head.weight"][size], old[:size].mean(axis=0), atol=1e-6)


def test_jaxlm_models_and_dtypes(trained: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    model = save_model(trained, tmp_path / "hf", dtype="bfloat16")
    run("hf-to-jax", model, tmp_path / "jax")
    run("extend-vocab", tmp_path / "jax", tmp_path / "a", "--tokens", "one1,two2")
    run("extend-vocab", model, tmp_path / "b", "--tokens", "one1,two2", "--format", "jax")
    run("extend-vocab", model, tmp_path / "c", "--tokens", "one1,two2")
    a, b, c = (open_model(tmp_path / name) for name in "abc")
    assert a.config == b.config == c.config
    for path, leaf in a.leaves.items():
        assert leaf.dtype.name == "bfloat16"
        assert a.read(path, ()).tobytes() == b.read(path, ()).tobytes() == c.read(path, ()).tobytes()
    assert load_tokenizer(a.tokenizer_dir).id_of("two2") == a.config.vocab_size - 1
    # Once more, from a model that was extended.
    assert ": 'three3'; " in run("extend-vocab", tmp_path / "a", tmp_path / "again", "--tokens", "three3")
    again = load_tokenizer(tmp_path / "again" / "jaxlm" / "tokenizer")
    assert [again.id_of(t) for t in ("one1", "two2", "three3")] == [again.vocab_size - n for n in (3, 2, 1)]


def test_mistakes(trained: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    model = save_model(trained, tmp_path / "hf")
    bad = tmp_path / "latin1.txt"
    bad.write_bytes("é".encode("latin1"))
    for tokens, words in (
        ("</s>,x9", ["'</s>' already", "id 2"]),
        ("a b,a b", ["'a b' is there twice"]),
        (",", ["names no token"]),
        (bad, ["UTF-8"]),
        ("tokens.txt", ["tokens.txt: no such file", "a list of tokens needs a comma"]),
        ("more.json", ["no such file"]),
        ("a/b", ["no such file"]),
        (tmp_path, ["no such file"]),
    ):
        message = refused("extend-vocab", model, tmp_path / "out", "--tokens", tokens)
        assert all(word in message for word in words), message
    assert "--pad-to 0" in refused("extend-vocab", model, tmp_path / "out", "--tokens", "x9", "--pad-to", "0")
    small = save_model(trained, tmp_path / "small", spare=-1)
    assert "only" in refused("extend-vocab", small, tmp_path / "out", "--tokens", "x9")
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (model / name).unlink()
    assert "has no tokenizer" in refused("extend-vocab", model, tmp_path / "out", "--tokens", "x9")


@pytest.mark.parametrize("init", ["mean", "pieces"])
@pytest.mark.parametrize("leaf", ["model.embed_tokens.weight", "lm_head.weight"])
def test_numbers_that_are_none_do_not_spread(
    init: str, leaf: str, trained: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """One NaN in the mean would make all new rows NaN."""
    from safetensors.numpy import load_file, save_file

    model = save_model(trained, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors[leaf] = tensors[leaf].copy()
    tensors[leaf][1, 2] = np.nan
    save_file(tensors, model / "model.safetensors")
    message = refused("extend-vocab", model, tmp_path / "o", "--tokens", "zirconium,", "--init", init)
    assert "holds infinities or NaNs" in message and leaf.split(".")[-2] in message


def test_read_tokens(tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    file.write_bytes("a\u2028b\r\n\r\n c \nd\x0ce\r\n".encode())
    assert read_tokens(str(file)) == ["a\u2028b", " c ", "d\x0ce"]
    assert read_tokens("</s>,") == ["</s>"] and read_tokens("one") == ["one"]
    many = [f"token{number}" for number in range(2000)]
    assert read_tokens(",".join(many)) == many  # longer than a file name may be


@pytest.mark.parametrize("first", [30, 35, 37])
def test_slices_of_a_grown_model(first: int) -> None:
    """Any slice is that of the whole."""
    random = np.random.default_rng(0)
    rows = {
        path: random.standard_normal((5, 16)).astype(np.float32)
        for path in ("embed_tokens/embedding", "lm_head/kernel")
    }
    grown = GrownSource(MODEL, first, rows)
    path = "lm_head/kernel"
    old = MODEL.read(path, ())
    want = np.concatenate([old[:first], rows[path].astype(old.dtype), old[first + 5 :]])
    assert grown.leaves[path].shape == want.shape == (max(37, first + 5), 16)
    for start in range(0, len(want) + 1, 3):
        for stop in range(start, len(want) + 1, 4):
            for step in (1, 2, 7):
                index = (slice(start, stop, step), slice(2, 14, 3))
                found = grown.read(path, index)
                assert found.tobytes() == want[index].tobytes(), index
    assert grown.read("norm/scale", ()).tobytes() == MODEL.read("norm/scale", ()).tobytes()
