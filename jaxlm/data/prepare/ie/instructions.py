"""Records to instructions, as IEPile and OneKE have them: a JSON object in a text, with instruction, schema and input.

A long schema is asked for in several instructions, because models answer short ones better. Types that the text does
not have are asked for too, so that a model learns to answer with an empty list. Facts: `ie2instruction` of
zjunlp/DeepKE, example/llm/InstructKGC. The sentences are jaxlm's own; `words` takes others, such as those that a
published model was trained with.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxlm.data.prepare.ie.answers import JOINED
from jaxlm.data.prepare.ie.records import NOTHING, Annotated, Event, entity_json, event_json, relation_json
from jaxlm.data.prepare.ie.schema import WITH_ROLES, Key, Schema, Task, asked, entity_types, keys_of
from jaxlm.errors import UserError
from jaxlm.jsontext import read_object

Language = Literal["zh", "en"]

WORDS: dict[tuple[Task, Language], str] = {
    ("NER", "en"): "Find the entities of the types in the schema in the input. A type of which there is none gets an "
    "empty list. Answer in JSON.",
    ("RE", "en"): "Find the relations of the schema in the input, each with its subject and object. A relation that "
    "does not occur gets an empty list. Answer in JSON.",
    ("SPO", "en"): "Find the relations of the schema in the input, between a subject and an object of the types given. "
    "A relation that does not occur gets an empty list. Answer in JSON.",
    ("EE", "en"): "Find the events of the schema in the input, each with its trigger and its arguments. An event that "
    "does not occur gets an empty list, an argument that is not said NAN, several arguments of one role a list. "
    "Answer in JSON.",
    ("EET", "en"): "Find the words in the input that name the events of the schema. An event that does not occur gets "
    "an empty list. Answer in JSON.",
    ("EEA", "en"): "The schema names events of the input and their triggers. Find the arguments of each. An argument "
    "that is not said is NAN, several of one role are a list. Answer in JSON.",
    ("KG", "en"): "Find the entities of the types in the schema in the input, and the attributes said of each. "
    "Attributes that are not said are left out, several values are a list. Answer in JSON.",
    ("NER", "zh"): "请在input中找出schema所列类型的实体，没有的类型给出空列表，用JSON回答。",
    ("RE", "zh"): "请在input中找出schema所列的关系，写明头实体和尾实体，没有的关系给出空列表，用JSON回答。",
    ("SPO", "zh"): "请在input中找出schema所列的关系，主体和客体须符合所列类型，没有的关系给出空列表，用JSON回答。",
    ("EE", "zh"): "请在input中找出schema所列的事件，写明触发词和论元，没有的事件给出空列表，没有的论元写NAN，"
    "同一角色有多个论元时用列表，用JSON回答。",
    ("EET", "zh"): "请在input中找出表示schema所列事件的触发词，没有的事件给出空列表，用JSON回答。",
    ("EEA", "zh"): "schema列出了input中的事件及触发词，请找出每个事件的论元，没有的论元写NAN，"
    "同一角色有多个论元时用列表，用JSON回答。",
    ("KG", "zh"): "请在input中找出schema所列类型的实体，并写出文中提到的属性，没有提到的属性不写，"
    "多个值用列表，用JSON回答。",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How instructions are made.

    Args:
        task: what is asked for.
        language: of the instruction, and of the names of a relation's ends: head and tail in zh, subject and object in
            en.
        split: train has outputs and samples types that the text does not have; test has labels and asks for all.
        schema_size: most entries of an instruction's schema, but for a rest below half of it, which the last one takes
            too; 0: all in one. None: 6 for NER, else 4, as published.
        negatives: the share of the types without an instance that is asked for, from 0 to 1.
        shuffle: types stand in a seeded order instead of sorted.
        seed: of the sample and the order.
        source: the name of the data set, where a record does not say it.
        words: instructions by task and language; None: jaxlm's own.
    """

    task: Task
    language: Language = "en"
    split: Literal["train", "test"] = "train"
    schema_size: int | None = None
    negatives: float = 1.0
    shuffle: bool = False
    seed: int = 0
    source: str = ""
    words: Mapping[tuple[Task, Language], str] | None = None

    def __post_init__(self) -> None:
        if self.schema_size is not None and self.schema_size < 0:
            raise UserError(f"schema_size: {self.schema_size} must be 0 or more; 0 asks for all types at once")
        if not 0 <= self.negatives <= 1:
            raise UserError(f"negatives: {self.negatives} must be from 0 to 1: a share of the types without instance")

    @property
    def size(self) -> int:
        """The most entries of an instruction's schema; 0: any number."""
        return (6 if self.task == "NER" else 4) if self.schema_size is None else self.schema_size


def read_words(path: Path) -> dict[tuple[Task, Language], str]:
    """Instructions of a file, {"NER_en": "…", …}; what it leaves out is jaxlm's own.

    Raises:
        UserError: for another form or an unknown name.
    """
    words = dict(WORDS)
    names = {f"{task}_{language}": (task, language) for task, language in WORDS}
    for name, text in read_object(path).items():
        if name not in names or not isinstance(text, str):
            raise UserError(f"words: {path}: {name}: {text!r:.40}; expected a text under one of {', '.join(names)}")
        words[names[name]] = text
    return words


# --- what a text has --------------------------------------------------------------------------------------------------


def _ends(task: Task, language: Language) -> tuple[str, str]:
    return ("head", "tail") if language == "zh" and task == "RE" else ("subject", "object")


def _by_role(pairs: Iterable[tuple[str, str]], names: Iterable[str], absent: str | None) -> dict[str, Any]:
    """{role: text, or texts where there are several}; a role without a text has `absent`, None: it is left out."""
    values: dict[str, list[str]] = {name: [] for name in names}
    for text, role in pairs:
        values[role].append(text)
    return {
        # A text that has the sign by which values are joined stays whole within a list.
        role: texts[0] if len(texts) == 1 and JOINED not in texts[0] else texts or absent
        for role, texts in values.items()
        if texts or absent is not None
    }


def instances(record: Annotated, task: Task, language: Language, schema: Schema) -> dict[Key, Any]:
    """What the right answer holds for each key that the text has an instance of: a list, for KG {entity: attributes}.

    Raises:
        UserError: for an entry that the schema does not have.
    """
    for key, roles in keys_of(record, task):
        if key not in schema:
            raise UserError(f"{record.name}: has the {_called(task)} {' / '.join(key)!r}, which is not in the schema")
        unknown = next((role for role in roles if role not in schema[key]), None)
        if unknown is not None:
            what = "attribute" if task == "KG" else "role"
            raise UserError(f"{record.name}: has the {what} {unknown!r} of {key[0]!r}, which is not in the schema")
    answer: dict[Key, Any] = {}
    types = entity_types(record)
    if task == "NER":
        for entity in record.entities or ():
            answer.setdefault((entity.type,), []).append(entity.text)
    elif task in ("EE", "EET", "EEA"):
        for event in record.events or ():
            entry = event.trigger if task == "EET" else _event(event, schema[event.type,])
            answer.setdefault((event.type,), []).append(entry)
    elif task == "KG":
        pairs: dict[Key, dict[str, list[tuple[str, str]]]] = {}
        for entity in record.entities or ():
            pairs.setdefault((entity.type,), {}).setdefault(entity.text, [])
        for relation in record.relations or ():
            head = (relation.head_type or types[relation.head],)
            if relation.tail == NOTHING:
                raise UserError(
                    f"{record.name}: the tail of {relation.relation!r} is {NOTHING!r}, by which answers say that there "
                    "is none; leave the relation out"
                )
            pairs.setdefault(head, {}).setdefault(relation.head, []).append((relation.tail, relation.relation))
        for key, entities in pairs.items():
            answer[key] = {text: _by_role(values, schema[key], None) for text, values in entities.items()}
    else:
        head_name, tail_name = _ends(task, language)
        for relation in record.relations or ():
            pair = {head_name: relation.head, tail_name: relation.tail}
            name: Key = (relation.relation,)
            if task == "SPO":
                subject_type = relation.head_type or types[relation.head]
                object_type = relation.tail_type or types[relation.tail]
                name = (subject_type, relation.relation, object_type)
                pair = {
                    "subject": relation.head,
                    "subject_type": subject_type,
                    "object": relation.tail,
                    "object_type": object_type,
                }
            answer.setdefault(name, []).append(pair)
    return answer


def _event(event: Event, roles: tuple[str, ...]) -> dict[str, Any]:
    return {"trigger": event.trigger, "arguments": _by_role(event.arguments, roles, NOTHING)}


def _called(task: Task) -> str:
    return {"NER": "entity type", "KG": "entity type", "RE": "relation", "SPO": "relation"}.get(task, "event type")


def label(record: Annotated, task: Task) -> list[dict[str, Any]]:
    """The right answer of a whole text, as evaluation reads it."""
    if task == "NER":
        return [entity_json(entity) for entity in record.entities or ()]
    if task in ("RE", "SPO", "KG"):
        return [relation_json(relation) for relation in record.relations or ()]
    events = [event_json(event) for event in record.events or ()]
    return [{k: v for k, v in event.items() if k != "arguments"} for event in events] if task == "EET" else events


# --- instructions -----------------------------------------------------------------------------------------------------


def parts(keys: list[Key], size: int) -> list[list[Key]]:
    """A schema in parts of `size`; a rest of less than half of it goes with the last part."""
    if size == 0 or len(keys) <= size:
        return [keys] if keys else []
    whole = len(keys) // size * size
    cut = [keys[at : at + size] for at in range(0, whole, size)]
    rest = keys[whole:]
    if rest and len(rest) >= max(1, size // 2):
        cut.append(rest)
    else:
        cut[-1] = cut[-1] + rest
    return cut


def _chosen(record_number: int, present: Mapping[Key, Any], schema: Schema, settings: Settings) -> list[Key]:
    """The keys that a text is asked for, in their order."""
    if settings.task == "EEA":  # its events are known
        keys = [key for key in schema if key in present]
    elif settings.split == "test":
        keys = list(schema)
    else:
        draw = random.Random(f"{settings.seed}:{record_number}")
        absent = [key for key in schema if key not in present]
        kept = {key for key in absent if draw.random() < settings.negatives}
        if not present and not kept and absent and settings.negatives > 0:
            kept = {draw.choice(absent)}
        keys = [key for key in schema if key in present or key in kept]
    keys = sorted(keys)
    if settings.shuffle:
        random.Random(f"{settings.seed}:{record_number}:order").shuffle(keys)
    return keys


def make_instructions(
    records: Iterable[Annotated], schema: Schema, settings: Settings, counts: Counter[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Instructions of records, in their order; which types are asked for follows from seed, number and schema alone.

    Args:
        records: the records.
        schema: what may be asked for.
        settings: how.
        counts: records, instructions, instances, types asked for without one (negatives), records that nothing was
            asked about (left_out), and instances that do not stand in their text as they are (not_in_text); added to.

    Yields:
        for train {id, task, source, instruction, output}, for test {id, task, source, instruction, label}.

    Raises:
        UserError: for a record that does not go with the schema, by file and line.
    """
    counts = Counter() if counts is None else counts
    words = (settings.words or WORDS)[settings.task, settings.language]
    for number, record in enumerate(records):
        present = instances(record, settings.task, settings.language, schema)
        keys = _chosen(number, present, schema, settings)
        counts["records"] += 1
        counts["left_out"] += not keys
        counts["instances"] += sum(map(len, present.values()))
        counts["not_in_text"] += sum(part not in record.text for part in _literal(record, settings.task))
        right = json.dumps(label(record, settings.task), ensure_ascii=False)
        for part in parts(keys, settings.size):
            counts["instructions"] += 1
            counts["negatives"] += sum(key not in present for key in part)
            triggers = {key: [event.trigger for event in record.events or () if (event.type,) == key] for key in part}
            content = {
                "instruction": words,
                "schema": [asked(key, schema[key], settings.task, triggers[key]) for key in part],
                "input": record.text,
            }
            line = {
                "id": record.id,
                "task": settings.task,
                "source": record.source or settings.source,
                "instruction": json.dumps(content, ensure_ascii=False),
            }
            if settings.split == "test":
                yield line | {"label": right}
            else:
                yield line | {"output": json.dumps(_answer(part, present, settings.task), ensure_ascii=False)}


def _literal(record: Annotated, task: Task) -> list[str]:
    """What an answer takes from the text."""
    if task == "NER":
        return [entity.text for entity in record.entities or ()]
    if task in ("RE", "SPO", "KG"):
        return [end for relation in record.relations or () for end in (relation.head, relation.tail)]
    arguments = [text for event in record.events or () for text, _ in event.arguments] if task in WITH_ROLES else []
    return [*(event.trigger for event in record.events or ()), *arguments]


def _answer(keys: list[Key], present: Mapping[Key, Any], task: Task) -> dict[str, Any]:
    """The right answer to a part of a schema, in its order."""
    answer: dict[str, Any] = {}
    for key in keys:
        name = key[1] if task == "SPO" else key[0]
        if task == "KG":
            answer[name] = present.get(key, {})
        else:  # a relation of SPO may stand between several types
            answer.setdefault(name, []).extend(present.get(key, []))
    return answer
