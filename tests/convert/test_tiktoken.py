"""LLaMA 3's tokenizer: the same ids as tiktoken's algorithm gives, from the file to jaxlm and transformers."""

from __future__ import annotations

import base64
import itertools
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convert.formats.tiktoken import PATTERN, is_tiktoken, read_ranks, special_tokens, write_tokenizer_json
from jaxlm.errors import UserError
from tests.convert.test_meta import save_meta
from tests.convert.tiny import make_hf_model

TEXT = "The theory of the weather: 12345 stones, the other's stone.\n\n  Wärme über 37 °C — 気候 и погода\tthe end"


def make_ranks() -> dict[bytes, int]:
    """All bytes in an odd order, then merges as byte-pair encoding finds them in a text."""
    order = list(range(256))
    random.Random(0).shuffle(order)
    ranks = {bytes([byte]): rank for rank, byte in enumerate(order)}
    words = [[bytes([b]) for b in word.encode()] for word in re.findall(r"\s?\S+", TEXT * 2)]
    for _ in range(60):
        counts: dict[bytes, int] = {}
        for word in words:
            for a, b in itertools.pairwise(word):
                counts[a + b] = counts.get(a + b, 0) + 1
        best = max((token for token in counts if token not in ranks), key=lambda token: (counts[token], token))
        ranks[best] = len(ranks)
        words = [merge(word, ranks) for word in words]
    ranks[b" quixotic"] = len(ranks)  # a whole word to which no merges lead
    return ranks


def merge(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """Tiktoken's rule: again and again the neighbours whose union has the lowest rank."""
    if b"".join(parts) in ranks:
        return [b"".join(parts)]
    while True:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not found:
            return parts
        _, i = min(found)
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


TEXTS = [TEXT, " quixotic", "a quixotic", "", "\r\n \r\n", "I'LL we're 99999", "🙂🙂 \u00a0 x", TEXT[::-1]]


@pytest.mark.parametrize("new", [False, True])
def test_same_ids(new: bool, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    regex = pytest.importorskip("regex")
    ranks = make_ranks()
    model = write_ranks(tmp_path / "tokenizer.model", ranks)
    assert is_tiktoken(model) and read_ranks(model) == ranks
    write_tokenizer_json(model, tmp_path, len(ranks) + 256, new)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        words = regex.findall(PATTERN, text)
        assert "".join(words) == text
        want = [ranks[p] for word in words for p in merge([bytes([b]) for b in word.encode()], ranks)]
        found = tokenizer.encode(text)
        assert found.ids == [len(ranks), *want], text
        assert tokenizer.decode(found.ids) == text
    assert tokenizer.encode("<|eot_id|>", add_special_tokens=False).ids == [len(ranks) + 9]


def test_same_ids_as_tiktoken(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    tokenizers = pytest.importorskip("tokenizers")
    ranks = make_ranks()
    write_tokenizer_json(write_ranks(tmp_path / "tokenizer.model", ranks), tmp_path, len(ranks) + 256, True)
    peer = tiktoken.Encoding("x", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False).ids == peer.encode(text)


def test_special_tokens() -> None:
    old, new = special_tokens(False), special_tokens(True)
    assert len(set(old)) == len(set(new)) == 256
    # Ids less 128000, as in the published tokenizer_config.json files.
    for tokens, places in (
        (old, {2: "reserved_special_token_0", 5: "reserved_special_token_3", 8: "reserved_special_token_4"}),
        (old, {9: "eot_id", 10: "reserved_special_token_5", 255: "reserved_special_token_250"}),
        (new, {2: "reserved_special_token_0", 4: "finetune_right_pad_id", 5: "reserved_special_token_2"}),
        (new, {8: "eom_id", 10: "python_tag", 11: "reserved_special_token_3", 255: "reserved_special_token_247"}),
    ):
        for place, name in places.items():
            assert tokens[place] == f"<|{name}|>"


def test_meta_to_hf_brings_a_tokenizer(tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]) -> None:
    transformers = pytest.importorskip("transformers")
    from jaxlm.tokenizer import load_tokenizer

    ranks = make_ranks()
    size = len(ranks) + 256
    model: Any = make_hf_model(vocab_size=size, rope_parameters={"rope_theta": 5e5}, tie_word_embeddings=False)
    source = save_meta(model, tmp_path / "meta", 1, 0, vocab_size=size, rope_theta=5e5)
    write_ranks(source / "tokenizer.model", ranks)
    run("meta-to-hf", source, tmp_path / "hf")
    run("meta-to-jax", source, tmp_path / "jax")
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert peer.bos_token_id == len(ranks) and peer.eos_token_id == len(ranks) + 1 and len(peer) == size
    for tokenizer in (load_tokenizer(tmp_path / "hf"), load_tokenizer(tmp_path / "jax" / "jaxlm" / "tokenizer")):
        assert [tokenizer.bos_id, *tokenizer.encode(TEXT).ids] == peer(TEXT)["input_ids"]
    write_ranks(source / "tokenizer.model", {t: r for t, r in ranks.items() if r < size - 257})
    assert "it belongs to another model" in refused("meta-to-hf", source, tmp_path / "out")


def test_damaged_files(tmp_path: Path) -> None:
    good = write_ranks(tmp_path / "t", make_ranks()).read_bytes()
    lines = good.splitlines(keepends=True)
    for content, words in (
        (b"".join(lines[:200]), "not every byte"),
        (b"".join(lines[:3] + lines[4:]), "line 4 has another rank"),
        (good[: len(good) // 2 - 3], "line 1"),
        (good.replace(b"=", b"?", 1), "is not a token in base64"),
        (lines[0] + lines[0].replace(b" 0", b" 1") + b"".join(lines[2:]), "line 2 has another rank, or a token"),
        (b" 0\n" + b"".join(lines[1:]), "line 1 is not"),
    ):
        (tmp_path / "t").write_bytes(content)
        with pytest.raises(UserError) as error:
            read_ranks(tmp_path / "t")
        assert words in str(error.value)
    (tmp_path / "t").write_bytes(b"\n\x0e\n\x05<unk>")
    assert not is_tiktoken(tmp_path / "t")
