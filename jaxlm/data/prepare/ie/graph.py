"""Texts annotated from a knowledge graph: names found in them, told apart by what else they name, and their relations.

The graph is a dump of JSON lines, an entity each:

    {"id": "Q1", "name": "Etna", "aliases": ["Mount Etna"], "types": ["volcano"], "description": "on Sicily",
     "relations": [{"relation": "located in", "target": "Q2"}, {"relation": "height", "value": "3,357 m"}]}

This is distant supervision (Mintz et al. 2009), as KG2Instruction makes InstructIE: a relation that holds between two
entities that a text names is taken to be said by the text, which is not always so.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.config import SourceConfig
from jaxlm.data.prepare.ie.records import Annotated, Entity, Relation
from jaxlm.data.records import read_records
from jaxlm.errors import UserError

VALUE = "value"  # the type of what is not an entity
_END = ""  # where a name ends in the tree of names
# Scripts that are written without spaces between words.
_UNSPACED = r"\u2e80-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[^\W_{_UNSPACED}]")
_WORDS = re.compile(rf"[^\W_{_UNSPACED}]+|[{_UNSPACED}]")


@dataclasses.dataclass(frozen=True)
class Node:
    """An entity of the graph.

    Args:
        id: its own.
        names: its name and the other ones.
        type: its types, joined by '/' where there are several.
        links: pairs of a relation and the id of an entity.
        values: pairs of a relation and a text.
        words: those of its description and types.
    """

    id: str
    names: tuple[str, ...]
    type: str
    links: tuple[tuple[str, str], ...]
    values: tuple[tuple[str, str], ...]
    words: frozenset[str]


class Graph:
    """Entities by id, who links to whom, and a tree of their names."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes: dict[str, Node] = {node.id: node for node in nodes}
        self.neighbours: dict[str, set[str]] = {name: set() for name in self.nodes}
        self._tree: dict[str, Any] = {}
        for node in self.nodes.values():
            for _, target in node.links:
                self.neighbours[node.id].add(target)
                self.neighbours[target].add(node.id)
            for name in node.names:
                branch = self._tree
                for sign in name:
                    branch = branch.setdefault(sign, {})
                branch.setdefault(_END, []).append(node.id)

    def mentions(self, text: str) -> list[tuple[int, int, tuple[str, ...]]]:
        """Where a text names entities, (begin, end, ids), from left to right; the longest name at a place wins."""
        matches, at = [], 0
        while at < len(text):
            match = self._longest(text, at)
            if match is None:
                at += 1
            else:
                matches.append(match)
                at = match[1]
        return matches

    def _longest(self, text: str, begin: int) -> tuple[int, int, tuple[str, ...]] | None:
        if _is_within_word(text, begin):
            return None
        branch, longest = self._tree, None
        for end in range(begin, len(text)):
            if text[end] not in branch:
                break
            branch = branch[text[end]]
            if _END in branch and not _is_within_word(text, end + 1):
                longest = (begin, end + 1, tuple(dict.fromkeys(branch[_END])))
        return longest


def _is_within_word(text: str, at: int) -> bool:
    """Whether a place between two characters lies inside of a word that is written with spaces around it."""
    return 0 < at < len(text) and bool(_WORD.match(text[at - 1]) and _WORD.match(text[at]))


def read_graph(path: Path | str) -> Graph:
    """A graph from its dump.

    Raises:
        UserError: for an entity of another form, an id that stands twice, or a relation to one that is not there.
    """
    nodes: dict[str, Node] = {}
    places: dict[str, str] = {}
    for record in read_records(SourceConfig(path=str(path))):
        node = _node(record.data, record.name)
        if node.id in nodes:
            raise UserError(f"{record.name}: the id {node.id!r} stands at {places[node.id]} too; give each its own")
        nodes[node.id], places[node.id] = node, record.name
    for node in nodes.values():
        missing = next((target for _, target in node.links if target not in nodes), None)
        if missing is not None:
            raise UserError(
                f"{places[node.id]}: a relation of {node.id!r} leads to {missing!r}, which is not in the graph; add "
                "it, or give the relation a value instead of a target"
            )
    return Graph(nodes.values())


def _node(values: Mapping[str, Any], where: str) -> Node:
    for key in ("id", "name"):
        if not isinstance(values.get(key), str) or not values[key].strip():
            raise UserError(f"{where}: {key} is {values.get(key)!r:.60}; expected a text; an entity has id and name")
    for key in ("aliases", "types"):
        if not _is_texts(values.get(key, [])):
            raise UserError(f"{where}: {key} is {values[key]!r:.60}; expected a list of texts")
    description = values.get("description", "")
    if not isinstance(description, str):
        raise UserError(f"{where}: description is {description!r:.60}; expected a text")
    relations = values.get("relations", [])
    if not isinstance(relations, list):
        raise UserError(f"{where}: relations is {relations!r:.60}; expected a list of objects")
    links: list[tuple[str, str]] = []
    literals: list[tuple[str, str]] = []
    for number, relation in enumerate(relations, 1):
        ends = [key for key in ("target", "value") if isinstance(relation, dict) and _is_texts([relation.get(key)])]
        if len(ends) != 1 or not _is_texts([relation.get("relation")]):
            raise UserError(
                f"{where}: relations {number} is {relation!r:.80}; expected an object with relation, and either "
                "target, the id of an entity, or value, a text"
            )
        (links if ends == ["target"] else literals).append((relation["relation"], relation[ends[0]]))
    types = values.get("types", [])
    names = tuple(dict.fromkeys([values["name"], *values.get("aliases", [])]))
    words = frozenset(word.lower() for text in (description, *types) for word in _WORDS.findall(text))
    return Node(values["id"], names, "/".join(types), tuple(links), tuple(literals), words)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)


def resolve(graph: Graph, text: str, mentions: Sequence[tuple[int, int, tuple[str, ...]]]) -> list[str | None]:
    """Which entity each mention is; None where the text does not tell several of one name apart.

    Of the entities that share a name, that is meant of which the text names the most neighbours in the graph; among
    equals, that whose description and types share the most words with the text.
    """
    words = frozenset(word.lower() for word in _WORDS.findall(text))
    chosen: list[str | None] = []
    for begin, end, ids in mentions:
        if len(ids) == 1:
            chosen.append(ids[0])
            continue
        others = {each for b, e, those in mentions if text[b:e] != text[begin:end] for each in those}
        scores = {each: (len(graph.neighbours[each] & others), len(graph.nodes[each].words & words)) for each in ids}
        best = max(scores.values())
        winners = [each for each, score in scores.items() if score == best]
        chosen.append(winners[0] if len(winners) == 1 and best > (0, 0) else None)
    return chosen


def align(
    graph: Graph, texts: Iterable[Annotated], keep_empty: bool = False, counts: Counter[str] | None = None
) -> Iterator[Annotated]:
    """Texts with the entities and the relations of the graph that they name.

    An entity is written as the text has it the first time. A value is found where it stands in the text as it is.

    Args:
        graph: the graph.
        texts: texts; annotations that they have are replaced.
        keep_empty: texts with no relation are kept, as examples of that.
        counts: texts, kept, entities, relations, and mentions that stayed ambiguous; added to.
    """
    counts = Counter() if counts is None else counts
    for record in texts:
        mentions = graph.mentions(record.text)
        chosen = resolve(graph, record.text, mentions)
        counts["texts"] += 1
        counts["ambiguous"] += chosen.count(None)
        surface: dict[str, str] = {}
        for (begin, end, _), identity in zip(mentions, chosen, strict=True):
            if identity is not None:
                surface.setdefault(identity, record.text[begin:end])
        relations = []
        for identity, head in surface.items():
            node = graph.nodes[identity]
            for relation, target in node.links:
                if target in surface and target != identity:
                    tail_type = graph.nodes[target].type
                    relations.append(Relation(head, relation, surface[target], node.type or None, tail_type or None))
            relations += [
                Relation(head, relation, value, node.type or None, VALUE)
                for relation, value in node.values
                if _stands_in(value, record.text)
            ]
        if not relations and not keep_empty:
            continue
        entities = tuple(
            Entity(text, graph.nodes[identity].type) for identity, text in surface.items() if graph.nodes[identity].type
        )
        counts["kept"] += 1
        counts["entities"] += len(entities)
        counts["relations"] += len(relations)
        yield dataclasses.replace(record, entities=entities, relations=tuple(dict.fromkeys(relations)), events=None)


def _stands_in(value: str, text: str) -> bool:
    at = text.find(value)
    while at >= 0:
        if not _is_within_word(text, at) and not _is_within_word(text, at + len(value)):
            return True
        at = text.find(value, at + 1)
    return False
