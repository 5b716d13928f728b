"""The data of KnowLM's small recipe: the graph finds what texts say, and the test is apart from the training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from jaxlm.data.prepare.ie.graph import align, read_graph
from jaxlm.data.prepare.ie.records import Annotated
from tests.recipes.test_result import script

knowlm = script("configs/knowlm/prepare.py")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["prepare.py", str(folder), "--train", "120", "--test", "40"])
        knowlm.main()
    return folder


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_graph_finds_what_the_texts_were_made_of(language: str, made: Path) -> None:
    graph = read_graph(made / f"graph-{language}.jsonl")
    world = [
        tuple(
            random.Random(seed).choice(knowlm.table(rows)) for rows in (knowlm.PEOPLE, knowlm.MINERALS, knowlm.PLACES)
        )
        for seed in range(40)
    ]
    worlds = json_lines(made / f"graph-{language}.jsonl")
    known = {(node["id"], link.get("target")) for node in worlds for link in node["relations"]}
    tried = 0
    for seed, triple in enumerate(world):
        person, mineral, place = triple
        if (person[0], mineral[0]) not in known or (mineral[0], place[0]) not in known:
            continue
        said = knowlm.say(language, random.Random(seed), triple)
        (record,) = align(graph, [Annotated(said["text"])], keep_empty=True)
        found = {(each.head, each.relation, each.tail) for each in record.relations or ()}
        assert set(said["triples"]) <= found
        tried += 1
    assert tried > 10


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_pair_of_names_is_in_training_and_test(language: str, made: Path) -> None:
    graph = read_graph(made / f"graph-{language}.jsonl")
    pairs = []
    for part in ("train", "test"):
        texts = [Annotated(line["text"]) for line in json_lines(made / f"{part}-{language}.jsonl")]
        relations = [relation for record in align(graph, texts) for relation in record.relations or ()]
        pairs.append({(each.head, each.tail) for each in relations if each.tail_type != "value"})
    assert pairs[0] and pairs[1] and not pairs[0] & pairs[1]
