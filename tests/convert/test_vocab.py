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
sentencepiece = pytest.importorskip("sentencepiece")
messages: Any = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
generate_merges = pytest.importorskip("transformers.tokenization_utils_base").generate_merges

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


CHINESE = ["石英和长石是矿物", "石英是二氧化硅", "花岗岩由石英和长石组成", "矿物组成岩石", "长石是硅酸盐矿物"] * 8


@pytest.fixture(scope="module")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of another kind than LLaMA's, with a control piece that LLaMA's does not have."""
    path = tmp_path_factory.mktemp("chinese") / "chinese_sp.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CHINESE), model_writer=file, vocab_size=29, pad_id=3, minloglevel=2
        )
    return path


def merged_by_the_recipe(first: Path, second: Path) -> bytes:
    """What the scripts of Chinese-LLaMA-Alpaca do: pieces that are not there, with score 0, and nothing else."""
    ours, theirs = messages.ModelProto(), messages.ModelProto()
    ours.ParseFromString(first.read_bytes())
    theirs.ParseFromString(second.read_bytes())
    known = {piece.piece for piece in ours.pieces}
    for piece in theirs.pieces:
        if piece.piece not in known:
            new = messages.ModelProto().SentencePiece()
            new.piece = piece.piece
            new.score = 0
            ours.pieces.append(new)
    return ours.SerializeToString()


@pytest.mark.parametrize("kind", ["both", "model"])
def test_pieces_of_another_model(
    kind: str, trained: Path, chinese: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    model = save_model(trained, tmp_path / "hf", kind, spare=2)
    said = run("extend-vocab", model, tmp_path / "out", "--merge-spm", chinese)
    content = (tmp_path / "out" / "tokenizer.model").read_bytes()
    assert content == merged_by_the_recipe(trained / "tokenizer.model", chinese)

    pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
    old, ours = load_tokenizer(model), load_tokenizer(tmp_path / "out")
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path / "out")
    first = old.vocab_size
    assert ours.vocab_size == len(theirs) == len(pieces) > first + 15
    assert f"ids {first} to {ours.vocab_size - 1}: '<pad>'" in said
    assert not pieces.is_control(first) and pieces.get_score(first) == 0
    for line in [*TEXT.splitlines()[:2], "the matcha, 12 + 3\ttabs"]:
        assert ours.encode(line).ids == old.encode(line).ids == theirs.encode(line, add_special_tokens=False)
    plain = load_tokenizer(tmp_path / "out" / "tokenizer.model")
    for line in [*CHINESE[:5], "the 石英 cat sat on 花岗岩 and 硅酸盐", "未知的矿物"]:
        ids = ours.encode(line).ids
        assert plain.encode(line).ids == pieces.encode(line) and plain.decode(plain.encode(line).ids) == line
        assert ids == theirs.encode(line, add_special_tokens=False) if kind == "both" else ids == pieces.encode(line)
        assert len(ids) < len(old.encode(line).ids) and max(ids) >= first and ours.decode(ids) == line

    # Rows: spare ones are taken first, and a new row is the mean of those of the bytes or pieces that stood for it.
    before, after = state(model), state(tmp_path / "out")
    raw = messages.ModelProto()
    raw.ParseFromString((trained / "tokenizer.model").read_bytes())
    raw.normalizer_spec.add_dummy_prefix = False
    splitter = sentencepiece.SentencePieceProcessor(model_proto=raw.SerializeToString())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert len(after[name]) == ours.vocab_size and np.array_equal(after[name][:first], before[name][:first])
        for index in range(first, ours.vocab_size):
            rows = before[name][splitter.encode(pieces.id_to_piece(index))]
            np.testing.assert_allclose(after[name][index], rows.astype(np.float64).mean(axis=0), atol=1e-6)
    # Chinese-LLaMA's own way on from here: a token behind the pieces.
    run("extend-vocab", tmp_path / "out", tmp_path / "pad", "--tokens", "[PAD],", "--special")
    assert load_tokenizer(tmp_path / "pad").id_of("[PAD]") == ours.vocab_size


def test_old_pieces_may_be_made_of_new_ones(
    trained: Path, chinese: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    """transformers' own pairs for the merged model are those of the written tokenizer.json."""
    model = save_model(trained, tmp_path / "hf")
    run("extend-vocab", model, tmp_path / "out", "--merge-spm", chinese)
    written = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]
    pairs = [tuple(pair) for pair in written["merges"]]
    theirs = generate_merges(written["vocab"])
    assert len(pairs) == len(set(pairs)) and sorted(pairs) == sorted(theirs)
    assert [written["vocab"][a + b] for a, b in pairs] == [written["vocab"][a + b] for a, b in theirs]


def test_mistakes_in_merging(
    trained: Path, chinese: Path, tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]
) -> None:
    model = save_model(trained, tmp_path / "hf")
    out = tmp_path / "out"
    (tmp_path / "bad.model").write_bytes(b"not a model")
    for other, words in (
        (tmp_path / "none.model", "no such file"),
        (tmp_path / "bad.model", "not a SentencePiece model"),
        (model / "tokenizer.model", "has no piece that"),
    ):
        assert words in refused("extend-vocab", model, out, "--merge-spm", other)
    for option in (("--tokens", "a,"), ("--special",), ("--modality", "smiles")):
        assert f"{option[0]} beside" in refused("extend-vocab", model, out, "--merge-spm", chinese, *option)
    run("extend-vocab", model, tmp_path / "added", "--tokens", "[PAD],")
    assert "'[PAD]' stand where" in refused("extend-vocab", tmp_path / "added", out, "--merge-spm", chinese)
    fast = model / "tokenizer.json"
    content = json.loads(fast.read_text())
    content["model"]["merges"].reverse()
    fast.write_text(json.dumps(content))
    assert "not in the order of ids" in refused("extend-vocab", model, out, "--merge-spm", chinese)
    content["model"]["merges"].reverse()
    content["model"]["vocab"] |= {"<unk>": 1, "<s>": 0}
    fast.write_text(json.dumps(content))
    assert "its vocabulary is another one" in refused("extend-vocab", model, out, "--merge-spm", chinese)
    fast.unlink()
    shutil.copy(chinese, model / "tokenizer.model")
    small = make_hf_model(vocab_size=29)
    small.save_pretrained(model)
    assert "not a BPE model" in refused("extend-vocab", model, out, "--merge-spm", trained / "tokenizer.model")
    (model / "tokenizer.model").unlink()
    shutil.copy(trained / "tokenizer.json", model)
    assert "has no tokenizer.model" in refused("extend-vocab", model, out, "--merge-spm", chinese)


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
