"""Information extraction: both formats and languages, by hand, and counting in a second way."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.errors import UserError
from jaxlm.evaluation.metrics import ie
from jaxlm.evaluation.metrics.ie import Extracted, Language, parse_json_answer, parse_label, parse_text_answer
from jaxlm.evaluation.metrics.tuples import Counts, count, precision_recall_f1, rounded_per_cent
from jaxlm.evaluation.registry import get_task
from jaxlm.evaluation.task import Answer, Answers, Question
from tests.evaluation.tasks import requested, text_answers, values

SHAPES: list[tuple[ie.Kind, Language, str]] = [
    ("RE", "zh", "{'head': '张三', 'relation': '配偶', 'tail': '李四'}"),
    ("RE", "zh", "头实体是张三,关系是配偶,尾实体是李四"),
    ("RE", "en", "Subject is 张三,Relation is 配偶,Object is 李四"),
    ("RE", "zh", "输入中包含的关系三元组是：\n(张三,配偶,李四)"),
    ("RE", "zh", "配偶：张三,李四"),
    ("RE", "en", "( 张三 , 配偶 , 李四 )(张三,"),  # an answer that was cut off
]


@pytest.mark.parametrize(("kind", "language", "text"), SHAPES)
def test_shapes_of_relations(kind: ie.Kind, language: Language, text: str) -> None:
    assert parse_text_answer(text, "张三和李四结婚", kind, language) == Extracted((("张三", "配偶", "李四"),))


@pytest.mark.parametrize(
    "text",
    [
        "{'entity': 'IBM', 'entity_type': '公司', 'start': 3}{'entity': '张三', 'entity_type': '人物', 'start': 0}",
        "实体是IBM,实体类型是公司\n实体是张三,实体类型是人物",
        "(IBM,公司)(张三,人物)",
        "公司：IBM\n人物：张三\n",
        "(IBM,公司)(NAN,人物)(张三,人物)(x)",
    ],
)
def test_shapes_of_entities(text: str) -> None:
    assert parse_text_answer(text, "", "NER", "zh").tuples == (("IBM", "公司"), ("张三", "人物"))


@pytest.mark.parametrize(
    ("language", "text"),
    [
        (
            "en",
            "{'event_trigger': 'hit', 'event_type': 'Attack', 'arguments': "
            "({'argument': 'Tom', 'role': 'Attacker'}, {'argument': 'NAN', 'role': 'Place'})}",
        ),
        ("en", "Event Trigger is hit,Event Type is Attack\nArgument is Tom,Argument Role is Attacker;NAN"),
        ("zh", "事件触发词是hit,事件类型是Attack\n事件论元是Tom,论元角色是Attacker"),
        ("en", "(hit,Attack,Attacker#Tom;NAN)"),
        ("zh", "Attack：hit\nAttacker：Tom"),
    ],
)
def test_shapes_of_events(language: Language, text: str) -> None:
    expected = Extracted((("Attack", "hit"),), (("Attack", "hit", "Tom", "Attacker"),))
    assert parse_text_answer(text, "", "EE", language) == expected
    assert parse_text_answer(text, "", "EEA", language).arguments == expected.arguments


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("zh", "{'event_trigger': 'a', 'event_type': 'X', 'y': 1}\n{'event_trigger': 'b', 'event_type': 'Y', 'y': 1}"),
        ("zh", "事件触发词是a,事件类型是X\n事件触发词是b,事件类型是Y"),
        ("en", "Event Trigger is a,Event Type is X\nEvent Trigger is b,Event Type is Y"),
        ("zh", "(X,a)(Y,b)"),
        ("en", "X：a\nY：b"),
    ],
)
def test_shapes_of_triggers(language: Language, text: str) -> None:
    assert parse_text_answer(text, "", "EET", language).tuples == (("X", "a"), ("Y", "b"))


def test_a_comma_inside_of_a_head() -> None:
    """The head is the longest beginning that stands in the text; the rest belongs to the tail."""
    source = "张三,李四公司成立于北京"

    def read(text: str) -> tuple[tuple[str, ...], ...]:
        return parse_text_answer(text, source, "RE", "zh").tuples

    assert read("(张三,李四公司,位于,北京)") == (("张三,李四公司", "位于", "北京"),)
    assert read("(张三,位于,北京,上海)") == (("张三", "位于", "北京,上海"),)
    assert read("(张三,李四公司成立于,北京,上海)") == (("张三,李四公司成立于", "北京", "上海"),)
    assert read("(张三,李,四,上海)") == (("张三,李", "四", "上海"),)
    assert read("(张,三,李,四)") == (("张", "三", "李,四"),)
    assert parse_text_answer("(a,b,c,z)", "a,b,c d", "RE", "en").tuples == (("a", "b", "c,z"),)  # nothing else is left
    assert read("(张三,李四公司,成立于)") == (("张三", "李四公司", "成立于"),)
    assert read("位于：张三,李四公司,北京") == (("张三,李四公司", "位于", "北京"),)


@pytest.mark.parametrize(
    "text", ["", "NAN", "nan\n", "No relation found.", "Sorry, I cannot", "The text does not contain it"]
)
def test_answers_that_say_there_is_none(text: str) -> None:
    assert parse_text_answer(text, "", "RE", "en") == Extracted()


def test_answers_of_another_form() -> None:
    assert parse_text_answer("张三的配偶是李四", "", "RE", "zh") == Extracted(is_readable=False)
    for text in ("", "not JSON", "[1]", '"x"', "{" * 100000):
        assert parse_json_answer(text, "RE") == Extracted(is_readable=False)


def test_json_answers() -> None:
    text = json.dumps({"人物": ["张三", 3, "李四"], "地点": "北京", "公司": []})
    assert parse_json_answer(text, "NER").tuples == (("张三", "人物"), ("李四", "人物"))
    pairs = {"配偶": [{"head": "A", "tail": "B"}, {"subject": "C", "object": "D"}, "E", {"head": 1, "tail": "F"}]}
    assert parse_json_answer(json.dumps(pairs), "RE").tuples == (("A", "配偶", "B"), ("C", "配偶", "D"))
    published = parse_json_answer(json.dumps(pairs), "RE", as_published=True)
    assert published.tuples == (("A", "配偶", "B"), ("", "配偶", ""))
    events = {"Attack": [{"trigger": "hit", "arguments": {"Attacker": ["Tom", "NAN"], "Place": "NAN", "Time": "noon"}}]}
    assert parse_json_answer(json.dumps(events), "EE") == Extracted(
        (("Attack", "hit"),), (("Attack", "Tom", "Attacker"), ("Attack", "noon", "Time"))
    )
    assert parse_json_answer(json.dumps(events), "EEA").tuples == (("Attack", ""),)
    assert parse_json_answer('{"Attack": ["hit", {"trigger": "shot"}]}', "EET").tuples == (
        ("Attack", "hit"),
        ("Attack", "shot"),
    )


def test_labels() -> None:
    entity = json.dumps([{"entity": "IBM", "entity_type": "公司"}])
    assert parse_label(entity, "NER").tuples == (("IBM", "公司"),)
    event = [{"event_type": "A", "event_trigger": "t", "arguments": [{"argument": "x", "role": "r"}]}]
    assert parse_label(json.dumps(event), "EE") == Extracted((("A", "t"),), (("A", "x", "r"),))
    assert parse_label("[]", "RE") == Extracted()
    with pytest.raises(UserError, match=r"no 'head', which RE has; found: entity, entity_type"):
        parse_label(entity, "RE")
    with pytest.raises(UserError, match="not JSON"):
        parse_label("(a,b,c)", "RE")


# --- counting ---------------------------------------------------------------------------------------------------------

TUPLES = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz")), max_size=6)


@given(TUPLES, TUPLES, st.booleans())
def test_counting_against_lists(wanted: list[tuple[str, str]], found: list[tuple[str, str]], as_sets: bool) -> None:
    """Each right tuple is struck off when it is found, as the original does it."""
    left, given_ones = (sorted(set(wanted)), sorted(set(found))) if as_sets else (list(wanted), list(found))
    num_wanted, right = len(left), 0
    for each in given_ones:
        if each in left:
            left.remove(each)
            right += 1
    counts = count(wanted, found, as_sets)
    assert counts == (right, len(given_ones), num_wanted)
    precision, recall, f1 = precision_recall_f1(counts)
    assert f1 == pytest.approx(2 * precision * recall / (precision + recall) if right else 0)


def test_rounding_as_published() -> None:
    """F1 from the rounded two: 12.5 and 14.29 give 13.34, the exact figure is 13.33."""
    assert rounded_per_cent(Counts(1, 8, 7)) == (12.5, 14.29, 13.34)
    assert rounded_per_cent(Counts(2, 3, 6)) == (66.67, 33.33, 44.44)
    assert round(100 * precision_recall_f1(Counts(1, 8, 7))[2], 2) == 13.33
    assert rounded_per_cent(Counts()) == precision_recall_f1(Counts()) == (0, 0, 0)


# --- the task ---------------------------------------------------------------------------------------------------------

TASK = get_task("ie")


def new(identity: str, schema: list[str], label: Any, source: str = "s") -> dict[str, Any]:
    instruction = json.dumps({"instruction": "Extract.", "schema": schema, "input": "text"})
    return {"id": identity, "source": source, "instruction": instruction, "label": json.dumps(label)}


TRIPLES = [{"head": "A", "relation": "r", "tail": "B"}, {"head": "A", "relation": "q", "tail": "C"}]
OLD = {"instruction": "抽取", "input": "A和B", "output": "(A,r,B)(A,q,C)"}


def test_answers_about_parts_of_a_schema_are_put_together() -> None:
    records = [new("1", ["r"], TRIPLES), new("1", ["q"], TRIPLES), new("2", ["r"], [], "t")]
    answers = text_answers(['{"r": [{"head": "A", "tail": "B"}]}', '{"q": [{"head": "A", "tail": "D"}]}', "none"])
    figures = values(TASK.score(records, answers, TASK.options()))
    assert figures == pytest.approx(
        {
            "precision": 0.5,
            "recall": 0.5,
            "f1": 0.5,
            "s: precision": 0.5,
            "s: recall": 0.5,
            "s: f1": 0.5,
            "t: precision": 0,
            "t: recall": 0,
            "t: f1": 0,
            "unreadable": 1 / 3,
        }
    )
    published = values(TASK.score(records, answers, TASK.options(as_published=True)))
    assert published["f1"] == 50 and published["unreadable"] == pytest.approx(1 / 3)
    # A resample that has a text twice counts it twice.
    twice = TASK.score(records[:2] * 2, answers[:2] * 2, TASK.options())
    assert twice["recall"].value == 0.5 and twice["recall"].n == 2


def test_events_have_figures_for_arguments() -> None:
    label = [{"event_type": "X", "event_trigger": "t", "arguments": [{"argument": "a", "role": "r"}]}]
    answers = text_answers(['{"X": [{"trigger": "t", "arguments": {"r": ["a", "b"]}}]}'])
    records = [new("1", ["X"], label)]
    figures = values(TASK.score(records, answers, TASK.options(extract="EE")))
    assert figures["event_f1"] == 1 and figures["argument_precision"] == 0.5 and figures["argument_recall"] == 1
    assert set(values(TASK.score(records, answers, TASK.options(extract="EEA")))) == {
        "argument_precision",
        "argument_recall",
        "argument_f1",
        "unreadable",
    }


def test_the_older_format() -> None:
    records = [OLD, OLD | {"kg": [["E", "r", "F"]]}, OLD]
    answers: list[Answers] = [*text_answers(["(A,r,B)(A,r,B)", "(E,r,F)"]), {"answer": Answer(error="too long")}]
    figures = values(TASK.score(records, answers, TASK.options()))
    assert figures["precision"] == pytest.approx(2 / 3) and figures["recall"] == pytest.approx(2 / 5)
    as_set = values(TASK.score(records, answers, TASK.options(match="set")))
    assert as_set["precision"] == 1 and as_set["recall"] == pytest.approx(2 / 5)
    published = values(TASK.score(records, answers, TASK.options(as_published=True)))
    assert published["recall"] == pytest.approx(200 / 3)  # the record without an answer is left out
    content = TASK.files(records, answers, TASK.options())["submission.jsonl"]  # type: ignore[misc]
    lines = [json.loads(line) for line in content.decode().splitlines()]
    assert lines[1]["output"] == "(E,r,F)" and lines[1]["kg"] == [["E", "r", "F"]] and lines[2]["kg"] == []
    assert TASK.files([new("1", [], [])], answers[:1], TASK.options()) == {}  # type: ignore[misc]


def test_questions() -> None:
    older, newer = requested(TASK, [OLD, new("1", ["r"], [])], TASK.options(max_new_tokens=5))
    assert older.context == Question("抽取", "A和B")
    assert newer.context == Question(new("1", ["r"], [])["instruction"])
    assert older.settings.max_new_tokens == 5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"instruction": "x"}, "has no 'input'"),
        (OLD | {"output": "A marries B"}, "the output 'A marries B' has none of the shapes of RE"),
        (OLD | {"kg": [["a", "b"]]}, "kg must be a list of [head, relation, tail]"),
        (new("1", [], [{"entity": "x", "entity_type": "y"}]), "no 'head', which RE has"),
        (new("1", [], []) | {"label": 3}, "'label' is int"),
        ({"question": {"stem": ""}, "answerKey": "A"}, "has no 'instruction'"),
    ],
)
def test_other_records_are_refused(record: dict[str, Any], said: str) -> None:
    assert said in str(TASK.check(record, TASK.options()))
    assert TASK.check(OLD, TASK.options()) is None and TASK.check(new("1", [], TRIPLES), TASK.options()) is None
