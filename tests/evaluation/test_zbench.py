"""Z-Bench: tables to the byte, ratings, and a judge that is asked once."""

from __future__ import annotations

import csv
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.errors import UserError
from jaxlm.evaluation.judge import Judge
from jaxlm.evaluation.metrics import zbench
from jaxlm.evaluation.registry import get_task
from jaxlm.evaluation.task import Answer, Answers, Question
from tests.evaluation.tasks import read, requested, text_answers, values

SAMPLES = Path(__file__).parents[2] / "../shared/data"
TASK = get_task("zbench")
TABLE = (
    "\ufeff编号,Prompt,GPT 答案评分,GPT,参考回答,任务类型\r\n"
    '1,"几点, ""现在""？",正确,"五点\n整",五点,常识\r\n'
    "2,一加一,错误,三,,数学\r\n"
)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode())
    return path


# --- tables -----------------------------------------------------------------------------------------------------------

CELL = st.text(alphabet='a,"\n 中', max_size=5)


@given(st.lists(st.lists(CELL, min_size=3, max_size=3), min_size=2, max_size=4), st.sampled_from(["\n", "\r\n"]))
def test_tables_against_pythons_csv(tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], end: str) -> None:
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator=end).writerows(rows)
    path = tmp_path_factory.mktemp("csv") / "table.csv"
    path.write_bytes(stream.getvalue().encode())
    lines = zbench.read_lines(path)
    assert [line.values() for line in lines] == rows
    assert "".join(line.text() for line in lines) == stream.getvalue()
    column = ["name", *('x,"y' for _ in rows[1:])]
    added = zbench.with_columns(lines[0], lines[1:], [("name", column[1:])], 1).decode()
    expected = [[row[0], new, *row[1:]] for row, new in zip(rows, column, strict=True)]
    assert list(csv.reader(io.StringIO(added, newline=""))) == (expected if "name" not in rows[0] else rows)


@pytest.mark.parametrize("name", ["zbench_chinese_eval_basic.csv", "golden/zbench_common_head.csv"])
def test_published_tables_stay_as_they_are(name: str) -> None:
    """Every byte but the new cells: mark, ends of lines, quotation marks."""
    path = SAMPLES / name
    if not path.is_file():
        pytest.skip(f"{name} is not here")
    records, options = read(TASK, path)
    lines = zbench.read_lines(path)
    assert "".join(line.text() for line in lines).encode() == path.read_bytes()
    content = TASK.files(records, text_answers(["答"] * len(records)), options)["zbench.csv"]  # type: ignore[misc]
    new = list(csv.reader(io.StringIO(content.decode(), newline="")))
    old = list(csv.reader(io.StringIO(path.read_bytes().decode(), newline="")))
    place = -4 if "basic" in name else -2
    assert [row[place : place + 2 or None] for row in new] == [
        ["jaxlm 答案评分", "jaxlm"],
        *([["", "答"]] * len(records)),
    ]
    for row in new:
        del row[place : place + 2 or None]
    assert new == old
    if "basic" in name:
        figures = values(TASK.score(records, text_answers([""] * 63), options))
        assert figures == pytest.approx(
            {"people: GPT - 3.5": 60 / 63, "people: GPT - 4": 61 / 63, "people: 文心一言": 27 / 63, "answered": 0}
        )
        # In this file only the new cells differ: take them out, and the bytes are the old ones.
        without = content.decode().replace("jaxlm 答案评分,jaxlm,", "").replace(",,答,", ",")
        assert without.encode() == path.read_bytes()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "not a table of Z-Bench"),
        ("id,question,answer,kind\n1,x,y,z\n", "found id, question, answer, kind"),
        ("编号,Prompt,参考回答,任务类型\n", "holds no question"),
        ("编号,Prompt,参考回答,任务类型\n1,x,y\n", "row 2 has 3 cells, the header 4"),
        ('编号,Prompt,参考回答,任务类型\n1,"x"y,z,a\n', "row 2: a quotation mark"),
        ('编号,Prompt,参考回答,任务类型\n1,x,z,"a\n', "row 2: a quotation mark"),
    ],
)
def test_other_tables_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(TASK, written(tmp_path, text))


def test_a_table_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes("编号,Prompt".encode("gbk"))
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        read(TASK, path)


def test_empty_lines_and_a_missing_last_end(tmp_path: Path) -> None:
    text = "Prompt,任务类型,参考回答\r\n\r\n谁,`问`,你\r\n\r\n他,`问`,"
    records, options = read(TASK, written(tmp_path, text))
    assert [(record["prompt"], record["type"], record["reference"]) for record in records] == [
        ("谁", "`问`", "你"),
        ("他", "`问`", ""),
    ]
    content = TASK.files(records, text_answers(["甲", "乙"]), options)["zbench.csv"]  # type: ignore[misc]
    assert content.decode() == (
        "Prompt,任务类型,参考回答,jaxlm 答案评分,jaxlm\r\n\r\n谁,`问`,你,,甲\r\n\r\n他,`问`,,,乙"
    )


# --- the task ---------------------------------------------------------------------------------------------------------


def test_questions(tmp_path: Path) -> None:
    records, options = read(TASK, written(tmp_path, TABLE), max_new_tokens=9)
    assert [record["id"] for record in records] == ["1", "2"]
    first = requested(TASK, records, options)[0]
    assert first.context == Question('几点, "现在"？') and first.settings.max_new_tokens == 9  # type: ignore[attr-defined]
    published = requested(TASK, records, TASK.options(as_published=True))[1]
    assert published.context == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "        ### Instruction:\n        一加一\n\n        ### Response:"
    )
    assert published.settings.num_beams == 4  # type: ignore[attr-defined]
    assert TASK.check({"prompt": "x"}, options) == "has no 'reference'"
    assert TASK.check(records[0] | {"prompt": " "}, options) == "has an empty question"


def test_people_rate_and_score_again(tmp_path: Path) -> None:
    records, options = read(TASK, written(tmp_path, TABLE))
    answers = text_answers(["五点。", "二，\n对吗"])
    content = TASK.files(records, answers, options)["zbench.csv"].decode()  # type: ignore[misc]
    assert content == TABLE.replace("GPT,参", "GPT,jaxlm 答案评分,jaxlm,参").replace('整",', '整",,五点。,').replace(
        "三,,", '三,,"二，\n对吗",,'
    )
    filled = content.replace('整",,', '整",正确,').replace("三,,", "三,错误,")
    rated, _ = read(TASK, written(tmp_path, filled))
    figures = values(TASK.score(rated, answers, options))
    assert figures == pytest.approx({"people: GPT": 0.5, "people: jaxlm": 0.5, "answered": 1})
    # The same answers keep their ratings; another answer loses its.
    assert TASK.files(rated, answers, options)["zbench.csv"].decode() == filled  # type: ignore[misc]
    other = TASK.files(rated, text_answers(["六点", "二，\n对吗"]), options)["zbench.csv"].decode()  # type: ignore[misc]
    assert other == filled.replace("正确,五点。", ",六点")
    # Records of a file of predictions have lists.
    again = json.loads(json.dumps(rated))
    assert TASK.check(again[0], options) is None
    assert TASK.files(again, answers, options)["zbench.csv"].decode() == filled  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("正确", True), ("“正确”。", True), ("错误", False), ("不正确", False), ("", None), ("我认为正确", None)],
)
def test_verdicts(text: str, expected: bool | None) -> None:
    assert zbench.verdict(text) is expected


# --- the judge --------------------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[Any]]]:
    """An endpoint that finds answers right that the reference contains; it fails on the word 断."""
    pytest.importorskip("openai")
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            prompt = body["messages"][0]["content"]
            answer = prompt.split("系统的回答：\n")[1].strip()
            reference = prompt.split("参考回答：\n")[1].split("\n\n")[0]
            status = 400 if answer == "断" else 200
            message = {"role": "assistant", "content": "正确" if answer in reference else "错误"}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": []}
            reply["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
            content = json.dumps(reply if status == 200 else {"error": {"message": "no"}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    server.server_close()


def test_a_judge_is_asked_once(tmp_path: Path, endpoint: tuple[str, list[Any]]) -> None:
    url, asked = endpoint
    verdicts = tmp_path / "verdicts.jsonl"
    table = written(tmp_path, TABLE)
    records, options = read(TASK, table, judge=url, judge_model="m", judge_verdicts=str(verdicts))
    answers: list[Answers] = [*text_answers(["五点"]), {"answer": Answer(error="too long")}]
    figures = TASK.score(records, answers, options)
    assert figures["judge m: jaxlm"].values == {0: 1.0, 1: 0.0} and len(asked) == 1  # an empty answer is wrong anyway
    assert asked[0]["model"] == "m" and asked[0]["temperature"] == 0
    content = TASK.files(records, answers, options)["zbench.csv"].decode()  # type: ignore[misc]
    assert "jaxlm 评分：m（非 Z-Bench）" in content and "五点,正确,五点,常识" in content
    assert "not Z-Bench's" in TASK.details(records, answers, figures, options)  # type: ignore[misc]
    rated = {"people: GPT", "judge m: jaxlm", "answered"}
    # A line that was cut off is asked again; all others are kept.
    with verdicts.open("a") as file:
        file.write('{"key": "x')
    assert set(TASK.score(records, answers, options)) == rated and len(asked) == 1
    assert set(TASK.score(records, text_answers(["五点", "三"]), options)) == rated and len(asked) == 2
    assert len(verdicts.read_text().splitlines()) == 2


def test_a_judge_that_fails_loses_nothing(tmp_path: Path, endpoint: tuple[str, list[Any]]) -> None:
    url, _ = endpoint
    verdicts = tmp_path / "verdicts.jsonl"
    judge = Judge(url, "m", verdicts)
    prompts = [f"参考回答：\n甲\n\n系统的回答：\n{answer}" for answer in ("甲", "断", "乙")]
    with pytest.raises(UserError, match=r"did not answer .* the same command goes on"):
        judge.ask(prompts)
    assert len(verdicts.read_text().splitlines()) == 1
    verdicts.write_text("a table\n")
    with pytest.raises(UserError, match="is not a file of verdicts"):
        judge.ask(prompts)


def test_a_judge_needs_a_model_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"options.judge_model: name"):
        read(TASK, written(tmp_path, TABLE), judge="http://localhost:1/v1")
    with pytest.raises(UserError, match=r"options.judge_verdicts: name"):
        read(TASK, written(tmp_path, TABLE), judge="http://localhost:1/v1", judge_model="m")
