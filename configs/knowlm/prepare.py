"""Data for small.sh, invented for it: python configs/knowlm/prepare.py OUT [--train 1000] [--test 60]

Collectors, minerals and places, each with an English and a Chinese name. Short texts say who collected what and where.

- OUT/zh.jsonl, en.jsonl, code.jsonl: documents in the columns of KnowLM's sources (content; text; input and output).
- OUT/graph-en.jsonl, graph-zh.jsonl: who collected what, where it is found, how hard it is: a knowledge graph's dump.
- OUT/train-en.jsonl, train-zh.jsonl, and test-…: plain texts, which `jaxlm prepare ie align` annotates by the graph.

No pair of a collector and a mineral, or of a mineral and a place, is in both the training's and the test's texts: the
test asks what a text says, not what was seen before.

    python configs/knowlm/prepare.py --others LINES.jsonl OUT.json

writes the outputs of instructions, each in the place of another text's: right in form, answers by chance.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

# English name, Chinese name, hardness of Mohs.
MINERALS = """
quartz 石英 7|calcite 方解石 3|galena 方铅矿 2.5|pyrite 黄铁矿 6|fluorite 萤石 4|halite 石盐 2.5
barite 重晶石 3|gypsum 石膏 2|hematite 赤铁矿 6|magnetite 磁铁矿 6|corundum 刚玉 9|topaz 黄玉 8
zircon 锆石 7.5|malachite 孔雀石 4|cinnabar 辰砂 2.5|talc 滑石 1|stibnite 辉锑矿 2|rutile 金红石 6
apatite 磷灰石 5|kyanite 蓝晶石 6|graphite 石墨 1|olivine 橄榄石 7|jade 玉石 6.5|garnet 石榴石 7
"""
PEOPLE = """
Lin 林青|Maria 玛丽|Omar 奥马尔|Chen 陈明|Ada 阿达|Tom 汤姆
Wang 王芳|Nina 尼娜|Paul 保罗|Zhao 赵亮|Ivan 伊万|Rosa 罗莎
Li 李华|Emma 艾玛|Hugo 雨果|Zhou 周平|Kate 凯特|Sun 孙丽
Max 马克斯|Gao 高山
"""
PLACES = """
Green Valley 绿谷|Red Hill 红山|Long River 长溪|White Lake 白湖|Iron Ridge 铁岭|Stone Bay 石湾
Cold Creek 寒川|High Plain 高原|Black Cape 黑角|Salt Flat 盐滩|Fox Island 狐岛|Pine Pass 松口
Owl Rock 鹰岩|Deep Cave 深洞|Wind Gap 风口|Blue Fjord 蓝湾|North Mine 北矿|Old Quarry 旧坑
East Cliff 东崖|Sand Coast 沙岸
"""
RELATIONS = {"en": ("collected", "found at", "hardness"), "zh": ("采集", "产地", "硬度")}
# What a text says: p a person, m a mineral, q a place, h a hardness; and which relations it states.
FORMS = {
    "en": [
        ("{p} collected {m} at {q}.", "cf"),
        ("At {q}, {p} picked up a piece of {m}.", "cf"),
        ("In spring {p} brought {m} home from {q}.", "cf"),
        ("The {m} in this drawer is a find of {p}.", "c"),
        ("{p} has a fine {m} of hardness {h}.", "ch"),
        ("Miners at {q} dig for {m}.", "f"),
        ("There is much {m} at {q}, and its hardness is {h}.", "fh"),
        ("{p} found {m} at {q}; its hardness is {h}.", "cfh"),
        ("{p} spent a wet week at {q} and went home with nothing.", ""),
    ],
    "zh": [
        ("{p}在{q}采到了{m}。", "cf"),
        ("{p}从{q}带回一块{m}。", "cf"),
        ("春天，{p}到{q}去找{m}，果然找到了。", "cf"),
        ("抽屉里的{m}是{p}采集的。", "c"),
        ("{p}有一块很好的{m}，硬度为{h}。", "ch"),
        ("{q}的矿工开采{m}。", "f"),
        ("{q}盛产{m}，其硬度为{h}。", "fh"),
        ("{p}在{q}发现了{m}，硬度是{h}。", "cfh"),
        ("{p}在{q}住了一周，空手而归。", ""),
    ],
}


def table(text: str) -> list[list[str]]:
    """Rows of names; the parts of an English name of two words are put together."""
    rows = [row.split() for line in text.strip().splitlines() for row in line.split("|")]
    return [row if row[0].isascii() and not row[1].isascii() else [" ".join(row[:2]), *row[2:]] for row in rows]


def say(language: str, draw: random.Random, triples: tuple[Any, ...]) -> dict[str, Any]:
    """A text, and the triples that it states."""
    person, mineral, place = triples
    at = 0 if language == "en" else 1
    form, states = draw.choice(FORMS[language])
    p, m, q, h = person[at], mineral[at], place[at], mineral[2]
    collected, found, hardness = RELATIONS[language]
    stated = {"c": (p, collected, m), "f": (m, found, q), "h": (m, hardness, h)}
    return {"text": form.format(p=p, m=m, q=q, h=h), "triples": [stated[each] for each in states]}


def document(language: str, draw: random.Random, world: list[tuple[Any, ...]], length: int) -> str:
    """Several texts, one behind the other."""
    texts = [say(language, draw, draw.choice(world))["text"] for _ in range(length)]
    return ("" if language == "zh" else " ").join(texts)


def code(language: str, draw: random.Random, world: list[tuple[Any, ...]]) -> dict[str, str]:
    """A sentence as a comment, and a record of what it states."""
    said = say(language, draw, draw.choice(world))
    record: dict[str, list[Any]] = {relation: [] for relation in sorted(RELATIONS[language])}
    for head, relation, tail in said["triples"]:
        ends = ("subject", "object") if language == "en" else ("head", "tail")
        record[relation].append(dict(zip(ends, (head, tail), strict=True)))
    name = draw.choice(("record", "find", "row"))
    return {
        "input": f"# {said['text']}\n",
        "output": f"{name} = {json.dumps(record, ensure_ascii=False)}\n{name}s.append({name})\n",
    }


def graph(language: str, worlds: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Every name with its relations."""
    at = 0 if language == "en" else 1
    collected, found, hardness = RELATIONS[language]
    types = {"en": ("collector", "mineral", "place"), "zh": ("采集者", "矿物", "地点")}[language]
    nodes: dict[str, dict[str, Any]] = {}
    for triple in worlds:
        for row, type_name in zip(triple, types, strict=True):
            nodes.setdefault(row[0], {"id": row[0], "name": row[at], "types": [type_name], "relations": []})
        person, mineral, _ = (nodes[row[0]] for row in triple)
        links = [(person, collected, "target", triple[1][0]), (mineral, found, "target", triple[2][0])]
        for node, relation, kind, end in [*links, (mineral, hardness, "value", triple[1][2])]:
            entry = {"relation": relation, kind: end}
            if entry not in node["relations"]:
                node["relations"].append(entry)
    return sorted(nodes.values(), key=lambda node: str(node["id"]))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def others(source: Path, destination: Path) -> None:
    """The outputs of a file, each in the place of the next one's."""
    outputs = [json.loads(line)["output"] for line in source.read_text(encoding="utf-8").splitlines()]
    destination.write_text(json.dumps([*outputs[1:], outputs[0]], ensure_ascii=False), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a directory")
    parser.add_argument("--documents", type=int, default=400, help="of each kind (default: 400)")
    parser.add_argument("--train", type=int, default=1000, help="texts of each language (default: 1000)")
    parser.add_argument("--test", type=int, default=50, help="texts of each language (default: 50)")
    parser.add_argument("--others", type=Path, metavar="LINES", help="write answers by chance to OUT instead")
    options = parser.parse_args()
    if options.others is not None:
        others(options.others, options.out)
        return
    draw = random.Random(0)
    people, minerals, places = table(PEOPLE), table(MINERALS), table(PLACES)
    worlds: dict[str, list[tuple[Any, ...]]] = {"train": [], "test": []}
    for number, mineral in enumerate(minerals):  # a quarter of a mineral's collectors and places are the test's
        for p, person in enumerate(people):
            for q, place in enumerate(places):
                parts = {"test" if (end + number) % 4 == 0 else "train" for end in (p, q)}
                if len(parts) == 1:
                    worlds[parts.pop()].append((person, mineral, place))
    options.out.mkdir(parents=True, exist_ok=True)
    world = worlds["train"]
    zh = [{"content": document("zh", draw, world, 6)} for _ in range(options.documents)]
    en = [{"text": document("en", draw, world, 5)} for _ in range(options.documents)]
    write(options.out / "zh.jsonl", zh)
    write(options.out / "en.jsonl", en)
    languages = [draw.choice(("en", "zh")) for _ in range(2 * options.documents)]
    write(options.out / "code.jsonl", [code(language, draw, world) for language in languages])
    for language in ("en", "zh"):
        write(options.out / f"graph-{language}.jsonl", graph(language, [*worlds["train"], *worlds["test"]]))
        for part, number in (("train", options.train), ("test", options.test)):
            texts = (say(language, draw, draw.choice(worlds[part]))["text"] for _ in range(number))
            write(options.out / f"{part}-{language}.jsonl", [{"text": text, "source": language} for text in texts])


if __name__ == "__main__":
    main()
