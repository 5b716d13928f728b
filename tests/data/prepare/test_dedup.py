"""Equal and nearly equal documents: what goes, against all pairs compared; and what must not go."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.data.prepare import dedup, minhash
from jaxlm.errors import UserError
from tests.data.prepare.conftest import run, text_of

METHODS = ["numpy", "rensa"]


def needs(method: str) -> None:
    if method == "rensa":
        pytest.importorskip("rensa")


def changed(text: str, rng: random.Random, words: int) -> str:
    pieces = text.split(" ")
    for place in rng.sample(range(len(pieces)), words):
        pieces[place] = f"new{rng.random()}"
    return " ".join(pieces)


def write(folder: Path, texts: list[str], files: int = 3) -> Path:
    folder.mkdir()
    for number in range(files):
        own = texts[len(texts) * number // files : len(texts) * (number + 1) // files]
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in own]
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def deduplicated(folder: Path, out: Path, **values: Any) -> list[str]:
    block = values.pop("block_bytes", 10**9)
    settings = {"minhash": "numpy", "min_kept": 0.0, **values}
    run(
        {
            "sources": [{"path": str(folder), "name": "s"}],
            "steps": ["dedup"],
            "output_dir": str(out),
            "dedup": settings,
            "block_bytes": block,
        }
    )
    parts = sorted((out / "dedup").glob("part-*.jsonl"))
    return [json.loads(line)["text"] for part in parts for line in part.read_text(encoding="utf-8").splitlines()]


# MinHash -----------------------------------------------------------------------------------------


def test_ngrams_are_of_words_whatever_stands_between() -> None:
    sets = [set(minhash.ngram_hashes(text, 3).tolist()) for text in ("A b, c - d!", "a B c d", "a b c", "a b")]
    assert sets[0] == sets[1] and sets[2] < sets[0] and len(sets[0]) == 2
    assert len(sets[3]) == 1 and not sets[3] & sets[0]
    assert len(minhash.ngram_hashes(" .,! ", 3)) == 0


def test_chinese_characters_are_words_of_an_ngram() -> None:
    whole = set(minhash.ngram_hashes("石英是矿物", 5).tolist())
    assert len(whole) == 1 and whole == set(minhash.ngram_hashes("石英，是 矿物。", 5).tolist())
    assert len(minhash.ngram_hashes("石英 SiO2 是一种矿物", 5)) == 4  # 石 英 sio2 是 一 种 矿 物


@pytest.mark.parametrize("method", METHODS)
def test_signatures_estimate_the_true_similarity(method: str) -> None:
    """Without a bias, and with the spread of independent hash functions."""
    needs(method)
    rng = random.Random(0)
    errors, variances = [], []
    for number in range(150):
        text = text_of(rng, 12)
        sets = [minhash.ngram_hashes(each, 5) for each in (text, changed(text, rng, number % 12))]
        true = minhash.jaccard(*map(np.unique, sets))
        first, second = minhash.signatures(*minhash.flatten(sets), 112, method)
        errors.append((first == second).mean() - true)
        variances.append(true * (1 - true) / 112)
    assert abs(np.mean(errors)) < 3 * np.sqrt(np.mean(variances) / len(errors))
    assert np.sqrt(np.mean(np.square(errors))) < 1.3 * np.sqrt(np.mean(variances))


@pytest.mark.parametrize("method", METHODS)
def test_a_signature_does_not_depend_on_its_batch(method: str) -> None:
    needs(method)
    rng = random.Random(1)
    sets = [minhash.ngram_hashes(text_of(rng, size), 5) for size in (1, 30, 2, 1000, 5)]
    together = minhash.signatures(*minhash.flatten(sets), 24, method)
    alone = [minhash.signatures(*minhash.flatten([each]), 24, method)[0] for each in sets]
    np.testing.assert_array_equal(together, alone)


def test_buckets_are_compared_in_pairs() -> None:
    hashes = np.array([7, 5, 7, 7, 9, 5, 7], np.uint64)
    pairs, large = dedup.bucket_pairs(hashes, np.arange(10, 17), 4)
    expected = {(i, j) for i, j in itertools.combinations(range(7), 2) if hashes[i] == hashes[j]}
    assert {(i - 10, j - 10) for i, j in pairs.tolist()} == expected and large == 0
    pairs, large = dedup.bucket_pairs(hashes, np.arange(10, 17), 3)
    # The bucket of four: each with the first, and with the one before it.
    assert {tuple(pair) for pair in pairs.tolist()} == {(11, 15), (10, 12), (10, 13), (10, 16), (12, 13), (13, 16)}
    assert large == 1
    assert len(dedup.bucket_pairs(hashes[:0], np.arange(0), 3)[0]) == 0


def test_a_long_chain_is_not_one_document() -> None:
    """Ends of a chain have nothing in common: beyond max_cluster only neighbours of what stays go."""
    chain = np.array([(i, i + 1) for i in range(9)])
    dropped, large = dedup.choose(chain, 10, 10)
    assert dropped.tolist() == [[i, 0] for i in range(1, 10)] and large == 0
    dropped, large = dedup.choose(chain, 10, 9)
    assert dropped.tolist() == [[i, i - 1] for i in (1, 3, 5, 7, 9)] and large == 1
    assert dedup.choose(np.zeros((0, 2), np.int64), 10, 9)[0].shape == (0, 2)


# The step ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(2)
    result: list[str] = []
    for number in range(90):
        draw = rng.random()
        if number > 5 and draw < 0.15:
            result.append(rng.choice(result))
        elif number > 5 and draw < 0.5:
            result.append(changed(rng.choice(result), rng, rng.choice([1, 1, 2, 4, 8, 20])))
        else:
            result.append(text_of(rng, 20))
    return [
        *result,
        "",
        "",
        "!!!",
        "石英是一种常见的矿物，成分是二氧化硅。" * 2,
        "石英是一种常见的矿物，成分是二氧化硅！" * 2,
    ]


def expected_of(texts: list[str], threshold: float) -> list[str]:
    """By comparing all pairs."""
    sets = [np.unique(minhash.ngram_hashes(text, 5)) for text in texts]
    group = list(range(len(texts)))
    for i, j in itertools.combinations(range(len(texts)), 2):
        equal = texts[i].strip() == texts[j].strip()
        near = len(sets[i]) and len(sets[j]) and minhash.jaccard(sets[i], sets[j]) >= threshold
        if equal or near:
            low, high = sorted((group[i], group[j]))
            group = [low if each == high else each for each in group]
    return [text for number, text in enumerate(texts) if group[number] == number]


@pytest.mark.parametrize("method", METHODS)
def test_what_stays_is_what_all_pairs_say(texts: list[str], tmp_path: Path, method: str) -> None:
    """With more bands than usual, so that no pair is missed by chance."""
    needs(method)
    folder = write(tmp_path / "in", texts)
    kept = deduplicated(folder, tmp_path / "out", bands=40, rows=4, minhash=method)
    assert kept == expected_of(texts, 0.8)
    assert 40 < len(kept) < 80


def test_what_stays_does_not_depend_on_the_cuts(texts: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    """Files cut into blocks, hashes and documents into parts."""
    folder = write(tmp_path / "in", texts)
    kept = deduplicated(folder, tmp_path / "one")
    assert deduplicated(folder, tmp_path / "blocks", block_bytes=3000) == kept
    monkeypatch.setattr(dedup, "PART_DOCUMENTS", 50)
    assert deduplicated(folder, tmp_path / "parts", block_bytes=3000) == kept


def test_equal_texts_alone(texts: list[str], tmp_path: Path) -> None:
    folder = write(tmp_path / "in", texts)
    assert deduplicated(folder, tmp_path / "out", near=False) == list(dict.fromkeys(texts))


def test_a_shared_paragraph_does_not_make_a_duplicate(tmp_path: Path) -> None:
    """Pages of one site share their frame; they share buckets, and their n-grams say that they differ."""
    rng = random.Random(3)
    frame = text_of(rng, 10)
    pages = [f"{frame} {text_of(rng, 10)}" for _ in range(30)]
    assert deduplicated(write(tmp_path / "in", pages), tmp_path / "out", bands=40, rows=2) == pages


def test_a_source_that_loses_too_much_stops_the_step(tmp_path: Path) -> None:
    rng = random.Random(4)
    copies = [changed(text_of(random.Random(5), 20), rng, 1) for _ in range(20)]
    good = [text_of(rng, 20) for _ in range(20)]
    sources = [
        {"path": str(write(tmp_path / name, texts, 1)), "name": name}
        for name, texts in (("good", good), ("bad", copies))
    ]
    values = {"sources": sources, "steps": ["dedup"], "output_dir": str(tmp_path / "out")}
    with pytest.raises(
        UserError, match=r"bad would keep 1 of 20 documents \(5.0%\), less than 50%.*--dedup.min_kept 0.05"
    ):
        run({**values, "dedup": {"minhash": "numpy"}})
    folder = tmp_path / "out/dedup"
    assert not list(folder.glob("part-*")) and not (folder / "report.json").exists()
    marks = {file: file.stat().st_mtime_ns for file in folder.glob("marks/*")}
    report = run({**values, "dedup": {"minhash": "numpy", "min_kept": 0.05}})[0]
    assert {file: file.stat().st_mtime_ns for file in marks} == marks
    assert report.counts.numbers["bad"]["kept"] == 1 and report.counts.numbers["good"]["kept"] == 20
    assert report.counts.taken["bad"] == {dedup.NEAR: 19}


def test_rensa_that_is_missing_is_named(texts: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(
        UserError, match=r"rensa is not installed; pip install 'jaxlm\[prepare\]', or set dedup.minhash: numpy"
    ):
        deduplicated(write(tmp_path / "in", texts), tmp_path / "out", minhash="rensa")


def test_ascii_words_are_those_of_any_script() -> None:
    text = "".join(map(chr, range(128))) * 2 + " A_b c's 3.5 wt.%\tx\n\x1fy\x0bz"
    np.testing.assert_array_equal(minhash.word_hashes(text), minhash.any_word_hashes(text))
