"""The verb that an English instruction begins with, and its object: by a list of verbs and the order of words.

Self-Instruct (Wang et al. 2023, figure 2) parses instructions with a model. Here an instruction counts when its first
sentence begins with a verb of the list below, behind words of politeness. Its object is the last word before the first
preposition, conjunction, question word, sign or quotation, articles and the like left out: "Write a short story about
rain" is (write, story). A verb that is followed by one of those at once has no object. Nouns in the plural lose their
ending.
"""

from __future__ import annotations

import re

_VERBS_WORDS = """
add adapt advise analyse analyze answer argue arrange ask assign assess balance brainstorm break
bring build calculate categorise categorize change check choose cite clarify classify collect
combine come comment compare complete compose compute conclude condense consider construct continue
convert correct count create criticise criticize deduce decide decode define delete demonstrate
derive describe design detect determine develop devise differentiate discuss distinguish divide
draft edit elaborate encode estimate evaluate examine expand explain express extend extract fill
filter find finish fix follow form format formulate generate give group guess help highlight
identify illustrate imagine improve include indicate infer insert interpret introduce invent join
judge justify label list locate look make mark match measure mention merge modify multiply name
narrate note offer order organise organize outline paraphrase pick place plan point predict prepare
present produce propose prove provide put rank rate read rearrange recall recommend reduce remove
rename reorder repair rephrase replace reply report respond restate reverse review revise rewrite
round say search select separate shorten show simplify sketch solve sort specify spell split state
suggest sum summarise summarize support take tell think transform translate turn update use verify
weigh write
"""
_POLITE_WORDS = """
please kindly now then first can could will would you i want need like to me us for
"""
_ENDS_WORDS = """
about above across after against along among and around as at because before behind below beneath
beside between beyond but by during for from given how if in into like near of off on onto or over
per regarding since so than that through to toward towards under until up upon using via what when
where whether which while who whom whose why with within without is are was were be has have does do
did can should must
"""
_SKIPPED_WORDS = """
a an the this that these those my your our his her its their some any each every all both me us it
them
"""
VERBS = frozenset(_VERBS_WORDS.split())
_POLITE = frozenset(_POLITE_WORDS.split())
_ENDS = frozenset(_ENDS_WORDS.split())
_SKIPPED = frozenset(_SKIPPED_WORDS.split())
_KEPT_S = ("ss", "us", "is", "os")  # endings of nouns that are no plural


def verb_and_noun(instruction: str) -> tuple[str, str | None] | None:
    """(verb, object or None) in small letters; None where the instruction does not begin with a verb of the list."""
    sentence = re.split(r"(?<=[.!?])\s|\n", instruction.strip(), maxsplit=1)[0].lower()
    tokens = re.findall(r"[a-z]+(?:['-][a-z]+)*|[^\sa-z]", sentence)
    at = 0
    while at < len(tokens) and (tokens[at] in _POLITE or tokens[at] == ","):
        at += 1
    if at == len(tokens) or tokens[at] not in VERBS:
        return None
    phrase: list[str] = []
    for token in tokens[at + 1 :]:
        if token in _SKIPPED and not phrase:
            continue
        if token in _ENDS or not token[0].isalpha():
            if not token.isdigit():
                break
            continue
        phrase.append(token)
    return tokens[at], _singular(phrase[-1]) if phrase else None


def _singular(noun: str) -> str:
    if len(noun) > 4 and noun.endswith("ies"):
        return noun[:-3] + "y"
    if len(noun) > 4 and noun.endswith(("sses", "ches", "shes", "xes")):
        return noun[:-2]
    if len(noun) > 3 and noun.endswith("s") and not noun.endswith(_KEPT_S):
        return noun[:-1]
    return noun
