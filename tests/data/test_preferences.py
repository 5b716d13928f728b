"""Pairs and labelled answers, in the layouts of TRL, LLaMA-Factory and hh-rlhf."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data.loader import Data, build_data
from jaxlm.data.preview import TEXTS, preview
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer

ASK, GOOD, BAD = "what is granite", "a rock of quartz", "melt in a rock"


def says(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def data(folder: Path, records: list[dict[str, Any]], tokenizer: Tokenizer, kind: str = "pairs", **keys: Any) -> Data:
    (folder / "data.json").write_text(json.dumps(records))
    source = SourceConfig(
        path=str(folder / "data.json"), **{k: keys.pop(k) for k in ("template", "columns") if k in keys}
    )
    config = DataConfig(train=(source,), records=kind, **({"sequence_length": 128} | keys))  # type: ignore[arg-type]
    return build_data(config, tokenizer, seed=1, vocab_size=1000, max_positions=128)


def texts(made: Data, tokenizer: Tokenizer, number: int = 0) -> list[tuple[str, str]]:
    """(what is not trained, what is) of each text of an example."""
    example, parts, start = made.train[number], [], 0
    ends = [*(np.flatnonzero(example.loss_mask[:-1] & ~example.loss_mask[1:]) + 1), len(example.input_ids)]
    for end in ends:
        ids, mask = example.input_ids[start:end], example.loss_mask[start:end]
        parts.append(tuple(tokenizer.decode(ids[each].tolist(), skip_special=False) for each in (~mask, mask)))
        start = end
    return parts


QUESTION, ANSWERS = [says("user", ASK)], [[says("assistant", GOOD)], [says("assistant", BAD)]]
CONVERSATIONS = [
    dict(prompt=QUESTION, chosen=ANSWERS[0], rejected=ANSWERS[1]),  # TRL
    dict(chosen=QUESTION + ANSWERS[0], rejected=QUESTION + ANSWERS[1]),  # TRL, the prompt not told apart
    dict(  # LLaMA-Factory
        conversations=[{"from": "human", "value": ASK}],
        chosen={"from": "gpt", "value": GOOD},
        rejected={"from": "gpt", "value": BAD},
    ),
    dict(prompt=ASK, chosen=GOOD, rejected=BAD),
]


@pytest.mark.parametrize("record", CONVERSATIONS, ids=["explicit", "implicit", "llama-factory", "texts"])
def test_conversations_are_the_same_pair_in_every_layout(
    record: dict[str, Any], chat_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    made = data(tmp_path, [record], chat_tokenizer, template="chat")
    prompt = f"<|begin|><|start|>user<|end|>\n\n{ASK}<|eot_id|><|start|>assistant<|end|>\n\n"
    assert texts(made, chat_tokenizer) == [(prompt, f"{GOOD}<|eot_id|>"), (prompt, f"{BAD}<|eot_id|>")]


def test_texts_stand_as_they_are_and_the_prompt_is_what_both_begin_with(tokenizer: Tokenizer, tmp_path: Path) -> None:
    dialogue = f"\n\nHuman: {ASK}\n\nAssistant:"
    records = [
        dict(prompt=f"{ASK}:", chosen=f" {GOOD}", rejected=f" {BAD}"),
        dict(chosen=f"{ASK}: {GOOD}", rejected=f"{ASK}: {BAD}"),
        dict(chosen=f"{dialogue} a rock", rejected=f"{dialogue} a melt"),  # hh-rlhf: the answers begin alike
    ]
    made = data(tmp_path, records, tokenizer)
    assert texts(made, tokenizer) == texts(made, tokenizer, 1)
    assert texts(made, tokenizer) == [(f"<s>{ASK}:", f"{GOOD}</s>"), (f"<s>{ASK}:", f"{BAD}</s>")]
    assert [trained for _, trained in texts(made, tokenizer, 2)] == ["a rock</s>", "a melt</s>"]
    assert made.report.train[0].template == "text"


def test_an_instruction_beside_two_answers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    record = dict(instruction=ASK, input="", chosen=GOOD, rejected=BAD)
    made = data(tmp_path, [record], tokenizer, template="alpaca_short")
    (asked, good), (again, bad) = texts(made, tokenizer)
    assert asked == again and ASK in asked and (good, bad) == (f"{GOOD}</s>", f"{BAD}</s>")


def test_labelled_answers_go_with_the_prompt_of_another(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [
        dict(prompt="what ", completion=GOOD, label=True),
        dict(prompt="why ", completion=BAD, label=False),
    ]
    made = data(tmp_path, records, tokenizer, "labelled")
    assert [part[1] for part in texts(made, tokenizer)] == [f"{GOOD}</s>", f"{BAD}</s>"]
    unwanted = texts(made, tokenizer, 1)
    assert [part[1] for part in unwanted] == [f"{BAD}</s>", f"{GOOD}</s>", ""]
    assert unwanted[0][0] == unwanted[1][0] == "<s>why"


def test_equal_and_long_pairs_are_counted_and_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [
        dict(prompt="what ", chosen=GOOD, rejected=BAD),
        dict(prompt="what ", chosen=GOOD, rejected=GOOD),
        dict(prompt="what ", chosen="quartz " * 40, rejected=BAD),
    ]
    made = data(tmp_path, records, tokenizer, sequence_length=40)
    report = made.report.train[0]
    assert (len(made.train), report.records, report.dropped_equal, report.dropped_too_long) == (1, 3, 1, 1)
    assert "1 pairs of equal answers left out" in report.line()
    with pytest.raises(UserError, match=r"data.json:3 has \d+ tokens in both of its texts.*too_long: drop"):
        data(tmp_path, records, tokenizer, sequence_length=40, too_long="error")


@pytest.mark.parametrize(
    ("record", "kind", "message"),
    [
        (dict(prompt="a", chosen=GOOD), "pairs", "data.json:1: its column 'rejected' must be an answer.*found None"),
        (dict(chosen="up", rejected="down"), "pairs", "data.json:1: has no prompt"),
        (
            dict(prompt="a", completion=GOOD, label="yes"),
            "labelled",
            "'label' must be true .wanted. or false, found 'yes'",
        ),
        (dict(prompt="a", completion=GOOD), "labelled", "'label' must be true .wanted. or false, found None"),
        (
            dict(prompt=QUESTION, chosen=[*ANSWERS[0], *QUESTION], rejected=ANSWERS[1]),
            "pairs",
            "'chosen' has 2 messages",
        ),
    ],
)
def test_a_record_without_a_preference_is_named(
    record: dict[str, Any], kind: str, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        data(tmp_path, [record], tokenizer, kind)


def test_the_preview_says_which_is_chosen(tokenizer: Tokenizer, tmp_path: Path) -> None:
    made = data(tmp_path, [dict(prompt="what", chosen=" rock", rejected=" melt")], tokenizer)
    out = io.StringIO()
    preview(made.train_batches(1)[0], tokenizer, Console(file=out, width=90), texts=TEXTS["pairs"])
    assert "chosen:\n<s>what⟦ rock</s>⟧\nrejected:\n<s>what⟦ melt</s>⟧" in out.getvalue()
