"""Data for information extraction: records to instructions and back, by hand, by hypothesis, as evaluation reads."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.cli.prepare import tokenizer_directory
from jaxlm.data.prepare.ie.answers import parse_answer, read_answers
from jaxlm.data.prepare.ie.graph import align, read_graph
from jaxlm.data.prepare.ie.instructions import WORDS, Language, Settings, make_instructions, parts, read_words
from jaxlm.data.prepare.ie.records import Annotated, Entity, Event, Relation, annotated
from jaxlm.data.prepare.ie.schema import TASKS, Task, gather_schema, read_schema
from jaxlm.data.records import Record
from jaxlm.errors import UserError
from jaxlm.evaluation.metrics.ie import parse_json_answer, parse_label
from jaxlm.evaluation.registry import get_task
from jaxlm.prepare import main
from tests.evaluation.tasks import text_answers, values

TEXT = "Etna erupted in 1669 on Sicily; lava reached Catania."
RECORD = {
    "text": TEXT,
    "entity": [{"entity": "Etna", "entity_type": "volcano"}, {"entity": "Catania", "entity_type": "city"}],
    "relation": [
        {"head": "Etna", "head_type": "volcano", "relation": "lies on", "tail": "Sicily", "tail_type": "island"},
        {"head": "lava", "head_type": "rock", "relation": "reached", "tail": "Catania", "tail_type": "city"},
    ],
    "event": [
        {
            "event_type": "eruption",
            "event_trigger": "erupted",
            "arguments": [{"argument": "Etna", "role": "volcano"}, {"argument": "1669", "role": "year"}],
        }
    ],
}
SCHEMA = {
    "entity": ["city", "island", "volcano"],
    "relation": [
        {"subject_type": "volcano", "predicate": "lies on", "object_type": "island"},
        {"subject_type": "rock", "predicate": "reached", "object_type": "city"},
        {"subject_type": "city", "predicate": "lies on", "object_type": "island"},
    ],
    "event": {"eruption": ["year", "volcano", "victims"], "flood": ["river"]},
    "attribute": {"volcano": ["lies on", "height"], "rock": ["reached"], "city": []},
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def file(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def made(task: Task, tmp_path: Path, **options: Any) -> list[dict[str, Any]]:
    schema = read_schema(file(tmp_path / "schema.json", SCHEMA), task)
    record = annotated(Record("f:1", RECORD))
    return list(make_instructions([record], schema, Settings(task=task, **{"schema_size": 0, **options})))


ASKED: dict[Task, tuple[Any, Any]] = {
    "NER": (["city", "island", "volcano"], {"city": ["Catania"], "island": [], "volcano": ["Etna"]}),
    "RE": (
        ["lies on", "reached"],
        {"lies on": [{"subject": "Etna", "object": "Sicily"}], "reached": [{"subject": "lava", "object": "Catania"}]},
    ),
    "SPO": (
        [
            {"subject_type": "city", "predicate": "lies on", "object_type": "island"},
            {"subject_type": "rock", "predicate": "reached", "object_type": "city"},
            {"subject_type": "volcano", "predicate": "lies on", "object_type": "island"},
        ],
        {
            "lies on": [{"subject": "Etna", "subject_type": "volcano", "object": "Sicily", "object_type": "island"}],
            "reached": [{"subject": "lava", "subject_type": "rock", "object": "Catania", "object_type": "city"}],
        },
    ),
    "EE": (
        [
            {"event_type": "eruption", "trigger": True, "arguments": ["year", "volcano", "victims"]},
            {"event_type": "flood", "trigger": True, "arguments": ["river"]},
        ],
        {
            "eruption": [{"trigger": "erupted", "arguments": {"year": "1669", "volcano": "Etna", "victims": "NAN"}}],
            "flood": [],
        },
    ),
    "EET": (["eruption", "flood"], {"eruption": ["erupted"], "flood": []}),
    "EEA": (
        [{"event_type": "eruption", "trigger": ["erupted"], "arguments": ["year", "volcano", "victims"]}],
        {"eruption": [{"trigger": "erupted", "arguments": {"year": "1669", "volcano": "Etna", "victims": "NAN"}}]},
    ),
    "KG": (
        [
            {"entity_type": "city", "attributes": []},
            {"entity_type": "rock", "attributes": ["reached"]},
            {"entity_type": "volcano", "attributes": ["lies on", "height"]},
        ],
        {
            "city": {"Catania": {}},
            "rock": {"lava": {"reached": "Catania"}},
            "volcano": {"Etna": {"lies on": "Sicily"}},
        },
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_an_instruction_of_each_task(task: Task, tmp_path: Path) -> None:
    (line,) = made(task, tmp_path, language="zh" if task == "KG" else "en")
    content = json.loads(line["instruction"])
    assert content == {
        "instruction": WORDS[task, "zh" if task == "KG" else "en"],
        "schema": ASKED[task][0],
        "input": TEXT,
    }
    assert json.loads(line["output"]) == ASKED[task][1]
    assert list(json.loads(line["output"])) == list(dict.fromkeys(_name(entry) for entry in content["schema"]))


def _name(entry: Any) -> str:
    return (
        entry
        if isinstance(entry, str)
        else next(entry[k] for k in ("predicate", "event_type", "entity_type") if k in entry)
    )


def test_ends_of_relations_are_head_and_tail_in_chinese(tmp_path: Path) -> None:
    (line,) = made("RE", tmp_path, language="zh")
    assert json.loads(line["output"])["lies on"] == [{"head": "Etna", "tail": "Sicily"}]


@pytest.mark.parametrize(
    ("number", "size", "lengths"),
    [
        (0, 4, []),
        (3, 4, [3]),
        (8, 4, [4, 4]),
        (9, 4, [4, 5]),
        (10, 4, [4, 4, 2]),
        (5, 0, [5]),
        (7, 6, [7]),
        (9, 6, [6, 3]),
    ],
)
def test_a_long_schema_is_asked_for_in_parts(number: int, size: int, lengths: list[int]) -> None:
    """DeepKE's rule: a rest of at least half a part is a part of its own; vectors by its README's sizes."""
    keys = [(str(each),) for each in range(number)]
    cut = parts(keys, size)
    assert [len(part) for part in cut] == lengths and [key for part in cut for key in part] == keys


def test_negatives_are_a_seeded_share() -> None:
    schema = {(f"type {number:03}",): () for number in range(200)}
    records = [Annotated(f"text {number}", entities=(Entity("a", "type 007"),)) for number in range(10)]
    records.append(Annotated("nothing", entities=()))

    def asked(**options: Any) -> list[list[str]]:
        lines = make_instructions(records, schema, Settings(task="NER", schema_size=0, **options))
        return [json.loads(line["instruction"])["schema"] for line in lines]

    assert all(len(types) == 200 for types in asked())
    some = asked(negatives=0.25, seed=3)
    assert some == asked(negatives=0.25, seed=3) != asked(negatives=0.25, seed=4)
    assert all("type 007" in types and types == sorted(types) for types in some[:10])
    assert 0.2 < sum(len(types) - 1 for types in some[:10]) / (10 * 199) < 0.3
    assert some[0] != some[1]
    assert [len(types) for types in asked(negatives=0.0)] == [1] * 10  # nothing is asked about the last text
    assert len(asked(negatives=1e-9)[10]) == 1  # a text without an instance is asked for at least one
    shuffled = asked(shuffle=True)
    assert sorted(shuffled[0]) == sorted(schema_key for (schema_key,) in schema) and shuffled[0] != asked()[0]
    # A test asks for all, whatever the share.
    assert all(len(types) == 200 for types in asked(split="test", negatives=0.0))


# --- there and back ---------------------------------------------------------------------------------------------------

NAMES = st.text(st.sampled_from("ab|石 \"'{}\\\n,NA"), min_size=1, max_size=4).filter(lambda name: bool(name.strip()))
KEPT = NAMES.filter(lambda name: name != "NAN")
TYPES = st.sampled_from(["x", "y", "z", "类型"])
ARGUMENTS = st.lists(st.tuples(KEPT, TYPES), max_size=4).map(tuple)
ANNOTATED = st.builds(
    Annotated,
    text=NAMES,
    entities=st.lists(st.builds(Entity, NAMES, TYPES), max_size=5).map(tuple),
    relations=st.lists(st.builds(Relation, NAMES, TYPES, KEPT, TYPES, TYPES), max_size=5).map(tuple),
    events=st.lists(st.builds(Event, TYPES, NAMES, ARGUMENTS), max_size=4).map(tuple),
)


def entries(record: Annotated, task: Task) -> Counter[Any]:
    """What must come back for a task."""
    if task == "NER":
        return Counter(record.entities)
    if task == "RE":
        return Counter(dataclasses.replace(each, head_type=None, tail_type=None) for each in record.relations or ())
    if task == "SPO":
        return Counter(record.relations)
    if task == "KG":
        triples = [dataclasses.replace(each, tail_type=None) for each in record.relations or ()]
        heads = {(each.head, each.head_type) for each in triples}
        alone = {each for each in record.entities or () if (each.text, each.type) not in heads}
        return Counter(triples) + Counter(alone)
    # Arguments stand by role; those of one role keep their order.
    return Counter(
        (event.type, event.trigger, () if task == "EET" else tuple(sorted(event.arguments, key=lambda pair: pair[1])))
        for event in record.events or ()
    )


def back_entries(record: Annotated, task: Task) -> Counter[Any]:
    if task in ("EE", "EET", "EEA"):
        return entries(record, task)
    return Counter([*(record.entities or ()), *(record.relations or ())])


@settings(max_examples=30, deadline=None)
@given(st.lists(ANNOTATED, min_size=1, max_size=3), st.sampled_from(["en", "zh"]), st.integers(0, 4), st.booleans())
def test_records_come_back_from_instructions(
    records: list[Annotated], language: Language, size: int, shuffle: bool
) -> None:
    records = [dataclasses.replace(record, id=str(number)) for number, record in enumerate(records)]
    for task in TASKS:
        schema = gather_schema(records, task)
        how = Settings(task=task, language=language, schema_size=size, shuffle=shuffle, negatives=0.5)
        written = [Record(f"f:{n}", line) for n, line in enumerate(make_instructions(records, schema, how), 1)]
        read = {record.id: record for record in read_answers(written)}
        for record in records:
            wanted = entries(record, task)
            returned = back_entries(read[record.id], task) if record.id in read else Counter()
            assert returned == wanted, task
        # As evaluation reads them, by another parser.
        for line in written:
            output = line.data["output"]
            ours = parse_answer(output, task)
            assert ours is not None
            theirs = parse_json_answer(output, task)
            if task == "NER":
                assert [(each.text, each.type) for each in ours] == list(theirs.tuples)  # type: ignore[union-attr]
            elif task in ("RE", "SPO"):
                assert [(each.head, each.relation, each.tail) for each in ours] == list(theirs.tuples)  # type: ignore[union-attr]


@settings(max_examples=30, deadline=None)
@given(st.lists(ANNOTATED, min_size=1, max_size=3), st.integers(0, 4))
def test_right_answers_are_right_to_the_evaluation(records: list[Annotated], size: int) -> None:
    """F1 is 1 where every instruction of the test has its training output as answer."""
    records = [dataclasses.replace(record, id=str(number)) for number, record in enumerate(records)]
    for task in TASKS:
        schema = gather_schema(records, task)
        tests, trains = (
            list(make_instructions(records, schema, Settings(task=task, schema_size=size, split=split)))  # type: ignore[arg-type]
            for split in ("test", "train")
        )
        assert [line["instruction"] for line in tests] == [line["instruction"] for line in trains]
        if not tests:
            continue
        evaluation = get_task("ie")
        options = evaluation.options(extract=task)
        assert all(evaluation.check(line, options) is None for line in tests)
        figures = values(evaluation.score(tests, text_answers([line["output"] for line in trains]), options))
        assert figures["unreadable"] == 0
        if any(parse_label(line["label"], task).tuples for line in tests):
            assert all(value == 1 for name, value in figures.items() if name.endswith("f1") and "argument" not in name)
        if any(parse_label(line["label"], task).arguments for line in tests):
            assert figures["argument_f1"] == 1


def test_answers_of_models() -> None:
    def line(number: int, output: str, schema: list[str], text: str = TEXT) -> Record:
        instruction = json.dumps({"instruction": "x", "schema": schema, "input": text})
        return Record(f"f:{number}", {"task": "RE", "instruction": instruction, "answer": output})

    counts: Counter[str] = Counter()
    first = '{"r": [{"subject": "A", "object": "B"}, {"subject": 1, "object": "B"}, "C"]}'
    rows = [line(1, first, ["r"]), line(2, "I do not know", ["q"]), line(3, '{"r": []}', ["r"], "other")]
    read = list(read_answers(rows, counts=counts))
    assert [record.relations for record in read] == [(Relation("A", "r", "B"),), ()]
    assert counts == {"lines": 3, "records": 2, "unreadable": 1}
    # The same question again is about the text a second time.
    assert len(list(read_answers([rows[0], rows[0]]))) == 2
    # Several values of an attribute, as DeepKE joins them.
    assert parse_answer('{"t": {"A": {"r": "x|||y"}, "B": 3}}', "KG") == [
        Relation("A", "r", "x", "t"),
        Relation("A", "r", "y", "t"),
    ]
    whole = Annotated("t", relations=(Relation("A", "r", "x|||y", "t"),))
    (line_of_it,) = make_instructions([whole], gather_schema([whole], "KG"), Settings(task="KG"))
    assert next(read_answers([Record("f:1", line_of_it)])).relations == whole.relations
    predicted = {"number": 0, "record": rows[0].data, "answers": {"answer": {"texts": [first]}}}
    assert next(read_answers([Record("p:1", predicted)])).relations == (Relation("A", "r", "B"),)
    for data, said in (
        ({"instruction": "x"}, "p:1: expected instruction and output"),
        ({"instruction": "x", "output": "y"}, "p:1: the instruction is not JSON with an 'input'"),
        ({**rows[0].data, "task": "XX"}, "p:1: task is 'XX'; expected one of NER"),
    ):
        with pytest.raises(UserError, match=said):
            list(read_answers([Record("p:1", data)]))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "task", "said"),
    [
        ({"text": ""}, "NER", "records.jsonl:2: 'text' is ''"),
        ({"entity": [{"entity": "a"}]}, "NER", "records.jsonl:2: entity 1 has no 'entity_type'"),
        ({"entity": {"a": "b"}}, "NER", "records.jsonl:2: entity is dict; expected a list"),
        ({"entity": None}, "NER", "records.jsonl:2: has no 'entity', which NER reads"),
        ({"relation": [{"head": "a", "relation": "reached", "tail": 3}]}, "RE", "relation 1 has 'tail': 3"),
        ({"relation": [{"head": "x", "relation": "reached", "tail": "y"}]}, "SPO", "says no type of its head"),
        ({"relation": [{"head": "a", "relation": "new", "tail": "b"}]}, "RE", "relation 'new', which is not in"),
        ({"event": [{"event_type": "flood", "event_trigger": "rose", "arguments": [{"argument": "x", "role": "y"}]}]},
         "EE", "the role 'y' of 'flood', which is not in the schema"),
        ({"event": [{"event_type": "flood", "event_trigger": "rose", "arguments": [{"argument": "NAN", "role": "y"}]}]},
         "EE", "event 1, argument 1 is 'NAN'"),
    ],
)  # fmt: skip
def test_a_bad_record_is_named_by_its_line_and_nothing_is_written(
    change: dict[str, Any], task: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = file(tmp_path / "records.jsonl", RECORD, RECORD | change)
    schema = file(tmp_path / "schema.json", {**SCHEMA, "entity": ["city", "volcano"]})
    out = tmp_path / "out.jsonl"
    assert main(["ie", "make", str(records), str(out), "--task", task, "--schema", str(schema)]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists() and {path.name for path in tmp_path.iterdir()} == {"records.jsonl", "schema.json"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]\n", "has 1 lines; expected either one object"),
        ('{"entities": []}', "has the key 'entities'"),
        ('{"entity": ["a", "a"]}', "entity has 'a' twice"),
        ('{"entity": []}', "says nothing that NER asks for"),
        ("[\n[\n[\n", "is not valid JSON"),
    ],
)
def test_a_bad_schema_is_refused(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(said)):
        read_schema(path, "NER")


def test_the_schema_files_of_deepke_are_read(tmp_path: Path) -> None:
    three = file(tmp_path / "schema.json", ["eruption", "flood"], ["year", "river"], {"eruption": ["year"]})
    assert read_schema(three, "NER") == {("eruption",): (), ("flood",): ()}
    assert read_schema(three, "EE") == {("eruption",): ("year",), ("flood",): ()}
    assert read_schema(three, "RE") == {("year",): (), ("river",): ()}
    with pytest.raises(UserError, match="do not say between which types"):
        read_schema(three, "SPO")


def test_other_words_may_be_given(tmp_path: Path) -> None:
    words = read_words(file(tmp_path / "words.json", {"NER_zh": "抽取"}))
    assert words["NER", "zh"] == "抽取" and words["NER", "en"] == WORDS["NER", "en"]
    with pytest.raises(UserError, match="XX_en"):
        read_words(file(tmp_path / "words.json", {"XX_en": "x"}))


# --- a knowledge graph ------------------------------------------------------------------------------------------------

GRAPH = [
    {"id": "Q1", "name": "Mercury", "types": ["planet"], "description": "closest to the Sun",
     "relations": [{"relation": "orbits", "target": "Q3"}]},
    {"id": "Q2", "name": "Mercury", "aliases": ["quicksilver", "水银"], "types": ["metal"],
     "description": "liquid element",
     "relations": [{"relation": "symbol", "value": "Hg"}, {"relation": "made from", "target": "Q4"}]},
    {"id": "Q3", "name": "Sun", "aliases": ["太阳"], "types": ["star"]},
    {"id": "Q4", "name": "cinnabar", "aliases": ["朱砂"], "types": ["mineral", "ore"]},
    {"id": "Q5", "name": "Sun Microsystems", "types": ["company"]},
]  # fmt: skip


def test_names_are_told_apart_by_what_else_a_text_names(tmp_path: Path) -> None:
    graph = read_graph(file(tmp_path / "graph.jsonl", *GRAPH))
    texts = [
        "Mercury moves around the Sun.",
        "Mercury (Hg) is won from cinnabar.",
        "Mercury is a liquid.",  # by a word of the description
        "Mercury is here.",  # by nothing
        "Sun Microsystems is not the Suns of the sky.",  # the longest name, and whole words
        "水银来自朱砂。",
    ]
    counts: Counter[str] = Counter()
    found = list(align(graph, [Annotated(text) for text in texts], keep_empty=True, counts=counts))
    assert [record.relations for record in found] == [
        (Relation("Mercury", "orbits", "Sun", "planet", "star"),),
        (
            Relation("Mercury", "made from", "cinnabar", "metal", "mineral/ore"),
            Relation("Mercury", "symbol", "Hg", "metal", "value"),
        ),
        (),
        (),
        (),
        (Relation("水银", "made from", "朱砂", "metal", "mineral/ore"),),
    ]
    assert [record.entities for record in found][2:5] == [
        (Entity("Mercury", "metal"),),
        (),
        (Entity("Sun Microsystems", "company"),),
    ]
    assert counts == {"texts": 6, "kept": 6, "entities": 8, "relations": 4, "ambiguous": 1}
    assert len(list(align(graph, [Annotated(text) for text in texts]))) == 3


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"id": "Q9"}, "graph.jsonl:6: name is None"),
        ({"id": "Q1", "name": "x"}, r"graph.jsonl:6: the id 'Q1' stands at .*graph.jsonl:1 too"),
        ({"id": "Q9", "name": "x", "relations": [{"relation": "r", "target": "Q8"}]}, "leads to 'Q8'"),
        ({"id": "Q9", "name": "x", "relations": [{"relation": "r"}]}, "either target, the id of an entity, or value"),
        ({"id": "Q9", "name": "x", "aliases": "y"}, "aliases is 'y'; expected a list of texts"),
    ],
)
def test_a_bad_graph_is_refused(node: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        read_graph(file(tmp_path / "graph.jsonl", *GRAPH, node))


def test_the_command_goes_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts and a graph to records, to instructions, and back to the same triples."""
    graph = file(tmp_path / "graph.jsonl", *GRAPH)
    texts = file(tmp_path / "texts.jsonl", {"text": "Mercury moves around the Sun."}, {"text": "Nothing."})
    records, instructions, again = (tmp_path / f"{name}.jsonl" for name in ("records", "instructions", "again"))
    assert main(["ie", "align", str(texts), str(records), "--graph", str(graph)]) == 0
    assert main(["ie", "make", str(records), str(instructions), "--task", "SPO"]) == 0
    assert main(["ie", "back", str(instructions), str(again)]) == 0
    assert [line["relation"] for line in lines(again)] == [line["relation"] for line in lines(records)]
    said = capsys.readouterr().out
    assert "1 of 2 texts, with 2 entities and 1 relations" in said and "1 instructions about 1 texts" in said
    assert main(["ie", "make", str(records), str(instructions), "--task", "SPO"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["ie", "make", str(records), str(instructions), "--task", "SPO", "--overwrite"]) == 0
    assert main(["ie", "make", str(records), str(again), "--task", "ner", "--overwrite"]) == 2
    assert "task: 'ner'; expected one of NER" in capsys.readouterr().err


def test_a_store_is_made_with_the_tokenizer_of_a_run(tmp_path: Path) -> None:
    """--tokenizer takes a run, one of its checkpoints, or a converted model, like all other commands."""
    for step in ("5", "40"):
        (tmp_path / "run" / "checkpoints" / step / "jaxlm" / "tokenizer").mkdir(parents=True)
    newest = tmp_path / "run" / "checkpoints" / "40"
    assert tokenizer_directory(tmp_path / "run") == tokenizer_directory(newest) == newest / "jaxlm" / "tokenizer"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    assert tokenizer_directory(tmp_path / "hf") == tmp_path / "hf"
    assert tokenizer_directory(tmp_path / "none") == tmp_path / "none"
