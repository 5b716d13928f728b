"""Looking into what was prepared; stores merged, and thinned out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.cli.prepare import main
from jaxlm.data.prepare import stores
from jaxlm.data.prepare.inspect import inspect
from jaxlm.data.store.stored import StoredTokens
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer
from tests.data.prepare.conftest import run

WORDS = ("granite", "basalt", "quartz", "feldspar")


def make(folder: Path, tokenizer: Tokenizer, **texts: list[str]) -> Path:
    """A store with a source for each list of texts."""
    folder.mkdir(parents=True)
    sources = []
    for name, lines in texts.items():
        file = folder / f"{name}.txt"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        sources.append({"path": str(file), "name": name})
    out = folder / "out"
    run({"sources": sources, "steps": ["build"], "tokenizer": str(tokenizer.path), "output_dir": str(out)})
    return out / "build/store"


def tokens_of(store: StoredTokens) -> list[list[int]]:
    return [store[number].input_ids.tolist() for number in range(len(store))]


@pytest.fixture
def pair(tokenizer: Tokenizer, tmp_path: Path) -> tuple[Path, Path]:
    """Two stores that share the source b."""
    texts = [[f"the {word} is a rock" + " of melt" * number for number in range(3)] for word in WORDS]
    return make(tmp_path / "1", tokenizer, a=texts[0], b=texts[1]), make(
        tmp_path / "2", tokenizer, c=texts[2], b=texts[3]
    )


def test_merged_stores_are_one_behind_the_other(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = map(StoredTokens, pair)
    merged = stores.merge_stores(tmp_path / "merged", pair)
    merged.verify()
    assert tokens_of(merged) == tokens_of(first) + tokens_of(second)
    reports = {report.path: report for report in merged.manifest.reports()}
    assert list(reports) == ["a", "b", "c"] and reports["b"].records == 6
    assert merged.source.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [1] * 3
    assert merged.manifest.documents == 12
    # A merged store may be merged again, which KnowLM's may not.
    again = stores.merge_stores(tmp_path / "again", [tmp_path / "merged", pair[0]])
    assert len(again) == 18


def test_stores_of_two_tokenizers_are_not_merged(
    pair: tuple[Path, Path], chat_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = make(tmp_path / "3", chat_tokenizer, a=["granite"])
    with pytest.raises(UserError, match="was made for another tokenizer than"):
        stores.merge_stores(tmp_path / "merged", [pair[0], other])
    assert not (tmp_path / "merged").exists()
    with pytest.raises(UserError, match="is there already"):
        stores.merge_stores(other, [pair[0]])


def test_examples_are_dropped_by_number_and_by_source(pair: tuple[Path, Path], tmp_path: Path) -> None:
    store = StoredTokens(pair[0])
    left = stores.drop_examples(tmp_path / "some", pair[0], stores.examples_by_index(pair[0], "0,3-4"), "--indices")
    left.verify()
    assert tokens_of(left) == [tokens_of(store)[number] for number in (1, 2, 5)]
    assert [report.records for report in left.manifest.reports()] == [2, 1]
    assert left.manifest.reports()[0].trained_tokens == sum(int(store[number].loss_mask.sum()) for number in (1, 2))
    left = stores.drop_examples(tmp_path / "b", pair[0], stores.examples_of_source(pair[0], "a"), "--source a")
    assert tokens_of(left) == tokens_of(store)[3:]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("6", "6 is beyond .*, whose examples are 0 to 5"),
        ("1-x", "'1-x' is not a number, nor a range"),
        ("nowhere.txt", "nor a file that is there"),
        ("4-2", "4-2 is beyond"),
    ],
)
def test_numbers_that_are_not_there_are_refused(pair: tuple[Path, Path], words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        stores.examples_by_index(pair[0], words)


def test_all_and_nothing_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for gone, message in (
        (np.ones(6, np.bool_), "all 6 examples would be dropped"),
        (np.zeros(6, np.bool_), "nothing"),
    ):
        with pytest.raises(UserError, match=message):
            stores.drop_examples(tmp_path / "out", pair[0], gone, "--indices")
    with pytest.raises(UserError, match="has no source 'x'; it has a, b"):
        stores.examples_of_source(pair[0], "x")


# inspect -----------------------------------------------------------------------------------------


def test_a_store_is_looked_into(pair: tuple[Path, Path]) -> None:
    store = StoredTokens(pair[0])
    contents = inspect(pair[0], None, 2)
    assert contents.sources["a"] == (3, int(store.lengths[:3].sum()))
    assert contents.facts["documents"] == "6"
    assert sum(contents.lengths.values()) == 6
    assert [name for name, _ in contents.samples] == ["example 0", "example 3"]
    assert "the basalt is a rock" in contents.samples[1][1]
    assert inspect(pair[0].parent, None, 0).sources == contents.sources
    by_index = inspect(pair[0] / "tokens.idx", None, 1)
    assert by_index.lengths == contents.lengths and by_index.samples[0][1].split()[0] == "1"


def test_documents_and_samples_are_looked_into(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    texts = ["石英。长石。" * size for size in range(1, 40)]
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts) + "{\n")
    contents = inspect(file, None, 3, "body")
    assert contents.sources[str(file)] == (39, sum(map(len, texts)))
    assert len(contents.samples) == 3 and contents.samples[0][1] == texts[0]
    assert "in.jsonl:40" in contents.facts["broken records"]
    run(
        {
            "sources": [{"path": str(file), "text": "body", "language": "chinese"}],
            "steps": ["filter", "split"],
            "tokenizer": str(tokenizer.path),
            "output_dir": str(tmp_path / "out"),
            "max_bad": 1,
            "split": {"length": 64},
        }
    )
    assert sum(number for number, _ in inspect(tmp_path / "out/filter", None, 1).sources.values()) == 39
    samples = inspect(tmp_path / "out/split", None, 1)
    assert samples.what == "samples" and max(samples.lengths) <= 64 and "石英。长石。" in samples.samples[0][1]


def test_lengths_are_in_ranges_that_double() -> None:
    from collections import Counter

    from jaxlm.data.prepare.inspect import Contents

    lengths = Counter({0: 1, 1: 2, 3: 4, 5000: 7})
    contents = Contents("documents", "characters", {}, {}, lengths, [])
    assert contents.histogram()[-1] == (4096, 8191, 7)
    assert sum(number for _, _, number in contents.histogram()) == 14
    assert contents.histogram(3)[0][2] == 7 and len(contents.histogram(3)) == 3
    assert Contents("documents", "characters", {}, {}, Counter(), []).histogram() == []


def test_the_commands(pair: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    assert main(["inspect", str(pair[0]), "--png", str(tmp_path / "lengths.png")]) == 0
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "trained tokens: " in output and "examples" in output and "example 0" in output
    assert main(["merge", str(tmp_path / "m"), *map(str, pair)]) == 0
    assert main(["drop", str(tmp_path / "m"), str(tmp_path / "d"), "--source", "c"]) == 0
    assert "9 examples of 9 documents" in capsys.readouterr().out
    assert main(["drop", str(tmp_path / "m"), str(tmp_path / "d"), "--source", "c"]) == 2
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
