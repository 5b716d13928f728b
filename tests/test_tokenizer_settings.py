"""What the files beside a tokenizer say: bos and eos, special tokens, LLaMA's `legacy`; against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxlm.tokenizer import load_tokenizer, train_sentencepiece

transformers = pytest.importorskip("transformers")

CORPUS = ["granite is a rock and basalt is a rock", "user assistant system 12 and 34"] * 20


def byte_level(
    directory: Path, special: tuple[str, ...], plain: tuple[str, ...] = (), begin: str | None = None
) -> None:
    """GPT-2's kind: byte-level BPE; `plain` are added tokens without the special flag, `begin` is put in front."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(CORPUS, trainer)
    model.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    parts: list[Any] = [processors.ByteLevel(trim_offsets=True)]
    if begin is not None:
        template = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A $B:1", special_tokens=[(begin, model.token_to_id(begin))]
        )
        parts.append(template)
    model.post_processor = processors.Sequence(parts)
    directory.mkdir(parents=True, exist_ok=True)
    model.save(str(directory / "tokenizer.json"))


def settings(directory: Path, **content: Any) -> None:
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | content
    (directory / "tokenizer_config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("kind", "begin", "config", "adds"),
    [
        ("gpt2", None, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, False),
        ("smollm", None, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": False}, False),
        ("llama3", "<|begin|>", {"bos_token": "<|begin|>", "eos_token": "<|end|>"}, True),
        ("unnamed", "<|begin|>", {"eos_token": "<|end|>"}, True),
        ("told", "<|begin|>", {"bos_token": "<|begin|>", "add_bos_token": True, "add_eos_token": False}, True),
    ],
)
def test_bos_as_transformers(tmp_path: Path, kind: str, begin: str | None, config: dict[str, Any], adds: bool) -> None:
    byte_level(tmp_path, ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|end|>"), begin=begin)
    settings(tmp_path, **config)
    mine, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    bare = mine.encode("granite").ids
    assert [*(mine.opening if mine.adds_bos else ()), *bare] == theirs("granite").input_ids
    assert (mine.adds_bos, mine.adds_eos) == (adds, False)


@pytest.mark.parametrize("flag", [True, False, None])
def test_bos_of_a_sentencepiece_model(tmp_path: Path, flag: bool | None) -> None:
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS))
    train_sentencepiece([tmp_path / "corpus.txt"], 300, tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    given = {} if flag is None else {"add_bos_token": flag, "add_eos_token": not flag}
    settings(tmp_path / "out", **config, **given)
    mine = load_tokenizer(tmp_path / "out")
    assert (mine.adds_bos, mine.adds_eos) == ((True, False) if flag is None else (flag, not flag))
    assert ("add_bos_token" in mine.adds_why) == (flag is not None)
    if flag is not None:
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        ids = theirs("granite").input_ids
        assert (ids[0] == 1, ids[-1] == 2) == (mine.adds_bos, mine.adds_eos)
    assert load_tokenizer(tmp_path / "out" / "tokenizer.model").bos_id == 1


def test_the_configuration_goes_before_the_post_processor(tmp_path: Path) -> None:
    byte_level(tmp_path, ("<|begin|>", "<|end|>"), begin="<|begin|>")
    settings(tmp_path, bos_token="<|begin|>", eos_token="<|end|>", add_bos_token=False)
    tokenizer = load_tokenizer(tmp_path)
    assert not tokenizer.adds_bos
    assert "add_bos_token: false" in tokenizer.adds_why and "says otherwise" in tokenizer.adds_why


ROLES = [
    {"eos_token": "<|im_end|>"},
    {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": False}},
    {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
    {"extra_special_tokens": ["<|im_end|>"]},
    {"extra_special_tokens": {"image_token": "<|im_end|>"}},
    {"pad_token": "<|im_end|>"},
]


@pytest.mark.parametrize("roles", ROLES, ids=str)
def test_special_is_what_plays_a_role(tmp_path: Path, roles: dict[str, Any]) -> None:
    byte_level(tmp_path, ("<|begin|>",), plain=("<|im_start|>", "<|im_end|>", "<tool>"))
    settings(tmp_path, bos_token="<|begin|>", **roles)
    mine, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "rock<|im_start|> is <tool><|im_end|>"
    ids = mine.encode(text).ids
    assert ids == theirs(text, add_special_tokens=False).input_ids
    assert mine.decode(ids, False) == theirs.decode(ids, skip_special_tokens=False)
    kept = [index for index in ids if index not in theirs.all_special_ids]
    assert (
        mine.decode(ids)
        == theirs.decode(kept)
        == text.replace("<|im_end|>", "").replace(
            "<|im_start|>", "" if "<|im_start|>" in str(roles) else "<|im_start|>"
        )
    )
    assert set(theirs.all_special_ids) == mine.special_ids


@pytest.mark.parametrize("where", ["special_tokens_map.json", "tokenizer_config.json"])
def test_old_files_beside_a_sentencepiece_model(tmp_path: Path, where: str) -> None:
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS))
    size = train_sentencepiece([tmp_path / "corpus.txt"], 300, tmp_path).vocab_size
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    (tmp_path / "added_tokens.json").write_text(
        json.dumps({"<|im_start|>": size, "<|im_end|>": size + 1, "<x>": size + 2})
    )
    (tmp_path / where).write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<|im_start|>"]})
    )
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("rock<|im_start|>rock<x><|im_end|>").ids
    assert tokenizer.eos_id == ids[-1] == size + 1
    assert tokenizer.decode(ids).count("<") == 1 and "<x>" in tokenizer.decode(ids)
    assert {size, size + 1} <= tokenizer.special_ids and size + 2 not in tokenizer.special_ids


def test_offsets_keep_white_space(tmp_path: Path) -> None:
    """With trim_offsets the library's own offsets leave white space out, which then would not be trained."""
    byte_level(tmp_path, ("<|end|>",))
    text = "def f():\n    return  1\n\n"
    encoding = load_tokenizer(tmp_path).encode(text)
    assert "".join(text[a:b] for a, b in encoding.offsets) == text


@pytest.mark.parametrize("legacy", [True, False])
def test_legacy_of_a_sentencepiece_directory(tmp_path: Path, legacy: bool) -> None:
    """LlamaTokenizer with legacy: false puts no space in front of what follows a special token."""
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS))
    train_sentencepiece([tmp_path / "corpus.txt"], 300, tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").unlink()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings(tmp_path / "out", tokenizer_class="LlamaTokenizer", legacy=legacy, add_bos_token=True, **names)
    mine = load_tokenizer(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (
        "granite is a rock",
        "<s>granite</s>rock is",
        "granite</s>is a rock</s>",
        "</s></s>rock",
        "石英</s>rock",
        "granite</s> rock is",
    ):
        ids = mine.encode(text, special_tokens=True).ids
        if legacy and "> " in text:
            # Here transformers 5 departs from SentencePiece: it puts no space in front of one that is there.
            continue
        assert ids == theirs(text, add_special_tokens=False).input_ids, text
        if not legacy:
            assert mine.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    (behind,) = mine.encode_batch(["rock is"], continued=[True])
    assert behind.ids == mine.encode("</s>rock is", special_tokens=True).ids[1:]
    assert mine.decode(mine.encode("</s>rock is", special_tokens=True).ids) == "rock is"


def test_a_segment_that_goes_on(tmp_path: Path) -> None:
    """A tokenizer.json that puts a space only where a text begins: none behind an eos either."""
    from tokenizers import Tokenizer, pre_tokenizers

    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS))
    train_sentencepiece([tmp_path / "corpus.txt"], 300, tmp_path / "out")
    model = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    model.normalizer = None
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    model.save(str(tmp_path / "out" / "tokenizer.json"))
    mine = load_tokenizer(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    begin, behind = mine.encode_batch(["rock is", "rock is"], continued=[False, True])
    assert [*begin.ids, 2, *behind.ids] == theirs("rock is</s>rock is", add_special_tokens=False).input_ids
    assert begin.ids != behind.ids and behind.offsets[0][0] == 0 and behind.offsets[-1][1] == 7
