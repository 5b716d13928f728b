"""The step build: documents, records, samples and other stores to a token store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data.examples import build_examples
from jaxlm.data.mindrecord import read_rows
from jaxlm.data.prepare import build
from jaxlm.data.prepare.pipeline import Share, UnfinishedError
from jaxlm.data.store.knowlm import read_index
from jaxlm.data.store.stored import StoredTokens
from jaxlm.data.store.torch_numbers import read_numbers
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer
from tests.data.prepare.conftest import run

SHARED = Path(__file__).parents[3] / "../shared/data"


def write_lines(file: Path, records: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return file


def files_of(store: Path) -> dict[str, bytes]:
    """All but the manifest, which names where the tokenizer was."""
    return {file.name: file.read_bytes() for file in store.iterdir() if file.name != "manifest.json"}


@pytest.fixture
def sources(tmp_path: Path) -> list[dict[str, Any]]:
    texts = ["the granite is a rock. " * size for size in (1, 90, 3, 2)]
    questions = [{"instruction": f"what is {word}", "output": "a rock"} for word in ("basalt", "granite", "quartz")]
    return [
        {"path": str(write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in texts])), "name": "texts"},
        {"path": str(write_lines(tmp_path / "asks.jsonl", questions)), "name": "asks", "template": "alpaca"},
    ]


def values(sources: Any, tokenizer: Tokenizer, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "sources": sources,
        "steps": ["build"],
        "tokenizer": str(tokenizer.path),
        "output_dir": str(out),
        "build": {"sequence_length": 300, "add_eos": True},
        **more,
    }


def test_a_store_holds_what_training_would_tokenise(
    sources: list[dict[str, Any]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    report = run(values(sources, tokenizer, tmp_path / "out"))[0]
    stored = StoredTokens(tmp_path / "out/build/store")
    stored.verify()
    config = DataConfig(
        train=tuple(SourceConfig(path=each["path"], template=each.get("template", "text")) for each in sources),
        sequence_length=300,
        add_bos=True,
        add_eos=True,
    )
    examples, _ = build_examples(config.train, config, tokenizer, 400)
    np.testing.assert_array_equal(stored.input_ids, examples.input_ids)
    np.testing.assert_array_equal(stored.loss_mask, examples.loss_mask)
    np.testing.assert_array_equal(stored.offsets, examples.offsets)
    np.testing.assert_array_equal(stored.source, examples.source)
    assert report.counts.numbers["texts"]["tokens"] == int(examples.lengths[examples.source == 0].sum())
    assert report.counts.numbers["asks"]["read"] == 3 and report.counts.numbers["texts"]["split"] == 1
    assert not list((tmp_path / "out/build").glob("part-*"))


def test_mindrecord_is_written_and_read_back(
    sources: list[dict[str, Any]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    build = {"sequence_length": 300, "add_eos": True}
    run(values(sources, tokenizer, tmp_path / "one", build={**build, "mindrecord": 1}))
    stored = StoredTokens(tmp_path / "one/build/store")
    file = tmp_path / "one/build/data.mindrecord"
    rows = list(read_rows(file))
    assert {len(row["input_ids"]) for row in rows} == {300} and len(rows) == len(stored)
    # As a source of training: the tokens, and what is trained of them, are those of the store.
    config = DataConfig(train=(SourceConfig(path=str(file)),), sequence_length=300)
    examples, (report,) = build_examples(config.train, config, tokenizer, 400)
    for name in ("input_ids", "loss_mask", "offsets"):
        np.testing.assert_array_equal(getattr(examples, name), getattr(stored, name))
    assert report.records == len(stored) and report.truncated == report.dropped == 0
    # As a source of prepare, from a folder of several files, whose rows are dealt out in turn.
    run(values(sources, tokenizer, tmp_path / "three", build={**build, "mindrecord": 3}))
    again = values([{"path": str(tmp_path / "three/build")}], tokenizer, tmp_path / "again", build=build)
    run(again)
    back = StoredTokens(tmp_path / "again/build/store")
    order = [number for shard in range(3) for number in range(shard, len(stored), 3)]
    assert [back[at].input_ids.tolist() for at in range(len(back))] == [stored[at].input_ids.tolist() for at in order]
    (tmp_path / "three/build/data.mindrecord1").unlink()
    with pytest.raises(UserError, match=r"of which data\.mindrecord1 is missing"):
        run({**again, "output_dir": str(tmp_path / "more")})


def test_a_store_is_the_same_however_it_was_made(
    sources: list[dict[str, Any]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    whole = values(sources, tokenizer, tmp_path / "one", block_bytes=300)
    run(whole)
    for _ in range(3):
        for index in range(2):
            try:
                run({**whole, "output_dir": str(tmp_path / "shares")}, None, Share(index, 2))
            except UnfinishedError:
                continue
    run({**whole, "output_dir": str(tmp_path / "two"), "engine": {"workers": 2}})
    stores = [files_of(tmp_path / name / "build/store") for name in ("one", "shares", "two")]
    assert stores[0] == stores[1] == stores[2] and len(stores[0]["tokens.bin"]) > 100


def test_a_run_opens_the_store(sources: list[dict[str, Any]], tokenizer: Tokenizer, tmp_path: Path) -> None:
    run(values(sources, tokenizer, tmp_path / "out"))
    store = SourceConfig(path=str(tmp_path / "out/build/store"))
    config = DataConfig(train=(store,), sequence_length=300, add_bos=True, add_eos=True)
    examples, _ = build_examples(config.train, config, tokenizer, 400)
    np.testing.assert_array_equal(examples.input_ids, StoredTokens(tmp_path / "out/build/store").input_ids)


def test_samples_of_split_stay_as_they_are(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, documents and sources, through filter and dedup too, wherever what is read at a time ends."""
    monkeypatch.setattr(build, "ROWS", 2)
    texts = [f"basalt {word}。 the granite cools。 石英 和 长石。 " * 4 for word in ("melt", "cools", "slowly")]
    files = [write_lines(tmp_path / f"{name}.jsonl", [{"text": text} for text in texts]) for name in "ab"]
    steps = ["filter", "dedup", "split", "build"]
    more = {
        "steps": steps,
        "split": {"length": 32, "min_tokens": 5},
        "compression": "zst",
        "dedup": {"near": False, "min_kept": 0.0},
    }
    sources = [{"path": str(file), "name": file.stem, "language": "chinese"} for file in files]
    sources.append(
        {"path": str(write_lines(tmp_path / "c.jsonl", [{"text": "quartz。 " * 9}])), "name": "c", "language": "code"}
    )
    run(values(sources, tokenizer, tmp_path / "out", **more))
    stored = StoredTokens(tmp_path / "out/build/store")
    assert stored.manifest.documents == 4 and len(stored) > 8
    assert sorted(set(stored.source.tolist())) == [0, 2]  # b is a's copy
    import pyarrow.parquet

    parts = [pyarrow.parquet.read_table(file) for file in sorted((tmp_path / "out/split").glob("*.parquet"))]
    samples = [sample for part in parts for sample in part.column("input_ids").to_pylist()]
    assert [stored[number].input_ids.tolist() for number in range(len(stored))] == samples
    assert all(not stored[number].loss_mask[0] and stored[number].loss_mask[1:].all() for number in range(len(stored)))
    ids = [document for part in parts for document in part.column("id").to_pylist()]
    assert len(set(ids)) == len(np.unique(stored.record)) == 4


def test_knowlms_golden_store_is_made_to_the_byte(tmp_path: Path) -> None:
    folder = SHARED / "golden/knowlm_mmap"
    if not folder.is_dir():
        pytest.skip("KnowLM's golden store is not at hand")
    (tmp_path / "g.jsonl").write_bytes((folder / "g.txt").read_bytes())
    run(
        {
            "sources": [{"path": str(tmp_path / "g.jsonl"), "language": "chinese"}],
            "steps": ["split", "build"],
            "tokenizer": str(folder / "sp.model"),
            "output_dir": str(tmp_path / "out"),
            "split": {"length": 40, "encode": "sentence", "delimiters": "released"},
            "build": {"knowlm": True},
        }
    )
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"out/build/knowlm{ending}").read_bytes() == (folder / f"g{ending}").read_bytes()
    for ending in (".dis", ".tmp"):
        assert read_numbers(tmp_path / f"out/build/knowlm{ending}") == read_numbers(folder / f"g{ending}")
    assert len(read_index(tmp_path / "out/build/knowlm.idx").lengths) == 5


def test_other_stores_are_sources(tokenizer: Tokenizer, sources: Any, tmp_path: Path) -> None:
    run(
        values(
            sources[:1], tokenizer, tmp_path / "first", build={"sequence_length": 64, "add_eos": True, "knowlm": True}
        )
    )
    first = StoredTokens(tmp_path / "first/build/store")
    stores = [
        {"path": str(tmp_path / "first/build/store"), "name": "own"},
        {"path": str(tmp_path / "first/build/knowlm.idx"), "name": "knowlm", "format": "knowlm"},
        sources[1],
    ]
    run(values(stores, tokenizer, tmp_path / "second", build={"sequence_length": 512, "add_eos": True}))
    second = StoredTokens(tmp_path / "second/build/store")
    assert len(second) == 2 * len(first) + 3
    for number in range(len(first)):
        np.testing.assert_array_equal(second[number].input_ids, first[number].input_ids)
        np.testing.assert_array_equal(second[len(first) + number].input_ids, first[number].input_ids)


def test_what_build_cannot_do_is_said_first(sources: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"template of .*asks.jsonl is 'alpaca', which only build reads"):
        run(values(sources, tokenizer, tmp_path / "out", steps=["filter", "build"]))
    with pytest.raises(UserError, match="build gives tokens, so that nothing can follow it"):
        run(values(sources, tokenizer, tmp_path / "out", steps=["build", "dedup"]))
    with pytest.raises(UserError, match=r"build.sequence_length: 1"):
        run(values(sources, tokenizer, tmp_path / "out", build={"sequence_length": 1}))
    with pytest.raises(UserError, match="tokenizer: build needs one"):
        run({**values(sources, tokenizer, tmp_path / "out"), "tokenizer": None})
    broken = write_lines(tmp_path / "none.jsonl", [{"text": " "}])
    with pytest.raises(UserError, match="nothing is left of none"):
        run(values([{"path": str(broken), "name": "none"}], tokenizer, tmp_path / "out"))
    assert not (tmp_path / "out/build/store").exists()
