"""Two streams: what an encoder reads and what the decoder writes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data.encoding import prompt_ids
from jaxlm.data.loader import Data, build_data
from jaxlm.data.packing import first_fit_pairs
from jaxlm.data.preview import preview
from jaxlm.data.records import Record
from jaxlm.data.templates import load_template
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer, load_tokenizer
from tests.t5 import records, write_tokenizer

TEMPLATE = "alpaca_short"
RECORDS = records(40)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_tokenizer(tmp_path_factory.mktemp("pairs") / "tokenizer")


@pytest.fixture(scope="module")
def t5(theirs: Any) -> Tokenizer:
    return load_tokenizer(theirs.name_or_path)


def data_of(folder: Path, tokenizer: Tokenizer, content: Any = RECORDS, **more: Any) -> Data:
    file = folder / "records.json"
    file.write_text(json.dumps(content))
    values: dict[str, Any] = dict(train=(SourceConfig(path=str(file), template=TEMPLATE),), sequence_length=24) | more
    return build_data(DataConfig(**values), tokenizer, seed=3, vocab_size=64, max_positions=1000, start_id=0)


def prompt_of(record: dict[str, str]) -> str:
    """The prompt as the template of Alpaca's short form writes it."""
    return f"### Instruction:\n{record['instruction']}\n\n### Response:\n"


def test_both_are_tokenised_apart_with_one_eos_each(tmp_path: Path, theirs: Any, t5: Tokenizer) -> None:
    data = data_of(tmp_path, t5, encoder_length=64)
    for number, record in enumerate(RECORDS):
        example = data.train[number]
        assert example.encoder_ids is not None
        assert example.encoder_ids.tolist() == theirs(prompt_of(record)).input_ids
        assert example.input_ids.tolist() == [0, *theirs(record["output"]).input_ids]
        assert example.loss_mask.tolist() == [False] + [True] * (len(example.input_ids) - 1)
        # What is asked later is what was read in training.
        asked = prompt_ids(load_template(TEMPLATE, t5), Record("r", dict(record)), t5, for_encoder=True)
        assert asked == example.encoder_ids.tolist()
    assert data.report.train[0].end_ids == {1}


@pytest.mark.parametrize("packing", [True, False])
def test_rows_hold_pairs_of_which_both_fit(tmp_path: Path, t5: Tokenizer, packing: bool) -> None:
    data = data_of(tmp_path, t5, packing=packing, encoder_length=64)
    batches = data.train_batches(8)
    pairs, shared = [], 0
    for step in range(len(batches)):
        batch = {name: array[0] for name, array in batches[step].items()}
        assert batch["encoder_ids"].shape == (8, 64) and batch["input_ids"].shape == (8, 24)
        for row in range(8):
            ids = batch["segment_ids"][row]
            assert set(ids) == set(batch["encoder_segment_ids"][row]) | {0} if ids.any() else True
            shared += ids.max() > 1
            for number in range(1, ids.max() + 1):
                source = batch["encoder_ids"][row][batch["encoder_segment_ids"][row] == number]
                inside = ids == number
                target = batch["input_ids"][row][inside]
                assert target[0] == 0 and not batch["loss_mask"][row][inside][0]
                pairs.append((source.tolist(), target.tolist()))
    assert (shared > 0) == packing
    wanted = [(data.train[n].encoder_ids.tolist(), data.train[n].input_ids.tolist()) for n in range(len(data.train))]  # type: ignore[union-attr]
    assert sorted(pairs) == sorted(wanted)


def test_first_fit_looks_at_both_lengths() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 12, (300, 2)).tolist()
    rows = first_fit_pairs(lengths, (16, 20), window=4)
    assert sorted(index for row in rows for index in row) == list(range(300))
    for row in rows:
        assert sum(lengths[index][0] for index in row) <= 16 and sum(lengths[index][1] for index in row) <= 20
    assert len(rows) < 200
    # The first row has room for the target of the third pair, but not for its source.
    assert first_fit_pairs([(5, 5), (5, 4), (5, 2)], (16, 10)) == [[0, 1], [2]]


def test_what_is_too_long_is_cut_on_its_own_side(tmp_path: Path, t5: Tokenizer) -> None:
    data = data_of(tmp_path, t5, sequence_length=6, encoder_length=16)
    whole = data_of(tmp_path, t5, sequence_length=64, encoder_length=64).train
    for number in range(len(data.train)):
        cut, full = data.train[number], whole[number]
        assert cut.encoder_ids is not None and full.encoder_ids is not None
        assert cut.input_ids.tolist() == full.input_ids[:6].tolist()
        assert cut.encoder_ids.tolist() == [*full.encoder_ids[:15].tolist(), 1]
    assert data.report.train[0].truncated == len(RECORDS)
    with pytest.raises(UserError, match=r"a question of \d+ tokens, data.encoder_length is 16"):
        data_of(tmp_path, t5, encoder_length=16, too_long="error")
    with pytest.raises(UserError, match="no record with anything to learn"):
        data_of(tmp_path, t5, encoder_length=16, too_long="drop")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"packing": "group_texts"}, "data.packing: group_texts is not supported with an encoder"),
        ({"too_long": "split"}, "data.too_long: split is not supported with an encoder"),
        ({"train_on_inputs": True}, "data.train_on_inputs: true is not supported with an encoder"),
    ],
)
def test_settings_for_one_stream_are_refused(tmp_path: Path, t5: Tokenizer, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        data_of(tmp_path, t5, **more)


def test_a_document_is_no_pair(tmp_path: Path, t5: Tokenizer) -> None:
    (tmp_path / "texts.json").write_text(json.dumps([{"text": "rock sand"}]))
    source = SourceConfig(path=str(tmp_path / "texts.json"))
    with pytest.raises(UserError, match="template text has no question"):
        data_of(tmp_path, t5, train=(source,))
    with pytest.raises(UserError, match=r"data.encoder_length: the model has no encoder"):
        build_data(
            DataConfig(train=(source,), encoder_length=8), t5, seed=0, vocab_size=64, max_positions=1000, start_id=None
        )


def test_only_the_last_answer_of_a_conversation_is_written(tmp_path: Path, theirs: Any, t5: Tokenizer) -> None:
    turns = [("user", "rock sand"), ("assistant", "iron"), ("user", "zinc salt"), ("assistant", "gas heat")]
    messages = [{"role": role, "content": text} for role, text in turns]
    (tmp_path / "chats.json").write_text(json.dumps([{"messages": messages}]))
    source = SourceConfig(path=str(tmp_path / "chats.json"), template="vicuna_v1.1")
    (example,) = [data_of(tmp_path, t5, train=(source,), encoder_length=900).train[0]]
    assert example.encoder_ids is not None
    assert example.encoder_ids.tolist().count(1) == 1 and example.encoder_ids[-1] == 1
    assert "iron" in t5.decode(example.encoder_ids) and "gas" not in t5.decode(example.encoder_ids)
    assert example.input_ids.tolist() == [0, *theirs("gas heat").input_ids]


def test_the_preview_shows_both(tmp_path: Path, t5: Tokenizer) -> None:
    out = io.StringIO()
    batch = data_of(tmp_path, t5, encoder_length=64).train_batches(8)[0]
    assert preview(batch, t5, Console(file=out, width=200), most=1) == 1
    text = out.getvalue()
    assert "the encoder reads" in text and "⟦" in text
