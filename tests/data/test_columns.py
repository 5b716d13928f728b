"""What of a record is read, what is named as not used, and what is not a text."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

import pytest

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data.examples import build_examples, split_off
from jaxlm.data.records import Record, read_records
from jaxlm.data.templates import explain_choice, load_template
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer, load_tokenizer

ALPACA = {"instruction": "what", "input": "", "output": "rock", "text": "Below is …\nrock"}
ASKED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def rendered(tokenizer: Tokenizer, template: str, data: dict[str, Any], **columns: str) -> str:
    return load_template(template, tokenizer, columns).render(Record("f:1", data)).text("$")


def report_of(path: Path, tokenizer: Tokenizer, records: Any, **source: Any) -> Any:
    (path / "data.json").write_text(json.dumps(records))
    config = DataConfig(train=(SourceConfig(path=str(path / "data.json"), **source),))
    _, (report,) = build_examples(config.train, config, tokenizer, tokenizer.vocab_size)
    return report


def test_a_system_column_is_the_system_message(tokenizer: Tokenizer, chat_tokenizer: Tokenizer) -> None:
    data = {"system": "Be brief.", "conversations": ASKED}
    assert rendered(tokenizer, "vicuna_v1.1", data) == "Be brief. USER: q ASSISTANT: a$"
    assert "system<|end|>\n\nBe brief.<|eot_id|>" in rendered(chat_tokenizer, "chat", data)
    for nothing in (None, "", "  "):
        assert "Be brief" not in rendered(tokenizer, "vicuna_v1.1", data | {"system": nothing})
    own = [{"from": "system", "value": "Be brief."}, *ASKED]
    assert rendered(tokenizer, "vicuna_v1.1", data | {"conversations": own}) == "Be brief. USER: q ASSISTANT: a$"
    with pytest.raises(UserError, match="f:1: the column 'system' and the first message are two different system"):
        rendered(tokenizer, "vicuna_v1.1", {"system": "Be long.", "conversations": own})
    named = {"sys": "Be brief.", "conversations": ASKED}
    assert rendered(tokenizer, "vicuna_v1.1", named, system="sys").startswith("Be brief.")


def test_history_and_system_of_alpaca_records_are_earlier_turns(tokenizer: Tokenizer) -> None:
    data = ALPACA | {"system": "Be brief.", "history": [["q1", "a1"], ["q2", "a2"]]}
    expected = "Be brief. USER: q1 ASSISTANT: a1$USER: q2 ASSISTANT: a2$USER: what ASSISTANT: rock$"
    assert rendered(tokenizer, "vicuna_v1.1", data) == expected
    with pytest.raises(UserError, match=r"entry 1 of column 'history' must be \[question, answer\]"):
        rendered(tokenizer, "vicuna_v1.1", data | {"history": [["q1"]]})
    # A record that has them takes a template that shows them.
    records = [Record("f:1", ALPACA), Record("f:2", data)]
    name, why = explain_choice(records, tokenizer)
    assert name == "vicuna_v1.1" and "'history' and 'system'" in why


def test_auto_takes_question_and_answer_before_a_rendered_text(
    tokenizer: Tokenizer, chat_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    name, why = explain_choice([Record("f:1", ALPACA)], chat_tokenizer)
    assert name == "alpaca" and why == "columns 'instruction' and 'output'; column 'text' is not used"
    report = report_of(tmp_path, tokenizer, [ALPACA])
    assert f"(alpaca: {why})" in report.line() and report.unused == {"text": 1}
    assert explain_choice([Record("f:1", {"messages": ASKED, "text": "x"})], chat_tokenizer)[0] == "chat"
    assert explain_choice([Record("f:1", {"instruction": "what", "text": "x"})], tokenizer)[0] == "text"
    half = {"text": None, "instruction": "what", "output": "rock"}
    assert explain_choice([Record("f:1", half)], tokenizer)[0] == "alpaca"


def test_columns_that_hold_something_and_are_not_used(
    tokenizer: Tokenizer, chat_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    records = [
        ALPACA | {"id": 1, "history": [["a", "b"]], "note": None, "weight": 0},
        ALPACA | {"note": "", "history": []},
    ]
    report = report_of(tmp_path, tokenizer, records, template="alpaca")
    assert report.unused == {"text": 2, "id": 1, "history": 1, "weight": 1}
    first, second = report.remarks()
    assert "are not used: text (2), id (1), history (1), weight (1)" in first
    assert "the template alpaca has no place for history; chat and vicuna_v1.1 read" in second
    talk = [
        {"role": "user", "content": "q", "name": "Ada"},
        {"role": "assistant", "content": "a", "reasoning_content": "r"},
    ]
    data = {"messages": talk, "tools": [{"name": "x"}], "source": "web"}
    for template in ("vicuna_v1.1", "chat"):
        report = report_of(tmp_path, chat_tokenizer, [data], template=template)
        assert report.unused == {"tools": 1, "source": 1, "messages[].name": 1, "messages[].reasoning_content": 1}
    assert report_of(tmp_path, tokenizer, [{"text": "a rock"}]).remarks() == []


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (True, "has True in column 'output'"),
        ([1], "has a list in column 'output'"),
        ({"a": 1}, "has a dict in column 'output'"),
        (b"\xff", "has a bytes in column 'output'"),
        (math.inf, "has inf in column 'output'"),
        (datetime.timedelta(1), "has a timedelta in column 'output'"),
        (None, r"its column 'output' is null.*fill it in, or leave the record out"),
    ],
)
def test_what_is_not_a_text_is_refused_by_its_column(tokenizer: Tokenizer, value: Any, found: str) -> None:
    data = {"instruction": "what", "output": value}
    for template in ("alpaca", "vicuna_v1.1"):
        with pytest.raises(UserError, match=f"f:1.*{found}"):
            rendered(tokenizer, template, data)


def test_numbers_and_dates_are_written_out(tokenizer: Tokenizer) -> None:
    for value, text in ((3, "3"), (2.5, "2.5"), (datetime.date(2026, 1, 2), "2026-01-02")):
        assert rendered(tokenizer, "alpaca_short", {"instruction": "q", "output": value}).endswith(f"{text}$")


def test_a_null_input_is_empty(tokenizer: Tokenizer) -> None:
    data = {"question": "q", "context": None, "answer": "a"}
    columns = {"instruction": "question", "input": "context", "output": "answer"}
    expected = "### Instruction:\nq\n\n### Response:\na$"
    assert rendered(tokenizer, "alpaca_short", data, **columns) == expected
    with pytest.raises(UserError, match="has no column 'contxt'"):
        rendered(tokenizer, "alpaca_short", data, **columns | {"input": "contxt"})


def test_contents_in_parts_are_joined(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "rock"}]
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": parts}]
    assert rendered(tokenizer, "scimind", {"messages": talk}) == " [INST]: q [/INST]: a rock$"
    talk[0]["content"] = [{"type": "image_url"}]
    with pytest.raises(UserError, match="message 1 has a part of type 'image_url'"):
        rendered(tokenizer, "scimind", {"messages": talk})


def test_bytes_are_text_and_nan_is_null_in_parquet(tokenizer: Tokenizer, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "a.parquet"
    talk = [[{"role": b"user", "content": "q"}], [{"role": b"user", "content": None}]]
    pq.write_table(pa.table({"text": ["Größe".encode(), b"x"], "n": [math.nan, 1.0], "talk": talk}), file)
    records = list(read_records(SourceConfig(path=str(file))))
    assert records[0].data == {"text": "Größe", "n": None, "talk": [{"role": "user", "content": "q"}]}
    pq.write_table(pa.table({"text": [b"x", b"\xff\x00"]}), file)
    with pytest.raises(UserError, match=r"a\.parquet:2: column 'text' holds bytes that are not UTF-8"):
        list(read_records(SourceConfig(path=str(file))))
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), file)
    with pytest.raises(UserError, match="two columns of the name 'text'"):
        list(read_records(SourceConfig(path=str(file))))
    (tmp_path / "b.jsonl").write_text('{"text": NaN, "a": [NaN, 1]}\n')
    (record,) = read_records(SourceConfig(path=str(tmp_path / "b.jsonl")))
    assert record.data == {"text": None, "a": [None, 1]}


def test_empty_answers_are_counted_and_warned_of(tokenizer: Tokenizer, tmp_path: Path) -> None:
    empty = [{"instruction": "q", "output": " "}] * 3
    report = report_of(tmp_path, tokenizer, empty, template="alpaca")
    assert report.empty == 3 and "3 records have an empty answer" in report.line()
    assert "warning" in report.remarks()[0] and "every answer is empty" in report.remarks()[0]
    full = [{"instruction": "q", "output": "a"}]
    report = report_of(tmp_path, tokenizer, [*empty, *full * 9], template="vicuna_v1.1")
    assert "3 of 12 answers are empty" in report.remarks()[0]
    report = report_of(tmp_path, tokenizer, [*empty, *full * 90], template="alpaca")
    assert report.empty == 3 and report.remarks() == []


def test_a_share_is_split_off(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([{"text": f"rock {i}"} for i in range(20)]))
    config = DataConfig(train=(SourceConfig(path=str(tmp_path / "data.json")),))
    examples, _ = build_examples(config.train, config, tokenizer, tokenizer.vocab_size)
    for share, count in ((0.1, 2), (0.5, 10), (0.001, 1), (3, 3)):
        rest, held_out = split_off(examples, share, seed=0)
        assert (len(rest), len(held_out)) == (20 - count, count)
    with pytest.raises(UserError, match=r"only 20 records; choose a smaller number, or a share.*validation: 0\.1"):
        split_off(examples, 2000, seed=0)


def test_a_column_for_which_the_template_has_no_place_is_named(tokenizer: Tokenizer) -> None:
    for template, field in (("alpaca", "system"), ("text", "history"), ("vicuna_v1.1", "tools")):
        with pytest.raises(UserError, match=f"columns names the field '{field}'; a template's fields are"):
            load_template(template, tokenizer, {field: "x"})


def test_a_conversation_may_be_json_text(tokenizer: Tokenizer) -> None:
    """As CSV has it."""
    data = {"conversations": ASKED}
    assert rendered(tokenizer, "vicuna_v1.1", {"conversations": json.dumps(ASKED)}) == rendered(
        tokenizer, "vicuna_v1.1", data
    )


def test_a_history_that_says_nothing_is_left_out(tokenizer: Tokenizer) -> None:
    alone = rendered(tokenizer, "vicuna_v1.1", ALPACA)
    for pair in (["", ""], [None, None], ["", None]):
        assert rendered(tokenizer, "vicuna_v1.1", ALPACA | {"history": [pair]}) == alone
    with pytest.raises(UserError, match="f:1 has null in entry 1 of column 'history'"):
        rendered(tokenizer, "vicuna_v1.1", ALPACA | {"history": [["q", None]]})


@pytest.mark.parametrize("instruction", ["", " ", None])
def test_auto_takes_alpaca_where_every_instruction_is_empty(tokenizer: Tokenizer, instruction: str | None) -> None:
    record = Record("f:1", {"instruction": instruction, "output": "rock"})
    assert explain_choice([record], tokenizer)[0] == "alpaca"


def test_a_source_with_no_answer_to_train_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    turns = [ASKED[0], ASKED[1] | {"weight": 0}]
    with pytest.raises(
        UserError, match=r"no record with anything to learn .*weight: 0 or train: false stands on every"
    ):
        report_of(tmp_path, tokenizer, [{"conversations": turns}])


CALL = {"type": "function", "function": {"name": "weigh", "arguments": {}}}


def test_tool_calls_are_refused_where_the_chat_template_has_no_place_for_them(chat_tokenizer: Tokenizer) -> None:
    """`content | trim` writes None where there is no content: nothing to learn."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    with pytest.raises(UserError, match=r"f:1: message 2 has no text but tool_calls, and the chat template of .* does"):
        rendered(chat_tokenizer, "chat", {"messages": turns})


def _with_template(tokenizer: Tokenizer, path: Path, template: str) -> Tokenizer:
    (path / "tokenizer.json").write_bytes((tokenizer.path / "tokenizer.json").read_bytes())
    config = {"bos_token": "<|begin|>", "eos_token": "<|eot_id|>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(path)


def test_messages_that_the_chat_template_leaves_out_are_counted(chat_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As Mistral's, which writes the system message only where a question comes last."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[{% if loop.last and messages[0].role == 'system' %}"
        "{{ messages[0].content }} {% endif %}{{ m.content }}]{% elif m.role == 'assistant' %} {{ m.content }}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = _with_template(chat_tokenizer, tmp_path, template)
    records = [{"conversations": ASKED}, {"conversations": ASKED, "system": "Be brief."}]
    (remark,) = report_of(tmp_path, tokenizer, records, template="chat").remarks()
    assert "the chat template changes or leaves out system messages in 1 records" in remark
    assert report_of(tmp_path, chat_tokenizer, records, template="chat").remarks() == []


@pytest.mark.parametrize("fault", ["{{ raise_exception('no system') }}", "{{ 'a' + none }}"])
def test_a_chat_template_that_refuses_names_the_record(chat_tokenizer: Tokenizer, tmp_path: Path, fault: str) -> None:
    tokenizer = _with_template(chat_tokenizer, tmp_path, fault)
    template = load_template("chat", tokenizer)
    for render in (template.render, template.render_prompt):
        with pytest.raises(UserError, match=r"^data: f:7: .*: the chat template (does not accept|fails on) this"):
            render(Record("f:7", {"conversations": ASKED}))
