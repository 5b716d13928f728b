"""Rules of good text: Gopher's, C4's and FineWeb's, with characters in place of words where a script has no spaces.

Each rule answers with the name of what a text breaks, or None. On texts with spaces they are those of datatrove 0.10
(`pipeline/filters`), which the papers' authors and FineWeb ran, given the same words.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence

from jaxlm.config.prepare import C4Config, FineWebConfig, GopherConfig, RepetitionConfig
from jaxlm.data.prepare.sentences import CJK, is_cjk

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
CJK_STOP_WORDS = frozenset("的了是在和有不与为也这中一人のはをにがとで이다은는을를")
END_MARKS = (".", "?", "!", '"', "'", "。", "？", "！", "”", "’", "」", "』")
TERMINAL = (".", "!", "?", "…", "։", "؟", "۔", "।", "॥", "。", "！", "？", "．", "｡", "‼", "⁇", "⁈", "⁉")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
LONGEST_WORD = 1000  # characters; C4's code cuts lines with a longer one
# A line of 30 Latin characters says about as much as one of 10 Chinese characters.
CJK_LINE = 1 / 3

_CJK_CLASS = CJK.pattern
_WORD = re.compile(rf"{_CJK_CLASS}|[^\W_](?:(?!{_CJK_CLASS})[\w'’-])*|[^\w\s]+|_+")
_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)|[。！？]+")


class Text:
    """A text with what several rules ask of it.

    Attributes:
        text: the text.
        cjk: whether it is written in Chinese, Japanese or Korean characters.
        words: its words; each such character is one.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.cjk = is_cjk(text)
        self.words: list[str] = _WORD.findall(text)


def gopher(text: Text, rule: GopherConfig) -> str | None:
    """Quality: numbers of words, their length, symbols, bullets, ellipses, letters, stop words."""
    words = text.words
    with_letters = [word for word in words if any(map(str.isalnum, word))]
    if len(with_letters) < rule.min_words:
        return "gopher: too short"
    if len(with_letters) > rule.max_words:
        return "gopher: too long"
    if not words:
        return None
    mean = sum(map(len, with_letters)) / max(len(with_letters), 1)
    if mean < rule.min_mean_length and not text.cjk:
        return "gopher: short words"
    if mean > rule.max_mean_length:
        return "gopher: long words"
    if text.text.count("#") / len(words) > rule.max_symbols:
        return "gopher: hash signs"
    if (text.text.count("...") + text.text.count("…")) / len(words) > rule.max_symbols:
        return "gopher: ellipses"
    lines = text.text.splitlines()
    if sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines) > rule.max_bullets:
        return "gopher: bullets"
    if sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines) > rule.max_ellipsis_lines:
        return "gopher: lines that end with an ellipsis"
    if sum(any(map(str.isalpha, word)) for word in words) / len(words) < rule.min_alphabetic:
        return "gopher: words without letters"
    stop_words = CJK_STOP_WORDS if text.cjk else STOP_WORDS
    if rule.min_stop_words and len(stop_words.intersection(words)) < rule.min_stop_words:
        return "gopher: no stop words"
    return None


def repetition(text: Text, rule: RepetitionConfig) -> str | None:
    """Lines, paragraphs and n-grams that stand more than once."""
    size = len(text.text)
    if not size:
        return None
    paragraphs = re.split(r"\n{2,}", text.text.strip())
    number, characters = _duplicates(paragraphs)
    if number / len(paragraphs) > rule.paragraphs:
        return "repetition: paragraphs"
    if characters / size > rule.paragraph_characters:
        return "repetition: characters of paragraphs"
    lines = re.split(r"\n+", text.text)
    number, characters = _duplicates(lines)
    if number / len(lines) > rule.lines:
        return "repetition: lines"
    if characters / size > rule.line_characters:
        return "repetition: characters of lines"
    between = "" if text.cjk else " "
    for n, most in enumerate(rule.top_ngrams, 2):
        ngrams = collections.Counter(zip(*(text.words[at:] for at in range(n)), strict=False))
        if not ngrams:
            break
        # The first of the most frequent ones, as datatrove takes it.
        ngram, count = ngrams.most_common(1)[0]
        if len(between.join(ngram)) * count / size > most:
            return f"repetition: top {n}-gram"
    for n, most in enumerate(rule.all_ngrams, 5):
        if _repeated_characters(text.words, n) / size > most:
            return f"repetition: {n}-grams"
    return None


def _duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """The number of parts that stood before, and their characters."""
    seen: set[str] = set()
    number = characters = 0
    for part in parts:
        if part in seen:
            number += 1
            characters += len(part)
        seen.add(part)
    return number, characters


def _repeated_characters(words: Sequence[str], n: int) -> int:
    """Characters of n-grams that stood before, none counted twice."""
    seen: set[str] = set()
    characters = at = 0
    while at <= len(words) - n:
        ngram = "".join(words[at : at + n])
        if ngram in seen:
            characters += len(ngram)
            at += n
        else:
            seen.add(ngram)
            at += 1
    return characters


def c4(text: str, rule: C4Config) -> tuple[str, str | None]:
    """The lines that C4 keeps, and what the document breaks."""
    lines: list[str] = []
    sentences = 0
    for raw in text.splitlines():
        line = raw.strip()
        words = line.split()
        if any(len(word) > LONGEST_WORD and not is_cjk(word) for word in words):
            continue
        line = _CITATION.sub("", line)
        if rule.end_marks and (not line.endswith(END_MARKS) or line.endswith("...")):
            continue
        if (len(_WORD.findall(line)) if is_cjk(line) else len(words)) < rule.min_line_words:
            continue
        lower = line.lower()
        if "lorem ipsum" in lower:
            return text, "c4: lorem ipsum"
        if "javascript" in lower:
            continue
        if rule.code and "{" in line:
            return text, "c4: curly braces"
        if any(phrase in lower for phrase in POLICY):
            continue
        sentences += max(len(_SENTENCE_END.findall(line)), 1)
        lines.append(line)
    if sentences < rule.min_sentences:
        return text, "c4: few sentences"
    return "\n".join(lines).strip(), None


def fineweb(text: Text, rule: FineWebConfig) -> str | None:
    """Lines without an end mark, short lines, lines that stand twice, lists."""
    lines = [line for line in text.text.split("\n") if line.strip()]
    if not lines:
        return None
    if sum(line.endswith(TERMINAL) for line in lines) / len(lines) < rule.min_end_marks:
        return "fineweb: lines without an end mark"
    short = rule.short_line * (CJK_LINE if text.cjk else 1)
    if sum(len(line) <= short for line in lines) / len(lines) > rule.max_short_lines:
        return "fineweb: short lines"
    if _duplicates(lines)[1] / len(text.text.replace("\n", "")) > rule.max_line_duplicates:
        return "fineweb: lines that stand twice"
    if text.text.count("\n") / max(len(text.words), 1) > rule.max_newlines:
        return "fineweb: line breaks"
    return None
