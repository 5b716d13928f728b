"""`jaxlm prepare ie make | back | align`: data for information extraction."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jaxlm.errors import UserError

if TYPE_CHECKING:
    from jaxlm.data.prepare.ie.records import Annotated

T = TypeVar("T")
SUMMARY = "instructions for information extraction from annotated texts, answers back to records, texts from a graph"
VERBS = {
    "make": "records of entities, relations or events to instructions, which train and evaluate --task ie read",
    "back": "answers to such instructions to records: of make, of jaxlm generate, or an evaluation's predictions.jsonl",
    "align": "texts to records, by the names and relations of a knowledge graph",
}


def run(words: Sequence[str], prog: str) -> int:
    """Runs `make`, `back` or `align`."""
    parser = argparse.ArgumentParser(prog=f"{prog} ie", description=SUMMARY)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="|".join(VERBS))
    commands = {name: verbs.add_parser(name, help=what, description=what) for name, what in VERBS.items()}
    _describe_make(commands["make"])
    commands["back"].add_argument("source", type=Path, help="a file of instructions with answers")
    commands["align"].add_argument("source", type=Path, help="a file of records with a text each")
    for name, command in commands.items():
        command.add_argument("destination", type=Path, help="a new file, JSON lines")
        command.add_argument("--overwrite", action="store_true", help="replace the destination where it is there")
        if name == "back":
            command.add_argument("--task", help="what the answers are (default: what each line says)")
        if name == "align":
            command.add_argument("--graph", type=Path, required=True, help="a dump of entities, JSON lines")
            command.add_argument("--keep_empty", action="store_true", help="keep texts with no relation too")
    options = parser.parse_args(list(words))
    if options.destination.exists() and not options.overwrite:
        raise UserError(f"{options.destination} exists already; name another file, or replace it with --overwrite")
    {"make": _make, "back": _back, "align": _align}[options.verb](options)
    return 0


def _describe_make(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a file of records: text, and entity, relation or event")
    parser.add_argument("--task", required=True, help="NER, RE, SPO, EE, EET, EEA or KG")
    parser.add_argument("--schema", type=Path, help="what may be asked for (default: all that the records have)")
    parser.add_argument("--language", default="en", help="of the instruction: en (default) or zh")
    parser.add_argument("--split", default="train", help="train (default): with outputs; test: with labels, all types")
    parser.add_argument(
        "--schema_size", type=int, help="most types of an instruction; 0: all in one (default: 6 for NER, else 4)"
    )
    parser.add_argument(
        "--negatives",
        type=float,
        default=1.0,
        help="the share of the types without an instance in a text that it is asked for (default: 1)",
    )
    parser.add_argument("--shuffle", action="store_true", help="types in a seeded order (default: sorted)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample and the order (default: 0)")
    parser.add_argument("--name", default="", help="the data set's name, where a record has no source")
    parser.add_argument("--words", type=Path, help='other instructions: a JSON file, {"NER_en": "…", …}')


def _make(options: argparse.Namespace) -> None:
    from jaxlm.data.prepare.ie.instructions import Settings, make_instructions, read_words
    from jaxlm.data.prepare.ie.records import read_annotated
    from jaxlm.data.prepare.ie.schema import TASKS, WITH_ROLES, gather_schema, read_schema

    _one_of("task", options.task, TASKS)
    _one_of("language", options.language, ("en", "zh"))
    _one_of("split", options.split, ("train", "test"))
    settings = Settings(
        task=options.task,
        language=options.language,
        split=options.split,
        schema_size=options.schema_size,
        negatives=options.negatives,
        shuffle=options.shuffle,
        seed=options.seed,
        source=options.name,
        words=None if options.words is None else read_words(options.words),
    )
    schema = None if options.schema is None else read_schema(options.schema, settings.task)
    # Roles that the file does not say are those that the records have.
    if schema is None or (settings.task in WITH_ROLES and not all(schema.values())):
        gathered = gather_schema(_counted(read_annotated(options.source), "reading types"), settings.task)
        schema = gathered if schema is None else {key: roles or gathered.get(key, ()) for key, roles in schema.items()}
    if not schema:
        raise UserError(f"{options.source}: no record has anything for {settings.task}; name types with --schema FILE")
    counts: Counter[str] = Counter()
    records = _counted(read_annotated(options.source), "writing")
    _write(options.destination, make_instructions(records, schema, settings, counts))
    print(
        f"{options.destination}: {counts['instructions']:,} instructions about {counts['records']:,} texts, with "
        f"{counts['instances']:,} instances of {len(schema):,} types; {counts['negatives']:,} times a type without "
        "an instance is asked for"
    )
    if counts["left_out"]:
        print(f"{counts['left_out']:,} texts were left out, as nothing was to be asked about them")
    if counts["not_in_text"]:
        print(f"{counts['not_in_text']:,} annotations do not stand in their text as they are written")


def _back(options: argparse.Namespace) -> None:
    from jaxlm.config import SourceConfig
    from jaxlm.data.prepare.ie.answers import read_answers
    from jaxlm.data.prepare.ie.schema import TASKS
    from jaxlm.data.records import read_records

    if options.task is not None:
        _one_of("task", options.task, TASKS)
    counts: Counter[str] = Counter()
    lines = _counted(read_records(SourceConfig(path=str(options.source))), "reading")
    _write(options.destination, _as_json(read_answers(lines, options.task, counts)))
    print(f"{options.destination}: {counts['records']:,} texts of {counts['lines']:,} answers")
    if counts["unreadable"]:
        print(f"{counts['unreadable']:,} answers are not a JSON object; nothing was taken from them")


def _align(options: argparse.Namespace) -> None:
    from jaxlm.data.prepare.ie.graph import align, read_graph
    from jaxlm.data.prepare.ie.records import read_annotated

    graph = read_graph(options.graph)
    counts: Counter[str] = Counter()
    texts = _counted(read_annotated(options.source), "reading")
    _write(options.destination, _as_json(align(graph, texts, options.keep_empty, counts)))
    print(
        f"{options.destination}: {counts['kept']:,} of {counts['texts']:,} texts, with {counts['entities']:,} entities "
        f"and {counts['relations']:,} relations, by a graph of {len(graph.nodes):,} entities"
    )
    if counts["ambiguous"]:
        print(f"{counts['ambiguous']:,} names may mean several entities, and their text does not say which; left out")


def _as_json(records: Iterable[Annotated]) -> Iterator[dict[str, Any]]:
    return (record.to_json() for record in records)


def _one_of(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{key}: {value!r}; expected one of {', '.join(known)}")


def _write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """JSON lines, which take the place of `path` when all are written."""
    from jaxlm.data.prepare.work import replacing

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for line in lines:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _counted(records: Iterable[T], what: str) -> Iterator[T]:
    """The records, with a count of them on the screen while they are read."""
    from rich.console import Console
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    from jaxlm.screen import Bars

    columns = SpinnerColumn(), TextColumn("{task.description}: {task.completed:,}"), TimeElapsedColumn()
    with Bars(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        for record in records:
            yield record
            bar.advance(task)
