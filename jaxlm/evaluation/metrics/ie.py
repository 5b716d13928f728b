"""Entities, relations and events in the answers of KnowLM's models: two formats, Chinese and English.

Facts: `example/llm/InstructKGC` of zjunlp/DeepKE. The newer format (IEPile, OneKE; `ie2instruction`) has JSON answers
and labels. The older one (InstructIE, CCKS 2023; `kg2instruction`) has texts in one of four shapes, the same for right
answers:

    {'head': 'A', 'relation': 'r', 'tail': 'B'}         braces
    头实体是A,关系是r,尾实体是B   Subject is A,…        labelled
    (A,r,B)                                             parentheses
    r：A,B                                              colon
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxlm.data.prepare.ie.answers import parse_answer
from jaxlm.data.prepare.ie.records import Relation
from jaxlm.errors import UserError
from jaxlm.jsontext import parse

Kind = Literal["NER", "RE", "SPO", "EE", "EET", "EEA", "KG"]
NOTHING = "NAN"  # how the data write that there is none
Tuple = tuple[str, ...]


class Event(NamedTuple):
    """An event; arguments are pairs of a text and its role."""

    type: str
    trigger: str
    arguments: tuple[tuple[str, str], ...]


class Extracted(NamedTuple):
    """What an answer holds.

    Args:
        tuples: NER (entity, type); RE, SPO and KG (head, relation, tail); events (type, trigger).
        arguments: of events: (type, argument, role) in the newer format, (type, trigger, argument, role) in the older.
        is_readable: False for an answer of another form, whose tuples are none.
    """

    tuples: tuple[Tuple, ...] = ()
    arguments: tuple[Tuple, ...] = ()
    is_readable: bool = True


# --- the newer format: JSON -------------------------------------------------------------------------------------------


def parse_json_answer(text: str, kind: Kind, as_published: bool = False) -> Extracted:
    """What an answer of the newer format holds: an object {type or relation: [entities, pairs or events]}.

    KG has {entity type: {entity: {attribute: value or values}}}. Entries of another form are passed over. As
    published, a relation's pair has head and tail, though IEPile's English records write subject and object.
    """
    try:
        content = json.loads(text)  # a name that stands twice has its last value, as in the original
    except (ValueError, RecursionError):
        return Extracted(is_readable=False)
    if not isinstance(content, dict):
        return Extracted(is_readable=False)
    if kind == "KG":
        triples = [entry for entry in parse_answer(text, "KG") or () if isinstance(entry, Relation)]
        return Extracted(tuple((triple.head, triple.relation, triple.tail) for triple in triples))
    entries = [(key, value) for key, values in content.items() if isinstance(values, list) for value in values]
    if kind == "NER":
        return Extracted(tuple((value, key) for key, value in entries if isinstance(value, str)))
    if kind in ("RE", "SPO"):
        pairs = ((key, _ends(value, as_published)) for key, value in entries if isinstance(value, dict))
        return Extracted(tuple((head, key, tail) for key, ends in pairs if ends for head, tail in [ends]))
    events = []
    for key, value in entries:
        if kind == "EET" and isinstance(value, str):
            events.append(Event(key, value, ()))
        elif isinstance(value, dict) and isinstance(trigger := value.get("trigger", ""), str):
            events.append(Event(key, trigger, tuple(_arguments(value.get("arguments")))))
    return _of_events(events, kind, with_trigger=False)


def _ends(value: Mapping[str, Any], as_published: bool) -> tuple[str, str] | None:
    names = (("head",), ("tail",)) if as_published else (("head", "subject"), ("tail", "object"))
    ends = [next((value[name] for name in each if name in value), "") for each in names]
    return (ends[0], ends[1]) if all(isinstance(end, str) for end in ends) else None


def _arguments(roles: Any) -> list[tuple[str, str]]:
    """Arguments of an event, {role: text or texts}."""
    pairs = []
    for role, values in roles.items() if isinstance(roles, dict) else ():
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, str) and value != NOTHING:
                pairs.append((value, role))
    return pairs


def _of_events(events: Sequence[Event], kind: Kind, with_trigger: bool) -> Extracted:
    arguments = tuple(
        (event.type, *((event.trigger,) if with_trigger else ()), *argument)
        for event in events
        for argument in event.arguments
    )
    if kind == "EET":
        return Extracted(tuple((event.type, event.trigger) for event in events))
    # Without triggers, events are their types.
    return Extracted(tuple((event.type, "" if kind == "EEA" else event.trigger) for event in events), arguments)


# Kind -> the keys of an entry of a label.
LABELS: dict[Kind, tuple[str, ...]] = {
    "NER": ("entity", "entity_type"),
    "RE": ("head", "relation", "tail"),
    "SPO": ("head", "relation", "tail"),
    "KG": ("head", "relation", "tail"),
    "EE": ("event_type", "event_trigger", "arguments"),
    "EET": ("event_type", "event_trigger"),
    "EEA": ("event_type", "arguments"),
}


def parse_label(text: str, kind: Kind) -> Extracted:
    """The right tuples of a record of the newer format: a JSON list of objects.

    Raises:
        UserError: for a text that is none of this, or that is of another kind.
    """
    try:
        content = parse(text)
    except ValueError as error:
        raise UserError(f"the label is not JSON ({error})") from None
    keys = LABELS[kind]
    entries = content if isinstance(content, list) else [content]
    for entry in entries:
        missing = next((key for key in keys if not isinstance(entry, dict) or key not in entry), None)
        if missing is not None:
            columns = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
            raise UserError(
                f"an entry of the label has no {missing!r}, which {kind} has; found: {columns}; choose the kind with "
                "--options.extract"
            )
    if kind in ("NER", "RE", "SPO", "KG"):
        return Extracted(tuple(tuple(str(entry[key]) for key in keys) for entry in entries))
    events = [
        Event(
            str(entry["event_type"]),
            str(entry.get("event_trigger", "")),
            tuple((str(each.get("argument", "")), str(each.get("role", ""))) for each in entry.get("arguments", ())),
        )
        for entry in entries
    ]
    return _of_events(events, kind, with_trigger=False)


# --- the older format: texts ------------------------------------------------------------------------------------------

_PREFIXES = ("输入中包含的关系三元组是：", "输入中包含的实体是：", "输入中包含的事件是：")
_REFUSALS = (
    "no entity found.",
    "no relation triples found.",
    "no relation found.",
    "no event found.",
    "no argument found.",
)
_PARENTHESES = re.compile(r"\(([^()]*)\)?")
_BRACES = re.compile(r"\{[^{}]*\}?")
_LABELS = {
    ("NER", "zh"): ("实体是", "实体类型是"),
    ("NER", "en"): ("Entity is", "Entity Type is"),
    ("RE", "zh"): ("头实体是", "关系是", "尾实体是"),
    ("RE", "en"): ("Subject is", "Relation is", "Object is"),
    ("event", "zh"): ("事件触发词是", "事件类型是"),
    ("event", "en"): ("Event Trigger is", "Event Type is"),
    ("argument", "zh"): ("事件论元是", "论元角色是"),
    ("argument", "en"): ("Argument is", "Argument Role is"),
}
_FIELDS = {
    "NER": ("entity", "entity_type"),
    "RE": ("head", "relation", "tail"),
    "event": ("event_trigger", "event_type"),
    "argument": ("argument", "role"),
}
Language = Literal["zh", "en"]


def parse_text_answer(text: str, source: str, kind: Kind, language: Language) -> Extracted:
    """What an answer of the older format holds.

    Tuples with a part that is empty or NAN are left out, and lines of another form.

    Args:
        text: the answer.
        source: the text that was read; it says where a head ends that has a comma of its own.
    """
    for prefix in _PREFIXES:
        text = text.replace(prefix, "")
    plain = text.strip().lower()
    refuses = plain.startswith("sorry") or (
        "not contain" in plain or "no relation" in plain if kind == "RE" else kind == "NER" and "no ent" in plain
    )
    if plain in _REFUSALS or refuses or not plain.replace("nan", "").strip():
        return Extracted()
    if kind in ("NER", "RE"):
        shape = _shape(text, kind, language)
        if shape is None:
            return Extracted(is_readable=False)
        tuples = [_ordered(kind, shape, parts) for parts in _parts(text, source, kind, language, shape)]
        return Extracted(tuple(parts for parts in tuples if _is_whole(parts)))
    return _parse_events(text, kind, language)


def _is_whole(parts: Sequence[str]) -> bool:
    return all(part not in ("", NOTHING) for part in parts)


def _shape(text: str, name: str, language: str) -> str | None:
    """Which of the four shapes an answer has; the first one that fits."""
    if all(f"'{field}'" in text for field in _FIELDS[name]) and "{" in text and ":" in text:
        return "braces"
    if all(label in text for label in _LABELS[name, language]):
        return "labelled"
    if "(" in text and ")" in text and "," in text:
        return "parentheses"
    if "：" in text:
        return "colon"
    return None


def _parts(text: str, source: str, name: str, language: str, shape: str) -> list[list[str]]:
    """The parts of every tuple of an answer, in the order in which the shape has them."""
    fields = len(_FIELDS[name])
    if shape == "braces":
        return [_braced(name, braces) for braces in _BRACES.findall(text)]
    if shape == "parentheses":
        split = [[part.strip() for part in inner.split(",")] for inner in _PARENTHESES.findall(text)]
        if fields == 2:
            return [[parts[0], parts[-1]] for parts in split if len(parts) > 1]
        return [_head_first(parts, source, 3) for parts in split if len(parts) >= 3]
    lines = [line for line in text.split("\n") if line.strip()]
    if shape == "labelled":
        matches = (_labelled(name, language).fullmatch(line.strip()) for line in lines)
        return [[part.strip() for part in match.groups()] for match in matches if match is not None]
    parted = [line.partition("：") for line in lines if "：" in line]
    if fields == 2:
        return [[before.strip(), behind.split("：")[0].strip()] for before, _, behind in parted]
    return [
        [relation.strip(), *_head_first([part.strip() for part in ends.split(",")], source, 2)]
        for relation, _, ends in parted
        if "," in ends
    ]


def _braced(name: str, braces: str) -> list[str]:
    matches = [re.search(rf"'{field}':\s?'([^']*)'", braces) for field in _FIELDS[name]]
    return ["" if match is None else match.group(1).strip() for match in matches]


def _labelled(name: str, language: str) -> re.Pattern[str]:
    return re.compile(",".join(rf"\s*{label}(.*?)" for label in _LABELS[name, language]))


def _head_first(parts: list[str], source: str, number: int) -> list[str]:
    """Parts joined to `number` of them where a comma stands inside of one.

    The head is the longest beginning that the source has; the last part has what is left.
    """
    if len(parts) == number:
        return parts
    length = 0
    while length < len(parts) and ",".join(parts[: length + 1]) in source:
        length += 1
    middle = number - 2
    if length > len(parts) - 1 - middle:  # nothing would be left for the others
        length = 1
    return [",".join(parts[:length]), *parts[length : length + middle], ",".join(parts[length + middle :])]


def _ordered(kind: str, shape: str, parts: Sequence[str]) -> Tuple:
    """(entity, type), or (head, relation, tail)."""
    if shape == "colon":
        return (parts[1], parts[0]) if kind == "NER" else (parts[1], parts[0], parts[2])
    return tuple(parts)


def _parse_events(text: str, kind: Kind, language: Language) -> Extracted:
    shape = _shape(text, "event", language)
    if shape is None:
        return Extracted(is_readable=False)
    if kind == "EET":
        pairs = _parts(text, "", "event", language, shape)
        if shape in ("braces", "labelled"):  # the trigger comes first
            pairs = [pair[::-1] for pair in pairs]
        return Extracted(tuple(tuple(pair) for pair in pairs if _is_whole(pair)))
    read: Callable[[str, str], list[Event]] = {
        "braces": _braced_events,
        "labelled": _block_events,
        "parentheses": _bracketed_events,
        "colon": _block_events,
    }[shape]
    return _of_events([event for event in read(text, language) if _is_whole(event[:2])], kind, with_trigger=True)


def _braced_events(text: str, language: str) -> list[Event]:
    """{'event_trigger': 't', 'event_type': 'e', 'arguments': ({'argument': 'a', 'role': 'r'}, …)}."""
    events: list[Event] = []
    for piece in re.split(r"(?=\{\s*'event_)", text):
        trigger, name = _braced("event", piece)
        _, _, rest = piece.partition("'arguments'")
        pairs = [_braced("argument", braces) for braces in _BRACES.findall(rest)]
        events.append(Event(name, trigger, tuple((pair[0], pair[1]) for pair in pairs if _is_whole(pair))))
    return events


def _bracketed_events(text: str, language: str) -> list[Event]:
    """(trigger,type,role#argument;role#argument)."""
    events = []
    for inner in _PARENTHESES.findall(text):
        trigger, name, *rest = [*(part.strip() for part in inner.split(",", 2)), "", ""][:3]
        pairs = [[part.strip() for part in each.split("#")] for each in rest[0].split(";") if "#" in each]
        events.append(Event(name, trigger, tuple((pair[-1], pair[0]) for pair in pairs if _is_whole(pair))))
    return events


def _block_events(text: str, language: str) -> list[Event]:
    """A line for the event, one for its arguments, and an empty line."""
    events = []
    labelled = _shape(text, "event", language) == "labelled"
    for block in re.split(r"\n\s*\n", text.strip()):
        first, _, second = block.strip().partition("\n")
        match = _labelled("event", language).fullmatch(first.strip()) if labelled else None
        if labelled and match is None:
            continue
        trigger, name = match.groups() if match is not None else (first.split("：")[-1], first.split("：")[0])
        pairs = []
        for each in second.split(";"):
            if labelled:
                argument = _labelled("argument", language).fullmatch(each.strip())
                pairs += [] if argument is None else [argument.groups()]
            elif "：" in each:
                pairs.append((each.split("：")[-1], each.split("：")[0]))
        stripped = [(text.strip(), role.strip()) for text, role in pairs]
        events.append(Event(name.strip(), trigger.strip(), tuple(pair for pair in stripped if _is_whole(pair))))
    return events
